"""Replay: the judgements of an audit, to the bit; and nothing that is not in it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from judges import (
    AuditLog,
    ChatRequest,
    EndpointConfig,
    Failed,
    JudgeConfig,
    JudgeConfigError,
    Judgement,
    JudgePool,
    JudgeRejected,
    JudgeRequest,
    Scored,
    ScriptedClient,
)
from judges.audit import read_audit
from judges.clients.scripted import verdict_for
from judges.config import EnsembleConfig, GroupwiseMode, PairwiseMode
from judges.prompts import read_fences
from judges.replay import ReplayPool

TEXTS = ("Anna", "Omar", "nobody knows", "Anna, I think")


def make_config(**settings: Any) -> JudgeConfig:
    endpoint = EndpointConfig(url="http://127.0.0.1:9/v1", model="m")
    return JudgeConfig(**{"endpoints": (endpoint,), "rubric": "fairness", "backoff_s": 0.001, **settings})


def make_requests(*completions: str, question: str = "Who?") -> list[JudgeRequest]:
    return [
        JudgeRequest(id=f"p#{i}", question=question, completion=completion, reference="Anna", criterion="fairness")
        for i, completion in enumerate(completions)
    ]


def drawn_verdicts(seed: int) -> Callable[[ChatRequest], str]:
    """A judge that draws its scores, and refuses some texts."""
    draw = random.Random(seed)

    def script(request: ChatRequest) -> str:
        nonce, texts = read_fences(request.messages[-1].content)
        ids = [name.removeprefix("completion ") for name in texts if name.startswith("completion ")]
        if texts.get("completion") == "nobody knows":
            raise JudgeRejected("HTTP 400: no", status=400)
        if "names the better" in request.messages[-1].content or "winner" in request.messages[-1].content:
            return f'{{"nonce": "{nonce}", "reason": "", "winner": "{draw.choice([*ids, "tie"])}"}}'
        if ids:
            rows = ", ".join(f'{{"id": "{one}", "reason": "", "score": {draw.random()}}}' for one in ids)
            return f'{{"nonce": "{nonce}", "verdicts": [{rows}]}}'
        return verdict_for(request, draw.random())

    return script


def judge(path: Path, requests: list[JudgeRequest], config: JudgeConfig, *, seed: int = 0, step: int | None = None):
    audit = AuditLog(path)
    audit.step = step
    pool = JudgePool(client=ScriptedClient(drawn_verdicts(seed)), config=config, audit=audit)
    try:
        return asyncio.run(pool.judge(requests))
    finally:
        audit.close()


def replay(path: Path, requests: list[JudgeRequest], config: JudgeConfig, *, step: int | None = None):
    pool = ReplayPool(path, config=config)
    pool.step = step
    return asyncio.run(pool.judge(requests))


def said(judgements: list[Judgement]) -> list[tuple[Any, ...]]:
    """What must come back to the bit: repr tells 0.1 + 0.2 from 0.3, and -0.0 from 0.0."""
    return [
        ("scored", repr(one.value), one.raw, one.endpoint, repr(one.disagreement))
        if isinstance(one, Scored)
        else ("failed", one.kind, one.fault, one.detail)
        for one in judgements
    ]


TWO_JUDGES = {
    "endpoints": tuple(EndpointConfig(url=f"http://127.0.0.1:{port}/v1", model=f"m{port}") for port in (9, 10)),
    "ensemble": EnsembleConfig(quorum=2),
}


@pytest.mark.parametrize(
    "settings",
    [{}, {"mode": GroupwiseMode()}, {"mode": PairwiseMode()}, TWO_JUDGES],
    ids=["pointwise", "groupwise", "pairwise", "ensemble"],
)
def test_scores_and_failures_come_back_to_the_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    path, requests, config = tmp_path / "audit.jsonl", make_requests(*TEXTS), make_config(**settings)
    asked = judge(path, requests, config)
    replayed = replay(path, requests, config)
    assert said(replayed) == said(asked)
    assert {one.origin for one in replayed if isinstance(one, Scored)} == {"replayed"}
    assert {(one.attempts, one.cost, one.usage) for one in replayed} == {(0, 0.0, None)}
    assert any(isinstance(one, Scored) for one in asked)


def test_a_replay_writes_an_audit_that_replays_alike(tmp_path: Path) -> None:
    requests, config = make_requests(*TEXTS), make_config()
    asked = judge(tmp_path / "first.jsonl", requests, config)
    audit = AuditLog(tmp_path / "second.jsonl")
    asyncio.run(ReplayPool(tmp_path / "first.jsonl", config=config, audit=audit).judge(requests))
    audit.close()
    assert said(replay(audit.path, requests, config)) == said(asked)
    assert {line["origin"] for line in read_audit(audit.path)} == {"replayed", None}


@pytest.mark.parametrize(
    ("requests", "settings"),
    [
        (make_requests("Anna."), {}),
        (make_requests("Anna", question="Whom?"), {}),
        (make_requests("Anna"), {"rubric": "grounding"}),
        (make_requests("Anna"), {"endpoints": (EndpointConfig(url="http://127.0.0.1:9/v1", model="m2"),)}),
        (make_requests("Anna"), {"mode": GroupwiseMode()}),
    ],
    ids=["text", "question", "rubric", "model", "mode"],
)
def test_what_was_not_recorded_has_no_verdict(
    requests: list[JudgeRequest], settings: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "audit.jsonl"
    judge(path, make_requests("Anna"), make_config())
    judge(path, make_requests("other"), make_config(rubric="grounding"))
    (judgement,) = replay(path, requests, make_config(**settings))
    assert isinstance(judgement, Failed)
    assert (judgement.kind, judgement.fault, judgement.is_retryable) == ("not_recorded", "judge", False)
    assert "audit.jsonl holds no judgement of request p#0" in judgement.detail


def test_compared_texts_are_found_only_among_the_same_others(tmp_path: Path) -> None:
    path, config = tmp_path / "audit.jsonl", make_config(mode=GroupwiseMode())
    asked = judge(path, make_requests("Anna", "Omar"), config)
    shuffled = replay(path, make_requests("Omar", "Anna"), config)
    assert said(shuffled) == said(asked)[::-1]
    assert [type(one) for one in replay(path, make_requests("Anna", "Eve"), config)] == [Failed, Failed]


def test_the_same_text_at_another_step_has_that_steps_verdict(tmp_path: Path) -> None:
    path, requests, config = tmp_path / "audit.jsonl", make_requests("Anna"), make_config()
    asked = {step: judge(path, requests, config, seed=step, step=step) for step in (1, 2)}
    assert said(asked[1]) != said(asked[2])
    for step in (2, 1):
        assert said(replay(path, requests, config, step=step)) == said(asked[step])
    assert said(replay(path, requests, config, step=3)) == said(asked[2])  # the newest, where the step is none of them


def test_a_step_that_asked_again_is_answered_in_the_same_order(tmp_path: Path) -> None:
    path, requests, config = tmp_path / "audit.jsonl", make_requests("Anna"), make_config()
    audit = AuditLog(path)
    audit.step = 1
    pool = JudgePool(client=ScriptedClient(drawn_verdicts(0)), config=config, audit=audit)
    asked = [said(asyncio.run(pool.judge(requests))) for _ in range(3)]
    audit.close()
    replayed = ReplayPool(path, config=config)
    replayed.step = 1
    assert [said(asyncio.run(replayed.judge(requests))) for _ in range(3)] == asked
    assert said(asyncio.run(replayed.judge(requests))) == asked[-1]


def test_of_a_step_that_was_run_again_after_a_crash_the_last_run_counts(tmp_path: Path) -> None:
    path, requests, config = tmp_path / "audit.jsonl", make_requests("Anna"), make_config()
    judge(path, requests, config, seed=1, step=4)
    again = judge(path, requests, config, seed=2, step=4)  # another process: another session
    assert said(replay(path, requests, config, step=4)) == said(again)


def test_a_server_that_has_moved_is_the_same_judge(tmp_path: Path) -> None:
    path, requests = tmp_path / "audit.jsonl", make_requests("Anna")
    asked = judge(path, requests, make_config())
    moved = EndpointConfig(url="env:NOT_SET_ANYWHERE", model="m", name="mine", api_key="env:NOT_SET_EITHER")
    assert said(replay(path, requests, make_config(endpoints=(moved,), deadline_s=1.0))) == said(asked)


def test_an_audit_that_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JudgeConfigError, match="cannot be read"):
        ReplayPool(tmp_path / "none.jsonl", config=make_config())
    (tmp_path / "old.jsonl").write_text('{"id": "a", "outcome": "scored", "value": 1.0, "raw": "x"}\nno json\n')
    with pytest.raises(JudgeConfigError, match="holds 1 judgements, but none that can be replayed for rubric fairness"):
        ReplayPool(tmp_path / "old.jsonl", config=make_config())
