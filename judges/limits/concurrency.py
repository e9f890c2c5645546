"""How many calls may be in flight at one endpoint: found out by asking more until it says "too many".

The rule is that of TCP (additive increase, multiplicative decrease; Chiu & Jain 1989), after a slow start that doubles.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from judges.config import AdaptiveConcurrency

CUT = 0.8
GROWTH = 1.05
SATURATION = 0.8
"""Share of the limit that a round must have used before the limit grows: idle slots prove nothing."""
HISTORY_LENGTH = 1000


class AdaptiveLimit:
    """A limit that grows after clean rounds and is cut once per spell of 429s.

    A round is as many successes as the limit. What the endpoint asks us to wait is no business of this class: a long
    Retry-After must not stop the limit from growing again.
    """

    def __init__(self, config: AdaptiveConcurrency, *, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._is_slow_start = True
        self._cooldown_ends = float("-inf")
        self._successes = 0
        self._peak = 0
        self.limit = config.start
        """Calls that may be in flight."""
        self.history: deque[tuple[float, int]] = deque([(clock(), config.start)], maxlen=HISTORY_LENGTH)
        """(time, limit) at each change."""

    @classmethod
    def fixed(cls, limit: int, *, clock: Callable[[], float]) -> AdaptiveLimit:
        """A limit that never changes."""
        return cls(AdaptiveConcurrency(start=limit, minimum=limit, maximum=limit), clock=clock)

    def on_in_flight(self, count: int) -> None:
        """So many calls are in flight now."""
        self._peak = max(self._peak, count)

    def on_success(self) -> None:
        """A call was answered."""
        if self._clock() < self._cooldown_ends:
            return
        self._successes += 1
        if self._successes >= self.limit:
            self._end_round()

    def on_overload(self) -> None:
        """A call was answered with 429."""
        now = self._clock()
        if now < self._cooldown_ends:
            return  # the calls sent before the cut belong to the same spell
        self._is_slow_start = False
        self._cooldown_ends = now + self._config.cooldown_s
        self._successes, self._peak = 0, 0
        self._set(min(int(self.limit * CUT), self.limit - 1))

    def _end_round(self) -> None:
        was_saturated = self._peak >= SATURATION * self.limit
        self._successes, self._peak = 0, 0
        if was_saturated:
            self._set(self.limit * 2 if self._is_slow_start else max(self.limit + 1, int(self.limit * GROWTH)))

    def _set(self, limit: int) -> None:
        limit = min(max(limit, self._config.minimum), self._config.maximum)
        if limit != self.limit:
            self.limit = limit
            self.history.append((self._clock(), limit))


class Slots:
    """Hands out as many slots as the limit says now, in the order they were asked for. A cancelled wait takes none."""

    def __init__(self, limit: AdaptiveLimit) -> None:
        self._limit = limit
        self._waiters: deque[asyncio.Future[None]] = deque()
        self.in_flight = 0
        """Slots taken."""

    async def acquire(self) -> None:
        """Wait for a slot and take it."""
        if not self._waiters and self.in_flight < self._limit.limit:
            self._take()
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                with suppress(ValueError):  # passed over already
                    self._waiters.remove(waiter)
            else:
                self.release()  # it was handed over in the very moment we were cancelled
            raise

    def release(self) -> None:
        """Give a slot back; the limit may have changed meanwhile."""
        self.in_flight -= 1
        self.hand_out()

    def hand_out(self) -> None:
        """Wake as many waiters as there is room for: after a release, or after the limit has grown."""
        while self._waiters and self.in_flight < self._limit.limit:
            waiter = self._waiters.popleft()
            if not waiter.done():  # a cancelled one takes none
                self._take()
                waiter.set_result(None)

    def _take(self) -> None:
        self.in_flight += 1
        self._limit.on_in_flight(self.in_flight)
