"""What the judges of a run did, as figures of metrics.jsonl. Rewards are known by their `stats()`; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from grpo import metrics as names
from judges.pool import PoolStats

_DECIMALS = 12
"""Finer than a token's price; so what a sum was added up from, in what order and in how many sessions, is not seen."""


class JudgeFigures:
    """Turns what pools count since their beginning into what they did since the last `take`."""

    def __init__(self) -> None:
        self._told: dict[str, float] = {}

    def take(self, rewards: Iterable[object]) -> dict[str, float]:
        """Metric name -> count or money since the last call. Empty where no reward asks a judge."""
        stats = [one for reward in rewards if isinstance(one := getattr(reward, "stats", lambda: None)(), PoolStats)]
        total = added_up(_totals(one) for one in stats)
        if stats:
            # rewards that ask one endpoint share its breaker: an opening that all of them saw is one
            opened = {(lane.endpoint, e) for one in stats for lane in one.lanes for e in lane.breaker_events}
            total[names.JUDGE_BREAKER_OPENED] = sum(state == "open" for _, (_, state) in opened)
        new = {name: value - self._told.get(name, 0.0) for name, value in total.items()}
        self._told = total
        return new


def added_up(of_ranks: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The figures of all ranks together: each scores its own groups."""
    total: dict[str, float] = {}
    for figures in of_ranks:
        for name, value in figures.items():
            total[name] = total.get(name, 0.0) + value
    return {name: round(value, _DECIMALS) for name, value in sorted(total.items())}


def _totals(stats: PoolStats) -> dict[str, float]:
    lanes = stats.lanes
    totals: dict[str, float] = {
        names.JUDGE_CALLS: sum(lane.calls for lane in lanes),
        names.JUDGE_EXTRA_CALLS: sum(lane.extra_calls for lane in lanes),
        names.JUDGE_COST: sum(lane.cost for lane in lanes),
    }
    totals |= {names.judge_count_name(name): count for name, count in stats.counts.items()}
    totals |= {
        names.judge_failed_name(outcome): count for outcome, count in stats.outcomes.items() if outcome != "scored"
    }
    return totals
