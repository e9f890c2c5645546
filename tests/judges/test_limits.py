"""The limits one by one, on a clock that the test turns: rates, concurrency, retry budget, latencies."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_clock import run_virtually

from judges.config import AdaptiveConcurrency, RetryBudgetConfig
from judges.limits.concurrency import AdaptiveLimit, Slots
from judges.limits.latency import Latencies
from judges.limits.rates import MAX_PAUSE_S, Bucket, RateLimiter
from judges.limits.retry_budget import RetryBudget


class Clock:
    """Stands still until it is turned."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def grants(amounts: list[float], arrivals: list[float], *, tokens_per_minute: float) -> list[tuple[float, int]]:
    """(time since the start, index) at which requests that arrive so many seconds apart may send their tokens."""
    granted: list[tuple[float, int]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        limiter = RateLimiter(requests_per_minute=None, tokens_per_minute=tokens_per_minute, clock=loop.time)

        async def one(index: int) -> None:
            await limiter.acquire(amounts[index])
            granted.append((loop.time() - started, index))

        async with asyncio.TaskGroup() as tasks:
            for index, gap in enumerate(arrivals):
                await asyncio.sleep(gap)
                tasks.create_task(one(index))

    run_virtually(main())
    return granted


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1, 5000), st.floats(0, 3)), min_size=1, max_size=30),
    st.floats(60, 60_000),
)
def test_tokens_are_granted_in_order_and_never_above_the_rate(
    requests: list[tuple[float, float]], tokens_per_minute: float
) -> None:
    amounts, arrivals = [amount for amount, _ in requests], [gap for _, gap in requests]
    granted = grants(amounts, arrivals, tokens_per_minute=tokens_per_minute)
    assert [index for _, index in granted] == list(range(len(amounts)))
    rate, capacity = tokens_per_minute / 60, max(1.0, tokens_per_minute / 12)  # 5 of 60 seconds
    for first in range(len(granted)):
        for last in range(first, len(granted)):
            # what is granted within a window, its last grant left out: that one may go into debt
            window = sum(amounts[index] for _, index in granted[first:last])
            assert window <= capacity + rate * (granted[last][0] - granted[first][0]) + max(amounts) * 1e-6 + 1e-3 or (
                max(amounts[first:last], default=0) > capacity
            )


def test_a_big_request_is_not_overtaken_by_small_ones() -> None:
    # 600 a minute = 10 a second, 50 kept. 50 leave at once; the 40 need 4 s; the 1s behind it come after, 0.1 s each.
    granted = grants([50, 40, 1, 1], [0, 0, 0, 0], tokens_per_minute=600)
    assert [index for _, index in granted] == [0, 1, 2, 3]
    assert [round(time, 3) for time, _ in granted] == [0.0, 4.0, 4.1, 4.2]


def test_a_request_larger_than_the_bucket_goes_into_debt_which_the_next_one_waits_for() -> None:
    # 50 kept: 170 leave from a full bucket, level -120; for 10 it must rise by 130 = 13 s.
    granted = grants([170, 10], [0, 0], tokens_per_minute=600)
    assert [round(time, 3) for time, _ in granted] == [0.0, 13.0]


def test_a_cancelled_wait_takes_nothing_and_lets_the_next_one_pass() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        limiter = RateLimiter(requests_per_minute=60, tokens_per_minute=600, clock=loop.time)
        for _ in range(5):
            await limiter.acquire(10)  # 5 requests and 50 tokens: both buckets are empty
        started = loop.time()
        given_up = asyncio.create_task(limiter.acquire(50))
        next_one = asyncio.create_task(limiter.acquire(10))
        await asyncio.sleep(0.5)
        given_up.cancel()
        await next_one
        return loop.time() - started

    assert run_virtually(main()) == pytest.approx(1.0, abs=1e-3)  # 10 tokens at 10 a second, 1 request at 1 a second


def test_usage_below_the_estimate_lets_the_next_request_go_at_once() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        limiter = RateLimiter(requests_per_minute=None, tokens_per_minute=600, clock=loop.time)
        await limiter.acquire(50)
        waiting = asyncio.create_task(limiter.acquire(40))
        await asyncio.sleep(1.0)  # 10 have come in
        started = loop.time()
        limiter.true_up(50, 20)  # 30 come back: 40
        await waiting
        return loop.time() - started

    assert run_virtually(main()) < 1e-3


def test_a_shorter_pause_never_ends_a_longer_one_and_none_lasts_for_ever() -> None:
    clock = Clock()
    limiter = RateLimiter(requests_per_minute=None, tokens_per_minute=None, clock=clock)
    limiter.pause(30)
    limiter.pause(1)
    assert limiter.pause_left_s == 30
    limiter.pause(1e9)
    assert limiter.pause_left_s == MAX_PAUSE_S


def test_a_bucket_that_is_given_back_more_than_it_holds_is_full_and_no_more() -> None:
    bucket = Bucket(600, clock=Clock())
    bucket.take(-1000)
    assert bucket.level == 50


def adaptive(clock: Clock, **bounds: int) -> AdaptiveLimit:
    return AdaptiveLimit(AdaptiveConcurrency(**{"start": 8, "minimum": 1, "maximum": 64, **bounds}), clock=clock)


def clean_round(limit: AdaptiveLimit, *, in_flight: int | None = None) -> None:
    limit.on_in_flight(limit.limit if in_flight is None else in_flight)
    for _ in range(limit.limit):
        limit.on_success()


def test_the_limit_doubles_until_the_first_429_and_then_creeps() -> None:
    clock = Clock()
    limit = adaptive(clock)
    clean_round(limit)
    clean_round(limit)
    assert limit.limit == 32
    limit.on_overload()
    assert limit.limit == 25  # 32 x 0.8, rounded down
    clock.now += 15.0
    clean_round(limit)
    assert limit.limit == 26  # +5 %, at least one


def test_one_spell_of_429s_cuts_once_and_the_next_one_again() -> None:
    clock = Clock()
    limit = adaptive(clock, start=20)
    for _ in range(20):  # all that were in flight
        limit.on_overload()
    assert limit.limit == 16
    clock.now += 15.0
    limit.on_overload()
    assert limit.limit == 12


def test_successes_in_the_cooldown_count_for_nothing() -> None:
    clock = Clock()
    limit = adaptive(clock, start=10)
    limit.on_overload()
    clean_round(limit)
    clean_round(limit)
    assert limit.limit == 8


def test_idle_slots_prove_nothing() -> None:
    limit = adaptive(Clock(), start=10)
    clean_round(limit, in_flight=7)
    assert limit.limit == 10
    clean_round(limit, in_flight=8)
    assert limit.limit == 20


def test_sustained_429s_bring_the_limit_to_its_minimum_and_no_lower() -> None:
    clock = Clock()
    limit = adaptive(clock, start=64, minimum=2)
    for _ in range(40):  # 10 minutes
        limit.on_overload()
        clock.now += 15.0
    assert limit.limit == 2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["success", "overload", "busy", "time"]), max_size=300))
def test_the_limit_stays_within_its_bounds_and_its_history_tells_every_change(events: list[str]) -> None:
    clock = Clock()
    limit = adaptive(clock, start=4, minimum=2, maximum=20)
    for event in events:
        match event:
            case "success":
                limit.on_success()
            case "overload":
                limit.on_overload()
            case "busy":
                limit.on_in_flight(limit.limit)
            case "time":
                clock.now += 10.0
        assert 2 <= limit.limit <= 20
        assert limit.history[-1][1] == limit.limit


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0.01, 2), st.booleans()), min_size=1, max_size=30))
def test_slots_are_handed_out_in_order_and_cancelled_waits_lose_none(jobs: list[tuple[float, float, bool]]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        slots = Slots(AdaptiveLimit.fixed(3, clock=loop.time))
        entered: list[int] = []
        most = 0

        async def work(index: int, seconds: float) -> None:
            nonlocal most
            await slots.acquire()
            entered.append(index)
            most = max(most, slots.in_flight)
            try:
                await asyncio.sleep(seconds)
            finally:
                slots.release()

        tasks = []
        for index, (gap, seconds, is_cancelled) in enumerate(jobs):
            task = asyncio.create_task(work(index, seconds))
            if is_cancelled:
                loop.call_later(seconds / 2, task.cancel)
            tasks.append(task)
            await asyncio.sleep(gap)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert entered == sorted(entered)
        assert most <= 3
        assert slots.in_flight == 0

    run_virtually(main())


def test_extra_tries_are_a_share_of_the_first_ones_and_a_floor_within_the_window() -> None:
    clock = Clock()
    budget = RetryBudget(RetryBudgetConfig(share=0.1, floor=2, window_s=60.0), clock=clock)
    for _ in range(30):
        budget.note_first()
    assert [budget.take() for _ in range(6)] == [True] * 5 + [False]  # 2 + 30 / 10
    assert budget.wait_s() == 60.0
    clock.now += 60.0
    assert [budget.take() for _ in range(3)] == [
        True,
        True,
        False,
    ]  # what was earned has expired too: the floor is left


def test_the_default_share_is_enough_where_one_try_in_ten_fails_and_bounds_an_outage() -> None:
    clock = Clock()
    budget = RetryBudget(RetryBudgetConfig(), clock=clock)
    for _ in range(2000):
        budget.note_first()
    # 10% of 2,000, 10% of those again, and so on: 2,000 * 0.1 / 0.9 = 222.2 extra tries
    assert all(budget.take() for _ in range(223))
    num_more = 0
    while budget.take():
        num_more += 1
    assert 223 + num_more == 10 + 400  # the floor, and a fifth of the first tries


def test_without_any_budget_waiting_is_hopeless() -> None:
    budget = RetryBudget(RetryBudgetConfig(share=0.0, floor=0), clock=Clock())
    assert budget.wait_s() == math.inf


def test_a_quantile_is_of_the_last_200_calls() -> None:
    latencies = Latencies()
    assert latencies.quantile(0.95) is None
    for _ in range(300):
        latencies.note(99.0)
    for number in range(200):
        latencies.note(number / 100)
    assert latencies.quantile(0.95) == 1.90
