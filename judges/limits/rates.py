"""Requests and tokens per minute: who may send when. First come, first served; a cancelled wait takes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

BURST_S = 5.0
"""Seconds of unused allowance that a bucket keeps: a minute sees at most 65/60 of its allowance."""
ROUNDING = 1e-6
"""Units that are not worth a wait: what filling up leaves undone in floating point."""
MAX_PAUSE_S = 60.0
"""An endpoint's limits are per minute; a longer wish must not stop everybody else for ever."""


class Bucket:
    """An allowance that fills at a steady rate. A level below zero is a debt that has to fill up first."""

    def __init__(self, per_minute: float, *, clock: Callable[[], float]) -> None:
        self.rate = per_minute / 60.0
        """Units a second."""
        self.capacity = max(1.0, self.rate * BURST_S)
        """Units kept at most."""
        self._clock = clock
        self._level = self.capacity
        self._filled_at = clock()

    @property
    def level(self) -> float:
        """Units to be had now."""
        now = self._clock()
        self._level = min(self.capacity, self._level + (now - self._filled_at) * self.rate)
        self._filled_at = now
        return self._level

    def wait_s(self, amount: float) -> float:
        """Seconds until so much may be taken. More than fits waits for a full bucket, and leaves it in debt."""
        missing = min(amount, self.capacity) - self.level
        return missing / self.rate if missing > ROUNDING else 0.0

    def sync_down(self, level: float) -> None:
        """No more than so much is left, whatever was counted here: others may use the same allowance."""
        self._level = min(self.level, level)

    def take(self, amount: float) -> None:
        """Take it, whatever the level; a negative amount gives back."""
        self._level = min(self.capacity, self.level - amount)


class RateLimiter:
    """One endpoint's request bucket, token bucket and pause. Use: `await limiter.acquire(tokens)`, then send.

    Afterwards `true_up(estimated, used)` corrects the estimate by what the endpoint has counted. A pause is told, not
    waited for: who may not send now may have another endpoint to go to.
    """

    def __init__(
        self, *, requests_per_minute: float | None, tokens_per_minute: float | None, clock: Callable[[], float]
    ) -> None:
        self._clock = clock
        self._requests = Bucket(requests_per_minute, clock=clock) if requests_per_minute else None
        self._tokens = Bucket(tokens_per_minute, clock=clock) if tokens_per_minute else None
        self._paused_until = float("-inf")
        self._turn = asyncio.Lock()  # wakes its waiters in their order
        self._changed = asyncio.Event()

    async def acquire(self, tokens: float) -> None:
        """Wait for one request of so many tokens (both buckets at once), behind all who came before."""
        async with self._turn:
            while (wait_s := self._wait_s(tokens)) > 0.0:
                self._changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._changed.wait()
            self._take(requests=1.0, tokens=tokens)

    def give_back(self, tokens: float) -> None:
        """Undo an `acquire` whose request was not sent."""
        self._take(requests=-1.0, tokens=-tokens)

    def true_up(self, estimated: float, used: float) -> None:
        """Replace an estimate by the tokens that were counted."""
        self._take(requests=0.0, tokens=used - estimated)

    def sync_down(self, *, requests: int | None, tokens: int | None) -> None:
        """The endpoint says what its limits still allow; None where it does not. Only believed where it is less than
        what is counted here: calls that are on their way are not in it."""
        if self._requests and requests is not None:
            self._requests.sync_down(requests)
        if self._tokens and tokens is not None:
            self._tokens.sync_down(tokens)

    def pause(self, seconds: float) -> None:
        """Nobody should send for so long, at most MAX_PAUSE_S. A shorter pause never ends a longer one."""
        self._paused_until = max(self._paused_until, self._clock() + min(seconds, MAX_PAUSE_S))

    @property
    def pause_left_s(self) -> float:
        """Seconds of pause that are left; 0 without one."""
        return max(0.0, self._paused_until - self._clock())

    def _wait_s(self, tokens: float) -> float:
        for_request = self._requests.wait_s(1.0) if self._requests else 0.0
        for_tokens = self._tokens.wait_s(tokens) if self._tokens else 0.0
        return max(for_request, for_tokens)

    def _take(self, *, requests: float, tokens: float) -> None:
        if self._requests:
            self._requests.take(requests)
        if self._tokens:
            self._tokens.take(tokens)
        self._changed.set()
