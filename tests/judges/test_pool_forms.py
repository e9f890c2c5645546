"""What is sent and what is not (schemas that a server refuses, blank texts), and what answers say beside the text."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from virtual_clock import run_virtually

from judges import (
    AuditLog,
    ChatReply,
    ChatRequest,
    EndpointConfig,
    Failed,
    InvalidVerdict,
    JudgeConfig,
    Judgement,
    JudgePool,
    JudgeRefused,
    JudgeRejected,
    JudgeRequest,
    Scored,
    ScriptedClient,
    Usage,
)
from judges.budget import MoneyBudget
from judges.cache import SqliteCache
from judges.clients.scripted import verdict_by
from judges.config import BudgetConfig
from judges.pool import PoolStats
from judges.prompts import is_blank, read_fences

Script = Callable[[ChatRequest], Any]


def make_config(*, endpoint: dict[str, Any] | None = None, **settings: Any) -> JudgeConfig:
    one = EndpointConfig(**{"url": "http://127.0.0.1:9/v1", "model": "m", **(endpoint or {})})
    return JudgeConfig(**{"endpoints": (one,), "rubric": "fairness", "backoff_s": 0.001, **settings})


def make_requests(*completions: str) -> list[JudgeRequest]:
    return [
        JudgeRequest(id=f"p#{i}", question="Who?", completion=completion, reference="Anna", criterion="fairness")
        for i, completion in enumerate(completions)
    ]


def judge(
    script: Script, *completions: str, config: JudgeConfig | None = None, latency_s: float = 0.0, **stores: Any
) -> tuple[list[Judgement], ScriptedClient, PoolStats]:
    client = ScriptedClient(script, latency_s=lambda request: latency_s)
    pool = JudgePool(client=client, config=config or make_config(), **stores)
    return asyncio.run(pool.judge(make_requests(*completions))), client, pool.stats()


def by_length(request: ChatRequest) -> str:
    return verdict_by(request, lambda text: len(text) / 100)


# --- a server that takes no schema


class NoSchemas:
    """A server that rejects every request with a schema. Args: status: by what."""

    def __init__(self, status: int = 400) -> None:
        self.status = status

    def __call__(self, request: ChatRequest) -> str | Exception:
        if request.json_schema is not None:
            return JudgeRejected("response_format is not supported", status=self.status)
        return by_length(request)


AUTO = {"structured": "auto"}


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_refuses_a_schema_is_asked_in_words_and_not_offered_one_again(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    client = ScriptedClient(NoSchemas(status))
    pool = JudgePool(client=client, config=make_config(endpoint=AUTO))

    async def twice() -> list[Judgement]:
        return [*await pool.judge(make_requests("Anna")), *await pool.judge(make_requests("Omar B", "Lea"))]

    with caplog.at_level(logging.WARNING):
        judgements = asyncio.run(twice())
    assert [one.value for one in judgements if isinstance(one, Scored)] == [0.04, 0.06, 0.03]
    assert [one.attempts for one in judgements] == [2, 1, 1]
    assert [request.json_schema is not None for request in client.requests] == [True, False, False, False]
    assert [record.message for record in caplog.records] == [
        "judge m takes no JSON schema: verdicts are asked for in words alone"
    ]


def test_a_server_that_takes_a_schema_is_never_asked_without() -> None:
    _, client, _ = judge(by_length, "Anna", "Omar", config=make_config(endpoint=AUTO))
    assert all(request.json_schema is not None for request in client.requests)


def test_asking_in_words_spends_no_retry_budget_however_many_calls_were_under_way() -> None:
    config = make_config(endpoint=AUTO, concurrency=8, retry_budget={"share": 0.0, "floor": 0})
    judgements, _, stats = judge(NoSchemas(), *(f"answer {n}" for n in range(8)), config=config, latency_s=0.01)
    assert all(isinstance(one, Scored) for one in judgements)
    assert (stats.lanes[0].calls, stats.lanes[0].extra_calls) == (16, 0)


def test_what_is_refused_in_words_too_is_rejected_and_says_nothing_of_schemas() -> None:
    def script(request: ChatRequest) -> str | Exception:
        return JudgeRejected("bad request", status=400) if "Omar" in request.messages[0].content else by_length(request)

    judgements, client, _ = judge(script, "Omar", "Anna", config=make_config(endpoint=AUTO))
    assert [isinstance(one, Scored) for one in judgements] == [False, True]
    assert isinstance(judgements[0], Failed)
    assert (judgements[0].kind, judgements[0].attempts) == ("rejected", 2)
    assert sorted(request.json_schema is not None for request in client.requests) == [False, True, True]


@pytest.mark.parametrize(
    ("structured", "failure"),
    [
        ("json_schema", JudgeRejected("no", status=400)),  # the recipe asks for it
        ("auto", JudgeRejected("no such model", status=404)),
        ("auto", JudgeRejected("too long", kind="too_long", status=400)),
        ("auto", JudgeRefused("no", status=400)),
    ],
)
def test_other_refusals_are_not_taken_for_one_of_the_schema(structured: str, failure: Exception) -> None:
    config = make_config(endpoint={"structured": structured})
    (judgement,), client, _ = judge(lambda request: failure, "Anna", config=config)
    assert isinstance(judgement, Failed)
    assert len(client.requests) == 1


def test_a_kept_verdict_is_found_by_whichever_form_it_was_asked(tmp_path: Path) -> None:
    async def twice(first: Script, second: Script) -> tuple[ScriptedClient, list[Judgement]]:
        cache = SqliteCache(tmp_path / "verdicts.sqlite")
        try:
            for script in (first, second):
                client = ScriptedClient(script)
                pool = JudgePool(client=client, config=make_config(endpoint=AUTO), cache=cache)
                judgements = await pool.judge(make_requests("Anna"))
            return client, judgements  # pyright: ignore[reportPossiblyUnbound]
        finally:
            await cache.aclose()

    client, (judgement,) = asyncio.run(twice(NoSchemas(), by_length))
    assert client.requests == []  # a pool that does not know yet what the server takes
    assert isinstance(judgement, Scored)
    assert judgement.origin == "cached"


# --- a completion without any text


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b\u2060", "\x00", "\u3164 \ufe0f", "\ud800"])
def test_a_text_in_which_nothing_is_seen_is_blank(text: str) -> None:
    assert is_blank(text)
    assert not is_blank(text + "." + text)


@pytest.mark.parametrize("mode", ["pointwise", "groupwise", "pairwise"])
def test_no_judge_is_asked_about_a_blank_completion_and_its_failure_is_its_own(mode: str) -> None:
    judgements, client, stats = judge(by_length, "", "Anna", "\u200b", "Omar B", config=make_config(mode=mode))
    assert [isinstance(one, Scored) for one in judgements] == [False, True, False, True]
    for blank in judgements[::2]:
        assert isinstance(blank, Failed)
        assert (blank.kind, blank.fault, blank.attempts, blank.is_retryable) == ("blank", "completion", 0, False)
    assert not any('completion": ""' in request.messages[0].content for request in client.requests)
    expected = {"pointwise": [0.04, 0.06], "groupwise": [0.04, 0.06], "pairwise": [0.0, 1.0]}[mode]
    assert [one.value for one in judgements if isinstance(one, Scored)] == pytest.approx(expected)
    assert len(client.requests) == 2  # two texts, or two orders
    assert stats.outcomes == {"blank": 2, "scored": 2}
    assert stats.counts["completion_faults"] == 2


def test_an_ensemble_is_not_asked_about_a_blank_completion_either(tmp_path: Path) -> None:
    endpoints = tuple(EndpointConfig(url="http://127.0.0.1:9/v1", model=name) for name in ("a", "b"))
    config = JudgeConfig(endpoints=endpoints, rubric="fairness", ensemble={"quorum": 2})  # pyright: ignore[reportArgumentType]
    audit = AuditLog(tmp_path / "audit.jsonl")
    judgements, client, _ = judge(by_length, "Anna", "", config=config, audit=audit)
    audit.close()
    assert [isinstance(one, Scored) for one in judgements] == [True, False]
    assert len(client.requests) == 2
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["outcome"], line["fault"], line["attempts"]) for line in lines] == [
        ("scored", None, 2),
        ("blank", "completion", 0),
    ]


# --- what an answer says of limits and of money


def test_tokens_of_a_refusal_and_of_an_empty_reply_are_paid_and_no_more_than_that() -> None:
    price = {"input": 1.0, "output": 10.0}  # per million
    config = make_config(endpoint={"price": price}, budget={"per_run": 1.0})
    empty = InvalidVerdict("no text", kind="empty", usage=Usage(prompt_tokens=40, completion_tokens=1))
    failures = {"Anna": JudgeRefused("no", usage=Usage(prompt_tokens=50, completion_tokens=2)), "Omar": empty}

    def script(request: ChatRequest) -> Exception:
        return failures[read_fences(request.messages[0].content)[1]["completion"]]

    budget = MoneyBudget(BudgetConfig(per_run=1.0), judge="m")
    for name, num_calls, tokens in (("Anna", 1, (50, 2)), ("Omar", 2, (80, 2))):  # an empty reply is asked for twice
        spent = budget.spent
        (judgement,), _, stats = judge(script, name, config=config, budget=budget)
        assert isinstance(judgement, Failed)
        assert judgement.attempts == num_calls
        assert judgement.usage == Usage(prompt_tokens=tokens[0], completion_tokens=tokens[1])
        cost = (tokens[0] + 10 * tokens[1]) / 1e6
        assert judgement.cost == pytest.approx(cost)
        assert stats.lanes[0].cost == pytest.approx(cost)
        assert budget.spent - spent == pytest.approx(cost)
        assert stats.lanes[0].usage == judgement.usage


def test_nonsense_usage_of_a_failure_or_a_reply_reaches_no_judgement() -> None:
    nonsense = Usage(prompt_tokens=10**9, completion_tokens=1)

    def reply(request: ChatRequest) -> ChatReply:
        return ChatReply(text=by_length(request), finish_reason="stop", usage=nonsense)

    for script in (lambda request: JudgeRefused("no", usage=nonsense), reply):
        (judgement,), _, stats = judge(script, "Anna")
        assert judgement.usage is None
        assert stats.lanes[0].unbelievable_usage == 1


def test_the_rates_follow_what_the_endpoint_says_is_left_and_never_beyond_what_was_counted() -> None:
    """60 requests a minute: one a second, and 5 kept. Told that none is left, the second call waits a second."""

    def spaced(**remaining: int) -> float:
        def script(request: ChatRequest) -> ChatReply:
            return ChatReply(text=by_length(request), finish_reason="stop", **remaining)

        async def main() -> float:
            config = make_config(endpoint={"requests_per_minute": 60.0, "tokens_per_minute": 6e6}, concurrency=1)
            pool = JudgePool(client=ScriptedClient(script), config=config)
            started = asyncio.get_running_loop().time()
            await pool.judge(make_requests("Anna"))
            await pool.judge(make_requests("Omar"))
            return asyncio.get_running_loop().time() - started

        return run_virtually(main())

    assert spaced() == pytest.approx(0.0, abs=1e-3)
    assert spaced(remaining_requests=1000, remaining_tokens=10**9) == pytest.approx(0.0, abs=1e-3)
    assert spaced(remaining_requests=0) == pytest.approx(1.0, abs=1e-3)
    # 100,000 tokens a second: from none to the estimate of a call, some 700, takes 7 ms
    assert 0.002 < spaced(remaining_tokens=0) < 0.02
