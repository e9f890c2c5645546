"""The plan: what is counted is what a pool would do; nobody is asked."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from judges import EndpointConfig, JudgeConfig, JudgePool, JudgeRequest, ScriptedClient
from judges.clients.scripted import verdict_for
from judges.config import AdaptiveConcurrency, EnsembleConfig, GroupwiseMode, PairwiseMode, PriceConfig
from judges.plan import most_in_flight, plan_batches
from judges.prompts import load_rubric

RUBRIC = load_rubric("fairness")
NOBODY = "https://judge.invalid/v1"


def make_config(endpoint: dict[str, Any] | None = None, **settings: Any) -> JudgeConfig:
    one = EndpointConfig(**{"url": NOBODY, "model": "m", **(endpoint or {})})
    return JudgeConfig(**{"endpoints": (one,), "rubric": "fairness", "concurrency": 4, **settings})


def make_batch(num: int, question: str = "Who?") -> list[JudgeRequest]:
    return [
        JudgeRequest(id=str(n), question=question, completion=f"answer {n}", reference="Anna", criterion="fairness")
        for n in range(num)
    ]


def plan(config: JudgeConfig, *sizes: int, latency_s: float = 2.0, reply_tokens: int = 50) -> list[Any]:
    batches = [make_batch(size, question=f"Who {n}?") for n, size in enumerate(sizes)]
    return plan_batches(config, RUBRIC, batches, latency_s=latency_s, reply_tokens=reply_tokens)


def test_calls_and_prompts_are_those_that_a_pool_would_send() -> None:
    config = make_config()
    client = ScriptedClient(lambda request: verdict_for(request, 1.0))
    asyncio.run(JudgePool(client=client, config=config).judge(make_batch(6, "Who 0?")))
    (load,) = plan(config, 6)
    assert load.calls == len(client.requests) == 6
    assert load.prompt_tokens == sum(math.ceil(len(one.messages[0].content) / 3) for one in client.requests)
    assert load.reply_tokens == 6 * 50


@pytest.mark.parametrize(
    ("mode", "calls", "texts"),
    [
        (GroupwiseMode(), 2, 2 * 6),  # one group, in two orders
        (GroupwiseMode(permutations=1, completions_per_call=4), 2, 7),  # an anchor and 3; the anchor and 2
        (PairwiseMode(), 30, 60),  # 15 pairs, in both orders
        (PairwiseMode(opponents=1), 12, 24),  # 6 around the ring
    ],
    ids=["groupwise", "split", "all pairs", "ring"],
)
def test_modes_that_compare_count_their_calls_and_what_is_said_of_each_text(mode: Any, calls: int, texts: int) -> None:
    (load,) = plan(make_config(mode=mode), 6)
    assert (load.calls, load.reply_tokens) == (calls, texts * 50)


def test_equal_completions_are_asked_about_once() -> None:
    (load,) = plan_batches(make_config(), RUBRIC, [make_batch(2) + make_batch(2)], latency_s=1.0, reply_tokens=1)
    assert load.calls == 2


def test_money_is_estimated_and_bounded() -> None:
    config = make_config({"price": PriceConfig(input=3.0, output=15.0)}, max_tokens=200)
    client = ScriptedClient(lambda request: verdict_for(request, 1.0))
    asyncio.run(JudgePool(client=client, config=config).judge(make_batch(4, "Who 0?")))
    num_bytes = sum(len(one.messages[0].content.encode()) + 64 for one in client.requests)  # 64 for the chat template
    (load,) = plan(config, 4)
    assert load.cost == pytest.approx((3.0 * load.prompt_tokens + 15.0 * 4 * 50) / 1e6)
    assert load.cost_at_most == pytest.approx((3.0 * num_bytes + 15.0 * 4 * 200) / 1e6)
    assert plan(make_config(), 4)[0].cost is None


def test_no_more_is_said_than_the_config_allows() -> None:
    assert plan(make_config(max_tokens=20), 3)[0].reply_tokens == 60


@pytest.mark.parametrize(
    ("endpoint", "seconds", "bound_by"),
    [
        ({}, 3 * 2.0, "concurrency"),  # 10 calls, 4 at a time, 2 s each
        ({"max_concurrency": 2}, 5 * 2.0, "concurrency"),
        ({"requests_per_minute": 20.0}, 30.0, "requests_per_minute"),
        ({"requests_per_minute": 600.0}, 6.0, "concurrency"),
    ],
)
def test_the_slowest_bound_gives_the_time(endpoint: dict[str, Any], seconds: float, bound_by: str) -> None:
    (load,) = plan(make_config(endpoint), 10)
    assert (load.seconds, load.bound_by) == (pytest.approx(seconds), bound_by)


def test_tokens_a_minute_bound_the_time() -> None:
    (load,) = plan(make_config({"tokens_per_minute": 1000.0}), 10)
    assert load.seconds == pytest.approx((load.prompt_tokens + load.reply_tokens) / 1000 * 60)
    assert load.bound_by == "tokens_per_minute"


def test_an_ensemble_asks_all_and_stand_ins_only_the_first() -> None:
    endpoints = tuple(EndpointConfig(url=NOBODY, model=model) for model in ("a", "b", "c"))
    stand_ins = make_config(endpoints=endpoints)
    ensemble = make_config(endpoints=endpoints, ensemble=EnsembleConfig(quorum=2))
    assert [load.endpoint.label for load in plan(stand_ins, 2)] == ["a"]
    assert [(load.endpoint.label, load.calls) for load in plan(ensemble, 2)] == [("a", 2), ("b", 2), ("c", 2)]


def test_adaptive_concurrency_is_taken_at_its_most() -> None:
    config = make_config(concurrency=AdaptiveConcurrency(start=2, maximum=16))
    assert most_in_flight(config, config.endpoints[0]) == 16


def test_planning_needs_neither_a_url_nor_a_key() -> None:
    (load,) = plan(make_config({"url": "env:NOT_SET_ANYWHERE", "api_key": "env:NOT_SET_EITHER"}), 1)
    assert load.calls == 1


def test_nothing_to_judge_is_no_load() -> None:
    (load,) = plan(make_config())
    assert (load.calls, load.seconds) == (0, 0.0)
