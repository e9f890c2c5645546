"""The circuit breaker against a model of it: whatever happens in whatever order, it lets through what it should."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from judges.config import BreakerConfig
from judges.limits.breaker import DENIED_OPEN_S, Breaker, Ticket

CONFIG = BreakerConfig(failure_share=0.5, min_calls=4, window_s=30.0, open_s=5.0)


class BreakerMachine(RuleBasedStateMachine):
    """Calls begin and end at random times; the model remembers what each spell has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.breaker = Breaker(CONFIG, clock=lambda: self.now)
        self.out: list[Ticket] = []
        self.window: list[tuple[float, bool]] = []
        self.state = "closed"
        self.spell = 0
        self.open_until = 0.0
        self.open_s = CONFIG.open_s
        self.is_probe_out = False
        self.spell_of: dict[int, int] = {}

    def enter(self, state: str) -> None:
        self.state, self.window, self.is_probe_out = state, [], False
        self.spell += 1

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 31.0, DENIED_OPEN_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def ask(self) -> None:
        if self.state == "open" and self.now >= self.open_until:
            self.enter("half_open")
        may_call = self.state == "closed" or (self.state == "half_open" and not self.is_probe_out)
        ticket = self.breaker.admit()
        assert (ticket is not None) == may_call
        if ticket is not None:
            self.is_probe_out = self.state == "half_open"
            self.out.append(ticket)
            self.spell_of[id(ticket)] = self.spell

    def take(self, data: st.DataObject) -> tuple[Ticket, bool]:
        ticket = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        return ticket, self.spell_of.pop(id(ticket)) == self.spell

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def answered(self, data: st.DataObject) -> None:
        ticket, is_current = self.take(data)
        self.breaker.on_success(ticket)
        if is_current and self.state == "half_open":
            self.open_s = CONFIG.open_s
            self.enter("closed")
        elif is_current:
            self.window.append((self.now, True))

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def failed(self, data: st.DataObject) -> None:
        ticket, is_current = self.take(data)
        self.breaker.on_failure(ticket)
        if not is_current:
            return
        if self.state == "half_open":
            self.open_s = min(2 * self.open_s, 8 * CONFIG.open_s)
            self.open_until = self.now + self.open_s
            self.enter("open")
            return
        self.window.append((self.now, False))
        recent = [was_answered for time, was_answered in self.window if time > self.now - CONFIG.window_s]
        if len(recent) >= CONFIG.min_calls and recent.count(False) >= CONFIG.failure_share * len(recent):
            self.open_until = self.now + self.open_s
            self.enter("open")

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def gone_without_outcome(self, data: st.DataObject) -> None:
        ticket, is_current = self.take(data)
        self.breaker.on_no_outcome(ticket)
        if is_current and self.state == "half_open":
            self.is_probe_out = False

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def denied(self, data: st.DataObject) -> None:
        ticket, _ = self.take(data)
        was_denied = self.breaker.is_denied and self.state == "open"
        self.breaker.on_denied(ticket)
        if not was_denied:
            self.open_until = self.now + DENIED_OPEN_S
            self.enter("open")

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert self.breaker.state == self.state
        if self.state == "closed":
            assert self.breaker.wait_s() == 0.0
        if self.state == "open" and not self.breaker.is_denied:
            assert self.breaker.wait_s() == max(0.0, self.open_until - self.now)


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_waiting_for_an_endpoint_that_has_denied_us_is_hopeless_until_its_time_is_up() -> None:
    now = 0.0
    breaker = Breaker(CONFIG, clock=lambda: now)
    ticket = breaker.admit()
    assert ticket is not None
    breaker.on_denied(ticket)
    assert breaker.wait_s() == float("inf")
    assert breaker.admit() is None
    now = DENIED_OPEN_S
    assert breaker.wait_s() == 0.0
    assert breaker.admit() is not None  # one probe: the bill may have been paid
