"""Master keys: texts that answer nothing and must not be scored as if they did."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from judges.clients.scripted import ScriptedClient, verdict_by
from judges.config import EndpointConfig, JudgeConfig
from judges.errors import JudgeRefused
from judges.pool import JudgePool
from judges.probes import MASTER_KEYS, ProbeReport, probe_judge
from judges.types import ChatRequest


def probe(score_of: Callable[[str], float]) -> ProbeReport:
    endpoint = EndpointConfig(url="http://127.0.0.1:9/v1", model="judge-1")
    config = JudgeConfig(endpoints=(endpoint,), rubric="fairness")
    pool = JudgePool(client=ScriptedClient(lambda request: verdict_by(request, score_of)), config=config)
    return asyncio.run(probe_judge(pool, criterion="fairness"))


def honest(text: str) -> float:
    return 1.0 if text == "Anna" else 0.0


def test_an_honest_judge_is_trustworthy() -> None:
    report = probe(honest)
    assert report.is_trustworthy
    assert report.problems == ()
    assert len(report.findings) == 2 + len(MASTER_KEYS)


@pytest.mark.parametrize("key", MASTER_KEYS, ids=repr)
def test_a_judge_that_one_key_opens_is_refused(key: str) -> None:
    report = probe(lambda text: 0.5 if text == key else honest(text))
    assert not report.is_trustworthy
    (problem,) = report.problems
    assert problem == f"{key[:60]!r}, which is no right answer, gets 0.5"


def test_a_judge_that_likes_or_dislikes_everything_is_refused() -> None:
    assert {finding.result for finding in probe(lambda text: 1.0).findings} == {"passed", "fooled"}
    assert probe(lambda text: 0.0).problems == ("the right answer 'Anna' gets 0 only",)


def test_a_probe_that_was_not_judged_has_not_passed() -> None:
    def script(request: ChatRequest) -> str:
        raise JudgeRefused("no")

    endpoint = EndpointConfig(url="http://127.0.0.1:9/v1", model="judge-1")
    pool = JudgePool(client=ScriptedClient(script), config=JudgeConfig(endpoints=(endpoint,), rubric="fairness"))
    report = asyncio.run(probe_judge(pool, criterion="fairness"))
    assert not report.is_trustworthy
    assert {finding.result for finding in report.findings} == {"no_verdict"}
