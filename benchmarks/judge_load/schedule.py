"""The least wall time that a number of slots allows: each job, in turn, goes to the slot that is free first."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

LimitHistory = Sequence[tuple[float, int]]
"""(seconds from the start, slots from then on), oldest first; the first at 0."""


def ideal_s(latencies_s: Sequence[float], *, slots: int) -> float:
    """Greedy list scheduling (Graham 1966) with a fixed number of slots."""
    return ideal_under_s(latencies_s, limits=[(0.0, slots)])


def ideal_under_s(latencies_s: Sequence[float], *, limits: LimitHistory) -> float:
    """The same with as many slots as there were at each moment; a job that runs is never stopped."""
    changes = list(limits[1:])
    limit = limits[0][1]
    now = 0.0
    ends: list[float] = []
    for latency_s in latencies_s:
        while len(ends) >= limit:
            if changes and changes[0][0] <= ends[0]:
                change_at, limit = changes.pop(0)
                now = max(now, change_at)
            else:
                now = max(now, heapq.heappop(ends))
        heapq.heappush(ends, now + latency_s)
    return max(ends, default=0.0)
