"""Groupwise, pairwise and ensembles: what is asked, how the answers become scores, and what a missing one costs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from judges import (
    ChatRequest,
    EndpointConfig,
    Failed,
    JudgeConfig,
    JudgeConfigError,
    Judgement,
    JudgePool,
    JudgeRefused,
    JudgeRequest,
    Scored,
    ScriptedClient,
)
from judges.clients.scripted import verdict_for
from judges.config import EnsembleConfig
from judges.ensemble import combine
from judges.prompts import Rubric, read_fences
from judges.types import Usage

QUALITY = {"bad": 0.0, "fair": 0.5, "good": 0.75, "best": 1.0}


def make_config(num_endpoints: int = 1, **settings: Any) -> JudgeConfig:
    endpoints = [EndpointConfig(url="http://127.0.0.1:9/v1", model=f"m{index}") for index in range(num_endpoints)]
    return JudgeConfig(**{"endpoints": endpoints, "rubric": "fairness", "backoff_s": 0.001, **settings})


def make_requests(*completions: str, question: str = "Who?") -> list[JudgeRequest]:
    return [
        JudgeRequest(id=f"{question}{i}", question=question, completion=completion, criterion="fairness")
        for i, completion in enumerate(completions)
    ]


def answers_of(request: ChatRequest) -> dict[str, str]:
    """The answers in a prompt by id, in the order shown."""
    _, fences = read_fences(request.messages[-1].content)
    return {name.split()[1]: text for name, text in fences.items() if name.startswith("completion ")}


def group_verdict(request: ChatRequest, score: Callable[[int, str], Any]) -> str:
    """`score` is told the position and the text; None leaves the id out."""
    nonce, _ = read_fences(request.messages[-1].content)
    scores = {one: score(index, text) for index, (one, text) in enumerate(answers_of(request).items())}
    entries = [{"id": one, "reason": "r", "score": value} for one, value in scores.items() if value is not None]
    return json.dumps({"nonce": nonce, "verdicts": entries[::-1]})


def pair_verdict(request: ChatRequest, better: Callable[[str, str], str | None]) -> str:
    """`better` is told both texts in the order shown and names the better one; None is a tie."""
    nonce, _ = read_fences(request.messages[-1].content)
    ids = answers_of(request)
    winner = better(*ids.values())
    return json.dumps(
        {"nonce": nonce, "reason": "r", "winner": next((i for i, t in ids.items() if t == winner), "tie")}
    )


def judge(
    config: JudgeConfig, script: Callable[[ChatRequest], str], requests: list[JudgeRequest]
) -> tuple[list[Judgement], ScriptedClient, dict[str, int]]:
    client = ScriptedClient(script)
    pool = JudgePool(client=client, config=config)
    return asyncio.run(pool.judge(requests)), client, pool.stats().counts


def scores(judgements: list[Judgement]) -> list[float | None]:
    return [one.value if isinstance(one, Scored) else None for one in judgements]


def by_quality(request: ChatRequest) -> str:
    return group_verdict(request, lambda index, text: QUALITY[text])


def test_a_group_is_one_question_in_two_opposite_orders() -> None:
    completions = ["fair", "best", "bad", "good"]
    judgements, client, _ = judge(make_config(mode="groupwise"), by_quality, make_requests(*completions))
    assert scores(judgements) == [0.5, 1.0, 0.0, 0.75]
    orders = [list(answers_of(request).values()) for request in client.requests]
    assert len(orders) == 2
    assert orders[0] == orders[1][::-1]
    assert sorted(orders[0]) == sorted(completions)


def test_two_orders_take_a_positions_advantage_out() -> None:
    def favours_early(request: ChatRequest) -> str:
        return group_verdict(request, lambda index, text: 0.9 - 0.2 * index)

    judgements, _, _ = judge(make_config(mode="groupwise"), favours_early, make_requests("fair", "best", "bad", "good"))
    # positions 0..3 give 0.9, 0.7, 0.5, 0.3; each text stands at i and at 3 - i: the mean is 0.6 for all
    assert scores(judgements) == pytest.approx([0.6] * 4)


def test_the_order_of_sampling_does_not_change_what_is_asked() -> None:
    _, first, _ = judge(make_config(mode="groupwise"), by_quality, make_requests("fair", "best", "bad"))
    _, second, _ = judge(make_config(mode="groupwise"), by_quality, make_requests("bad", "fair", "best"))
    orders = [[list(answers_of(r).values()) for r in client.requests] for client in (first, second)]
    assert sorted(orders[0]) == sorted(orders[1])


def test_equal_completions_are_shown_once_and_score_the_same() -> None:
    judgements, client, _ = judge(make_config(mode="groupwise"), by_quality, make_requests("best", "bad", "best"))
    assert scores(judgements) == [1.0, 0.0, 1.0]
    assert [len(answers_of(request)) for request in client.requests] == [2, 2]
    assert [one.origin for one in judgements if isinstance(one, Scored)] == ["asked", "asked", "shared"]


def test_an_id_that_is_missing_twice_costs_only_its_own_row() -> None:
    def forgets_bad(request: ChatRequest) -> str:
        return group_verdict(request, lambda index, text: None if text == "bad" else QUALITY[text])

    judgements, client, _ = judge(make_config(mode="groupwise"), forgets_bad, make_requests("fair", "bad", "good"))
    assert scores(judgements) == [0.5, None, 0.75]
    assert isinstance(judgements[1], Failed)
    assert (judgements[1].kind, judgements[1].fault) == ("invalid_verdict", "judge")
    assert len(client.requests) == 4  # two orders, each asked once more
    assert "lacks 1 of 3 ids" in client.requests[-1].messages[-1].content


def test_an_id_that_is_missing_once_is_filled_from_the_second_reply() -> None:
    seen: set[tuple[str, ...]] = set()

    def forgets_at_first(request: ChatRequest) -> str:
        order = tuple(answers_of(request).values())
        is_first, _ = order not in seen, seen.add(order)
        return group_verdict(request, lambda index, text: None if is_first and text == "bad" else QUALITY[text])

    judgements, _, _ = judge(make_config(mode="groupwise"), forgets_at_first, make_requests("fair", "bad", "good"))
    assert scores(judgements) == [0.5, 0.0, 0.75]


def test_a_refusal_of_a_whole_group_is_no_single_completions_fault() -> None:
    def refuses(request: ChatRequest) -> str:
        raise JudgeRefused("no")

    judgements, _, _ = judge(make_config(mode="groupwise"), refuses, make_requests("fair", "bad"))
    assert [(one.kind, one.fault) for one in judgements if isinstance(one, Failed)] == [("refused", "judge")] * 2


def test_a_group_too_large_for_a_call_is_split_around_a_shared_anchor() -> None:
    completions = [f"answer {index}" for index in range(9)]
    mode = {"type": "groupwise", "permutations": 1, "completions_per_call": 5}

    def by_number(request: ChatRequest) -> str:
        return group_verdict(request, lambda index, text: int(text.split()[1]) / 10)

    judgements, client, _ = judge(make_config(mode=mode), by_number, make_requests(*completions))
    assert scores(judgements) == pytest.approx([index / 10 for index in range(9)])
    shown = [set(answers_of(request).values()) for request in client.requests]
    assert [len(one) for one in shown] == [5, 5]  # 8 beside the anchor, 4 a call
    assert len(shown[0] & shown[1]) == 1


def test_several_groups_in_a_batch_are_kept_apart() -> None:
    requests = [*make_requests("best", "bad", question="A"), *make_requests("bad", "good", question="B")]
    judgements, client, _ = judge(make_config(mode="groupwise"), by_quality, requests)
    assert scores(judgements) == [1.0, 0.0, 0.0, 0.75]
    assert len(client.requests) == 4


def test_pairs_are_shown_in_both_orders_and_scores_are_shares_won() -> None:
    def better(first: str, second: str) -> str | None:
        return max(first, second, key=QUALITY.__getitem__)

    judgements, client, counts = judge(
        make_config(mode="pairwise", scale={"low": 0.0, "high": 10.0}),
        lambda request: pair_verdict(request, better),
        make_requests("fair", "best", "bad"),
    )
    assert scores(judgements) == [5.0, 10.0, 0.0]  # fair wins 1 of 2
    assert len(client.requests) == 6
    assert counts["pairs"] == 3
    assert counts.get("position_contradictions", 0) == 0


def test_a_judge_that_always_prefers_the_first_has_said_nothing() -> None:
    judgements, _, counts = judge(
        make_config(mode="pairwise"),
        lambda request: pair_verdict(request, lambda first, second: first),
        make_requests("fair", "best", "bad"),
    )
    assert scores(judgements) == [0.5] * 3
    assert counts["position_contradictions"] == 3


def test_pairs_around_a_ring_are_fewer() -> None:
    completions = [f"answer {index}" for index in range(8)]
    _, client, _ = judge(
        make_config(mode={"type": "pairwise", "opponents": 1}),
        lambda request: pair_verdict(request, lambda first, second: None),
        make_requests(*completions),
    )
    assert len(client.requests) == 16  # 8 neighbours on the ring, two orders; all against all would be 56


def test_a_completion_without_an_opponent_has_no_score() -> None:
    judgements, client, _ = judge(make_config(mode="pairwise"), lambda request: "", make_requests("fair", "fair"))
    assert scores(judgements) == [None, None]
    assert client.requests == []


def test_costs_of_a_call_are_shared_out_without_remainder() -> None:
    price = {"input": 0.0, "output": 1.0}
    endpoint = EndpointConfig.model_validate({"url": "http://127.0.0.1:9/v1", "model": "m", "price": price})

    class Counting(ScriptedClient):
        async def complete(self, request: ChatRequest) -> Any:
            reply = await super().complete(request)
            usage = Usage(prompt_tokens=101, completion_tokens=50)
            return type(reply)(text=reply.text, finish_reason="stop", usage=usage)

    mode = {"type": "groupwise", "permutations": 1}
    pool = JudgePool(client=Counting(by_quality), config=make_config(endpoints=[endpoint], mode=mode))
    judgements = asyncio.run(pool.judge(make_requests("fair", "bad", "good")))
    assert sorted(one.usage.prompt_tokens for one in judgements if one.usage) == [33, 34, 34]
    assert sum(one.usage.completion_tokens for one in judgements if one.usage) == 50
    assert sum(one.cost or 0.0 for one in judgements) == pytest.approx(50e-6)


def test_a_rubric_for_one_answer_cannot_compare() -> None:
    rubric = Rubric(name="tone", template='{completion} {"nonce": "{nonce}", "score": 1}')
    with pytest.raises(JudgeConfigError, match="groupwise"):
        JudgePool(client=ScriptedClient(by_quality), config=make_config(mode="groupwise"), rubric=rubric)


def test_an_endpoint_that_takes_schemas_is_sent_one() -> None:
    endpoint = EndpointConfig(url="http://127.0.0.1:9/v1", model="m", structured="json_schema")
    _, client, _ = judge(make_config(endpoints=[endpoint], mode="groupwise"), by_quality, make_requests("fair", "bad"))
    schema = client.requests[0].json_schema
    assert schema is not None
    assert list(schema["properties"]) == ["nonce", "verdicts"]
    _, client, _ = judge(make_config(mode="groupwise"), by_quality, make_requests("fair", "bad"))
    assert client.requests[0].json_schema is None


def panel(values: list[float | Exception], **settings: Any) -> Judgement:
    """One completion, judged by as many judges as there are values."""

    def saying(value: float | Exception) -> ScriptedClient:
        def script(request: ChatRequest) -> str:
            if isinstance(value, Exception):
                raise value
            return verdict_for(request, value)

        return ScriptedClient(script)

    config = make_config(len(values), ensemble={"quorum": 2, **settings})
    pool = JudgePool(client=[saying(value) for value in values], config=config)
    (judgement,) = asyncio.run(pool.judge(make_requests("fair")))
    return judgement


@pytest.mark.parametrize(("reduce", "value"), [("mean", 0.5), ("median", 0.4), ("min", 0.1), ("majority", None)])
def test_a_panels_scores_become_one(reduce: str, value: float | None) -> None:
    judgement = panel([0.1, 0.4, 1.0], reduce=reduce)
    if value is None:
        assert isinstance(judgement, Failed)
        assert judgement.kind == "disagreement"
    else:
        assert isinstance(judgement, Scored)
        assert judgement.value == pytest.approx(value)
        # mean 0.5: ((0.4)^2 + (0.1)^2 + (0.5)^2) / 3 = 0.14
        assert judgement.disagreement == pytest.approx(0.14**0.5)
        assert judgement.endpoint == "m0+m1+m2"


def test_a_majority_is_more_than_half_of_those_who_answered() -> None:
    judgement = panel([1.0, 1.0, 0.0], reduce="majority")
    assert isinstance(judgement, Scored)
    assert judgement.value == 1.0


def test_a_panel_below_its_quorum_gives_no_number() -> None:
    judgement = panel([1.0, JudgeRefused("no"), ZeroDivisionError("oops")])
    assert isinstance(judgement, Failed)
    assert (judgement.kind, judgement.fault) == ("quorum", "judge")
    assert "1 of 3" in judgement.detail


def test_a_panel_at_its_quorum_does_without_the_one_that_failed() -> None:
    judgement = panel([1.0, JudgeRefused("no"), 0.5])
    assert isinstance(judgement, Scored)
    assert judgement.value == 0.75


def test_a_panel_that_refuses_as_one_blames_the_completion() -> None:
    judgement = panel([JudgeRefused("no"), JudgeRefused("never")])
    assert isinstance(judgement, Failed)
    assert judgement.fault == "completion"


def test_judges_too_far_apart_give_no_number() -> None:
    judgement = panel([0.0, 1.0], max_disagreement=0.4)
    assert isinstance(judgement, Failed)
    assert judgement.kind == "disagreement"
    assert isinstance(panel([0.0, 0.8], max_disagreement=0.4), Scored)


def test_money_that_is_unknown_for_one_judge_is_unknown_for_the_panel() -> None:
    known = Scored(value=1.0, raw="", usage=None, attempts=1, cost=0.5)
    unknown = Scored(value=1.0, raw="", usage=None, attempts=1, cost=None)
    assert combine([known, known], EnsembleConfig(quorum=2)).cost == 1.0
    assert combine([known, unknown], EnsembleConfig(quorum=2)).cost is None
