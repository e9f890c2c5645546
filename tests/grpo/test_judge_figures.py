"""A step's line of metrics.jsonl says what its judges did, and no more than that."""

from __future__ import annotations

from dataclasses import replace

from grpo.judge_figures import JudgeFigures, added_up
from judges.lane import LaneStats
from judges.pool import PoolStats
from judges.types import Usage

LANE = LaneStats(
    endpoint="a",
    calls=10,
    outcomes={"answered": 8, "overloaded": 2},
    extra_calls=2,
    hedges=1,
    limit=4,
    limit_history=(),
    breaker="closed",
    breaker_events=((1.0, "open"), (2.0, "half_open"), (3.0, "closed")),
    usage=Usage(prompt_tokens=1, completion_tokens=1),
    unbelievable_usage=0,
    cost=0.5,
)


class Judge:
    """A reward with a judge behind it."""

    def __init__(self, stats: PoolStats | None) -> None:
        self.now = stats

    def stats(self) -> PoolStats | None:
        return self.now


def test_each_step_gets_what_was_counted_since_the_last() -> None:
    judge = Judge(PoolStats(lanes=(LANE,), outcomes={"scored": 7, "timeout": 1}, counts={"cached": 3}))
    figures = JudgeFigures()
    first = figures.take([judge, object(), list])  # others have no stats
    assert first == {
        "judge/calls": 10,
        "judge/extra_calls": 2,
        "judge/cost": 0.5,
        "judge/breaker_opened": 1,
        "judge/cached": 3,
        "judge/failed/timeout": 1,
    }
    judge.now = PoolStats(
        lanes=(replace(LANE, calls=14, cost=0.75),), outcomes={"scored": 11, "timeout": 1}, counts={"cached": 5}
    )
    second = figures.take([judge])
    assert (second["judge/calls"], second["judge/cost"], second["judge/cached"]) == (4, 0.25, 2)
    assert second["judge/failed/timeout"] == 0


def test_an_opening_of_the_breaker_that_two_rewards_share_is_one_and_another_endpoints_another() -> None:
    def opened(*lanes: LaneStats) -> float:
        judges = [Judge(PoolStats(lanes=(lane,), outcomes={}, counts={})) for lane in lanes]
        return JudgeFigures().take(judges)["judge/breaker_opened"]

    again = replace(LANE, breaker_events=(*LANE.breaker_events, (9.0, "open")))
    assert opened(LANE, LANE) == 1
    assert opened(again, again) == 2
    assert opened(LANE, replace(LANE, endpoint="b")) == 2


def test_without_judges_there_are_no_figures() -> None:
    assert JudgeFigures().take([object(), Judge(None)]) == {}


def test_the_ranks_figures_add_up() -> None:
    assert added_up([{"judge/calls": 2, "judge/cached": 1}, {"judge/calls": 3}]) == {
        "judge/cached": 1,
        "judge/calls": 5,
    }
