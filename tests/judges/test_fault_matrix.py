"""Everything that can go wrong with a judge, through the pool and real sockets: see fault_cases."""

from __future__ import annotations

import ast
import asyncio
import logging
from pathlib import Path

import pytest
from fault_cases import CASES, ELSEWHERE, GRACE_S, SECRET, TRUE_SCORE, Case, outcome_of, run, table_elsewhere
from fault_server import FaultServer, serving, verdict

from judges.clients.openai_chat import OpenAIChatClient
from judges.config import EndpointConfig, JudgeConfig
from judges.pool import JudgePool
from judges.types import Failed, JudgeRequest, Scored

DOCUMENT = Path(__file__).parents[2] / "benchmarks" / "results" / "fault_matrix.md"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_fault_costs_what_it_must_and_never_makes_a_number(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    seen = asyncio.run(run(case, tmp_path))
    expected = list(case.expect) * (len(case.completions) if len(case.expect) == 1 else 1)
    # which texts are hit is told where the case fixes it; in a group and under a budget, only how many
    assert sorted(seen.outcomes) == sorted(expected), [str(judgement) for judgement in seen.judgements]

    for judgement in seen.judgements:
        if isinstance(judgement, Scored):
            assert judgement.value == TRUE_SCORE
        else:
            assert not hasattr(judgement, "value")
            assert judgement.fault == case.fault
            assert judgement.detail
        if case.attempts is not None:
            assert judgement.attempts == case.attempts

    if case.max_calls is not None:
        assert seen.calls <= case.max_calls
    assert seen.wall_s >= case.min_wall_s
    assert seen.wall_s <= (seen.deadline_s if case.max_wall_s is None else case.max_wall_s) + GRACE_S

    assert [line["id"] for line in seen.audit] == [f"p#{index}" for index in range(len(case.completions))]
    assert [line["outcome"] for line in seen.audit] == seen.outcomes
    assert all((line["value"] is None) == (line["outcome"] != "scored") for line in seen.audit)

    artefacts = [repr(seen.judgements), repr(seen.stats), seen.audit_text, caplog.text]
    for text in artefacts:
        assert SECRET not in text
        assert SECRET.replace("/", "\\/") not in text


def test_the_breaker_opens_probes_and_closes_in_this_order(tmp_path: Path) -> None:
    (case,) = [case for case in CASES if case.row == 8]
    (lane,) = asyncio.run(run(case, tmp_path)).stats.lanes
    assert [state for _, state in lane.breaker_events] == ["open", "half_open", "closed"]


def test_one_bad_text_leaves_the_endpoint_healthy(tmp_path: Path) -> None:
    (case,) = [case for case in CASES if case.row == 7]
    seen = asyncio.run(run(case, tmp_path))
    assert seen.outcomes == ["scored", "unavailable", "scored"]
    assert seen.stats.lanes[0].breaker == "closed"


def test_unbelievable_usage_is_flagged_and_never_booked(tmp_path: Path) -> None:
    for case in [case for case in CASES if case.row == 44]:
        seen = asyncio.run(run(case, tmp_path))
        assert seen.judgements[0].usage is None
        assert seen.stats.lanes[0].cost == 0.0


def test_a_twin_is_still_served_when_the_first_caller_leaves() -> None:
    async def main() -> tuple[str, FaultServer]:
        async with serving(verdict(TRUE_SCORE, delay_s=0.2)) as server:
            endpoint = EndpointConfig(url=server.url, model="judge-1")
            client = OpenAIChatClient(endpoint, timeout_s=2.0)
            pool = JudgePool(client=client, config=JudgeConfig(endpoints=(endpoint,), rubric="fairness"))
            request = JudgeRequest(id="p", question="Who?", completion="Anna", reference="Anna", criterion="fairness")
            first = asyncio.create_task(pool.judge([request]))
            second = asyncio.create_task(pool.judge([request]))
            await asyncio.sleep(0.05)
            first.cancel()
            (judgement,) = await second
            await client.aclose()
            return outcome_of(judgement), server

    outcome, server = asyncio.run(main())
    assert outcome == "scored"
    assert len(server.received) == 1


def test_the_document_has_every_case() -> None:
    cases, _, elsewhere = DOCUMENT.read_text(encoding="utf-8").partition("Without a call")
    lines = cases.splitlines()
    documented = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines if line.startswith("| ")]
    assert documented[1:] == [(str(case.row), case.name.replace("|", "/")) for case in CASES]
    assert table_elsewhere() in elsewhere


def test_every_row_of_the_matrix_is_tried_here_or_by_a_test_that_there_is() -> None:
    assert {case.row for case in CASES} | {each.row for each in ELSEWHERE} >= {*range(1, 51), 56}
    root = DOCUMENT.parents[2]
    for path, _, name in (test.partition("::") for each in ELSEWHERE for test in each.tests):
        tree = ast.parse((root / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (path, name)


def test_no_failure_has_a_number_to_be_taken_for_a_score() -> None:
    failed = Failed(kind="timeout", attempts=1, fault="judge", detail="")
    assert not hasattr(failed, "value")
    with pytest.raises(TypeError):
        float(failed)  # pyright: ignore[reportArgumentType]
