"""The one guarded way to call a reward: whatever goes wrong is a missing score with a reason, never a number."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
import time
from fractions import Fraction

import numpy as np
import pytest

from rewards import RewardError, RewardInput, RewardUnavailable, Score, check_reward_ready, close_reward, score_group


def make_inputs(count: int = 2) -> list[RewardInput]:
    return [RewardInput(prompt_id="p", prompt="q", completion=f"c{i}") for i in range(count)]


def scores_of(reward, count: int = 2) -> list[Score]:
    return asyncio.run(score_group(reward, make_inputs(count)))


class ProtocolReward:
    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        return [Score(value=float(i), reason=one.completion) for i, one in enumerate(inputs)]


class AsyncCallable:
    async def __call__(self, inputs: list[RewardInput]) -> list[float]:
        return [0.5 for _ in inputs]


async def async_function(inputs: list[RewardInput], value: float = 0.5) -> list[float]:
    return [value for _ in inputs]


def test_protocol_object_keeps_values_reasons_and_order():
    assert scores_of(ProtocolReward()) == [Score(value=0.0, reason="c0"), Score(value=1.0, reason="c1")]


@pytest.mark.parametrize(
    "reward",
    [
        async_function,
        AsyncCallable(),
        functools.partial(async_function, value=0.5),
        lambda inputs: async_function(inputs),
        lambda inputs: [0.5] * len(inputs),
        lambda inputs: np.full(len(inputs), 0.5, dtype=np.float32),
        lambda inputs: (Fraction(1, 2),) * len(inputs),
    ],
    ids=["async function", "async callable", "partial", "sync returning coroutine", "list", "numpy", "fractions"],
)
def test_every_plain_form_of_reward_gives_plain_float_scores(reward):
    scores = scores_of(reward)
    assert [score.value for score in scores] == [0.5, 0.5]
    assert {type(score.value) for score in scores} == {float}


def test_no_inputs_is_no_call():
    def reward(inputs):
        raise AssertionError("called")

    assert asyncio.run(score_group(reward, [])) == []


@pytest.mark.parametrize("answer", [math.nan, math.inf, -math.inf, True, "1", np.bool_(True), 10**400, [1.0], 1j])
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: Score(value=value, reason="why")])
def test_what_is_no_finite_number_is_missing_and_its_neighbour_is_kept(answer, wrap):
    bad, good = scores_of(lambda inputs: [wrap(answer), 1.0])
    assert bad.value is None
    assert bad.reason
    assert good == Score(value=1.0)


def test_none_without_a_reason_gets_one():
    assert all(score.value is None and score.reason for score in scores_of(lambda inputs: [None, Score(value=None)]))


@pytest.mark.parametrize("answer", [None, 1.0, "ab", {"a": 1.0, "b": 2.0}, {1.0, 2.0}, (one for one in (1.0, 2.0))])
def test_what_is_no_list_is_missing_for_the_whole_group(answer):
    for score in scores_of(lambda inputs: answer):
        assert score.value is None
        assert "expected a list of 2 scores" in score.reason


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_wrong_number_of_scores_is_missing_for_the_whole_group(length):
    for score in scores_of(lambda inputs: [1.0] * length):
        assert score == Score(value=None, reason=f"the reward answered {length} scores for 2 completions")


def test_a_reward_that_shortens_its_list_does_not_shift_the_scores():
    def reward(inputs: list[RewardInput]) -> list[float]:
        inputs.pop()
        return [1.0 for _ in inputs]

    assert [score.value for score in scores_of(reward)] == [None, None]


def raise_value_error(inputs: list[RewardInput]) -> list[float]:
    raise ValueError("the judge said nonsense")


async def raise_in_a_group(inputs: list[RewardInput]) -> list[float]:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.to_thread(raise_value_error, inputs))
    return []


def raise_stop_iteration(inputs: list[RewardInput]) -> list[float]:
    return [next(iter(()))]


@pytest.mark.parametrize(
    ("reward", "cause"),
    [
        (raise_value_error, "ValueError: the judge said nonsense"),
        (raise_in_a_group, "ValueError: the judge said nonsense"),
        (raise_stop_iteration, "StopIteration"),
        (object(), "not a reward"),
    ],
)
def test_a_reward_that_raises_is_missing_with_the_exception_named(reward, cause):
    for score in scores_of(reward):
        assert score.value is None
        assert cause in score.reason


def test_a_long_exception_is_cut():
    def reward(inputs):
        raise ValueError("x" * 10_000)

    assert len(scores_of(reward)[0].reason) == 500


def test_cancellation_is_not_swallowed():
    async def reward(inputs: list[RewardInput]) -> list[float]:
        await asyncio.sleep(60)
        return [1.0 for _ in inputs]

    async def cancelled() -> None:
        task = asyncio.create_task(score_group(reward, make_inputs()))
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())


def test_a_sync_reward_runs_beside_the_loop():
    loop_went_on = threading.Event()

    def reward(inputs: list[RewardInput]) -> list[float]:
        return [1.0 if loop_went_on.wait(timeout=10) else 0.0 for _ in inputs]

    async def both() -> list[Score]:
        task = asyncio.create_task(score_group(reward, make_inputs()))
        await asyncio.sleep(0.01)
        loop_went_on.set()
        return await task

    started = time.monotonic()
    assert [score.value for score in asyncio.run(both())] == [1.0, 1.0]
    assert time.monotonic() - started < 5


class Hooked:
    def __init__(self, problem: Exception | None = None) -> None:
        self.problem = problem
        self.calls: list[str] = []

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        return []

    async def check(self) -> None:
        self.calls.append("check")
        if self.problem:
            raise self.problem

    async def aclose(self) -> None:
        self.calls.append("aclose")


def test_hooks_are_called_where_they_exist():
    reward = Hooked()
    asyncio.run(check_reward_ready(reward))
    asyncio.run(close_reward(reward))
    assert reward.calls == ["check", "aclose"]
    asyncio.run(check_reward_ready(async_function))
    asyncio.run(close_reward(async_function))


def test_check_keeps_our_errors_and_wraps_foreign_ones():
    with pytest.raises(RewardUnavailable, match="no answer"):
        asyncio.run(check_reward_ready(Hooked(RewardUnavailable("no answer"))))
    with pytest.raises(RewardError, match=r"Hooked.check\(\) failed with OSError: no route"):
        asyncio.run(check_reward_ready(Hooked(OSError("no route"))))
