"""When an endpoint is left alone, and who may try it again. A pure state machine: no sleeping, no asyncio.

closed  --(failure share reached, or denied)-->  open  --(time is up, first to ask)-->  half_open
half_open  --(the probe is answered)-->  closed        half_open  --(the probe fails)-->  open, for longer
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from judges.config import BreakerConfig

State: TypeAlias = Literal["closed", "open", "half_open"]

MAX_LENGTHENING = 8
DENIED_OPEN_S = 60.0
"""After a refused key or an unpaid bill: nobody waits so long, but a later batch finds out whether it was mended."""
PROBE_POLL_S = 0.25
"""While a probe is out nobody knows for how long: seconds between two looks."""
EVENTS_KEPT = 200


@dataclass(frozen=True, slots=True)
class Ticket:
    """Leave to make one call; its outcome is reported with it."""

    generation: int
    """Which spell of the breaker it belongs to: outcomes of an earlier spell say nothing about this one."""


class Breaker:
    """Owns one endpoint's state. Use: `ticket = breaker.admit()`; where it is not None, call, and report the outcome.

    Every ticket must come back through `on_success`, `on_failure`, `on_denied` or `on_no_outcome`.
    """

    def __init__(self, config: BreakerConfig, *, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._outcomes: deque[tuple[float, bool]] = deque()  # (time, was answered)
        self._generation = 0
        self._open_until = float("-inf")
        self._open_s = config.open_s
        self._is_probe_out = False
        self.is_denied = False
        """Opened by a refused key or an unpaid bill: waiting does not help."""
        self.state: State = "closed"
        """closed: everybody calls; open: nobody; half_open: one call probes."""
        self.events: deque[tuple[float, State]] = deque(maxlen=EVENTS_KEPT)
        """(time, state) at each change."""

    def admit(self) -> Ticket | None:
        """Leave to make a call now, or None."""
        if self.state == "open" and self._clock() >= self._open_until:
            self._enter("half_open")
        if self.state == "open" or (self.state == "half_open" and self._is_probe_out):
            return None
        self._is_probe_out = self.state == "half_open"
        return Ticket(self._generation)

    def wait_s(self) -> float:
        """Seconds until it is worth asking for leave (again); inf where waiting does not help."""
        if self.state != "open":
            return PROBE_POLL_S if self._is_probe_out else 0.0
        left_s = max(0.0, self._open_until - self._clock())
        return float("inf") if self.is_denied and left_s > 0 else left_s

    def on_success(self, ticket: Ticket) -> None:
        """The call was answered."""
        if ticket.generation != self._generation:
            return
        if self.state == "half_open":
            self._close()
        else:
            self._note(was_answered=True)

    def on_failure(self, ticket: Ticket) -> None:
        """The call failed by the endpoint's doing (no 429)."""
        if ticket.generation != self._generation:
            return
        if self.state == "half_open":
            self._open_s = min(self._open_s * 2, self._config.open_s * MAX_LENGTHENING)
            self._open(self._open_s)
            return
        self._note(was_answered=False)
        failures = sum(not was_answered for _, was_answered in self._outcomes)
        is_enough = len(self._outcomes) >= self._config.min_calls
        if is_enough and failures >= self._config.failure_share * len(self._outcomes):
            self._open(self._open_s)

    def on_denied(self, ticket: Ticket) -> None:
        """The endpoint takes nothing from us any more; also what older calls learn counts."""
        if not self.is_denied or self.state != "open":
            self._open(DENIED_OPEN_S, is_denied=True)

    def on_no_outcome(self, ticket: Ticket) -> None:
        """The call was cancelled, or met a 429: nothing was learnt of the endpoint's health."""
        if ticket.generation == self._generation and self.state == "half_open":
            self._is_probe_out = False  # the next one probes

    def _note(self, *, was_answered: bool) -> None:
        now = self._clock()
        self._outcomes.append((now, was_answered))
        while self._outcomes and self._outcomes[0][0] <= now - self._config.window_s:
            self._outcomes.popleft()

    def _open(self, seconds: float, *, is_denied: bool = False) -> None:
        self._open_until = self._clock() + seconds
        self.is_denied = is_denied
        self._enter("open")

    def _close(self) -> None:
        self._open_s = self._config.open_s
        self.is_denied = False
        self._enter("closed")

    def _enter(self, state: State) -> None:
        self.state = state
        self._generation += 1
        self._is_probe_out = False
        self._outcomes.clear()
        self.events.append((self._clock(), state))
