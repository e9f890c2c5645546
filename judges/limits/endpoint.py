"""All that bounds how one endpoint is asked, for all who ask it: a provider allows so much to a run, not to each of its
objectives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from judges.config import AdaptiveConcurrency, EndpointConfig, JudgeConfig
from judges.errors import JudgeDenied
from judges.limits.breaker import Breaker
from judges.limits.concurrency import AdaptiveLimit, Slots
from judges.limits.latency import Latencies
from judges.limits.rates import RateLimiter
from judges.limits.retry_budget import RetryBudget


class EndpointLimits:
    """One endpoint's concurrency, rates, breaker and retry budget, and what has been learnt of it."""

    def __init__(self, endpoint: EndpointConfig, config: JudgeConfig, *, clock: Callable[[], float]) -> None:
        self.concurrency = _concurrency(endpoint, config, clock)
        self.slots = Slots(self.concurrency)
        self.rates = RateLimiter(
            requests_per_minute=endpoint.requests_per_minute,
            tokens_per_minute=endpoint.tokens_per_minute,
            clock=clock,
        )
        self.breaker = Breaker(config.breaker, clock=clock)
        self.retry_budget = RetryBudget(config.retry_budget, clock=clock)
        self.latencies = Latencies()
        self.num_overloads = 0
        """429s since the last answer."""
        self.denial: JudgeDenied | None = None
        """Why nobody waits for this endpoint; None while it takes our calls."""


class SharedLimits:
    """Hands out the same `EndpointLimits` to all pools of an event loop that ask the same endpoint by the same rules.

    Use: one for a run, `JudgePool(limits=shared)` for each of its pools. Another loop gets limits of its own: waiters
    and times belong to a loop.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._known: dict[object, EndpointLimits] = {}

    def of(self, endpoint: EndpointConfig, config: JudgeConfig) -> EndpointLimits:
        """The endpoint's limits, within the running loop."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._known = loop, {}
        who = (endpoint.dialect, endpoint.url, endpoint.model, endpoint.api_key)
        rules = (endpoint.requests_per_minute, endpoint.tokens_per_minute, endpoint.max_concurrency)
        key = (who, rules, config.concurrency, config.breaker, config.retry_budget)
        if key not in self._known:
            self._known[key] = EndpointLimits(endpoint, config, clock=loop.time)
        return self._known[key]


def _concurrency(endpoint: EndpointConfig, config: JudgeConfig, clock: Callable[[], float]) -> AdaptiveLimit:
    most = endpoint.max_concurrency or 1024
    if isinstance(config.concurrency, int):
        return AdaptiveLimit.fixed(min(config.concurrency, most), clock=clock)
    bounds: AdaptiveConcurrency = config.concurrency
    capped = {name: min(getattr(bounds, name), most) for name in ("start", "minimum", "maximum")}
    return AdaptiveLimit(bounds.model_copy(update=capped), clock=clock)
