"""Caps on money. Before a call its upper bound is set aside, afterwards it is replaced by what the call has cost.

So what is spent never exceeds a cap, however many calls are in flight, unless an endpoint bills more than its own
limits allow. Knows no network, no files and no clock.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from judges.audit import Booking
from judges.config import BudgetConfig
from judges.errors import BudgetExceeded

PARTS = 10**12
"""In one unit of money."""


class MoneyBudget:
    """Owns what one judge has spent and what is set aside for its calls in flight. Safe to use from several threads.

    Use: `reservation = budget.reserve(upper_bound)`, then `reservation.settle(cost)`, however the call ends; and
    `budget.begin_step(step)` as each step begins. A call that ends in a later step counts for that one.
    Money is counted in whole 1e-12 of its unit, rounded up: sums of floats would drift past a cap.
    """

    def __init__(
        self,
        config: BudgetConfig,
        *,
        judge: str,
        spent: float = 0.0,
        spent_in_step: Mapping[int, float] | None = None,
        num_processes: int = 1,
    ) -> None:
        """Start with nothing set aside.

        Args:
            config: the caps.
            judge: names the budget in the audit.
            spent: by earlier parts of the same run (`spent_according_to`).
            spent_in_step: step -> how much of it was for this step: one that was cut short has so much less left.
            num_processes: that share the caps; each has an equal part of what is left, since none sees the others.
        """
        self.config = config
        self.judge = judge
        self._num_processes = num_processes
        self._spent_in_step = dict(spent_in_step or {})
        self._run_cap = self._what_is_left(config.per_run, spent)
        self._step_cap = self._what_is_left(config.per_step, 0.0)
        self._changing = threading.Lock()
        self._step: int | None = None
        self._run_spent = 0
        self._step_spent = 0
        self._set_aside = 0
        self._unwritten = 0
        self._unwritten_estimates = 0
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def spent(self) -> float:
        """By this process so far; calls that nobody has counted are in it with their upper bound."""
        return self._run_spent / PARTS

    @property
    def set_aside(self) -> float:
        """For calls in flight."""
        return self._set_aside / PARTS

    def begin_step(self, step: int) -> None:
        """The step's cap is whole again. The same step a second time changes nothing: it is asked again."""
        with self._changing:
            if step != self._step:
                self._step, self._step_spent = step, 0
                self._step_cap = self._what_is_left(self.config.per_step, self._spent_in_step.get(step, 0.0))
                self._wake()

    def _what_is_left(self, cap: float | None, spent: float) -> int | None:
        """This process's part of a cap, of which earlier parts of the run have spent something."""
        return None if cap is None else _down(max(0.0, cap - spent) / self._num_processes)

    async def wait_for_room(self, upper_bound: float) -> None:
        """Wait while only calls in flight stand in the way: they rarely cost what was set aside for them."""
        parts = _up(upper_bound)
        while True:
            with self._changing:
                if self._full_cap(parts) is None or self._full_cap(parts, in_flight=0) is not None:
                    return
                waiter = asyncio.get_running_loop().create_future()
                self._waiters.append(waiter)
            await waiter

    def reserve(self, upper_bound: float) -> Reserved:
        """Set aside the most that a call can cost.

        Raises:
            BudgetExceeded: a cap leaves less.
        """
        parts = _up(upper_bound)
        with self._changing:
            if (cap := self._full_cap(parts)) is not None:
                name, most, spent = cap
                whole = getattr(self.config, name)
                part = f", what is left of {whole:.6g} for this process" if most < _down(whole) else ""
                raise BudgetExceeded(
                    f"budget.{name} is reached: {spent / PARTS:.6g} spent, {self._set_aside / PARTS:.6g} set aside "
                    f"for calls in flight, and the next may cost {upper_bound:.6g}; the cap is {most / PARTS:.6g}{part}"
                )
            self._set_aside += parts
        return Reserved(self, parts)

    def _full_cap(self, parts: int, *, in_flight: int | None = None) -> tuple[str, int, int] | None:
        """(name, cap, spent) of a cap that leaves less. Args: in_flight: set aside for calls; as it is where None."""
        caps = [("per_run", self._run_cap, self._run_spent)]
        if self._step is not None:  # an evaluation is no step
            caps.append(("per_step", self._step_cap, self._step_spent))
        in_flight = self._set_aside if in_flight is None else in_flight
        for name, cap, spent in caps:
            if cap is not None and spent + in_flight + parts > cap:
                return name, cap, spent
        return None

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.get_loop().is_closed():
                waiter.get_loop().call_soon_threadsafe(_end_wait, waiter)

    def take_booking(self) -> Booking | None:
        """What was booked since the last time, for the audit; None where nothing was."""
        with self._changing:
            amount, estimated = self._unwritten, self._unwritten_estimates
            self._unwritten = self._unwritten_estimates = 0
        return Booking(judge=self.judge, amount=amount / PARTS, estimated=estimated / PARTS) if amount else None

    def _settle(self, set_aside: int, cost: float | None) -> None:
        spent = set_aside if cost is None else _up(cost)
        with self._changing:
            self._set_aside -= set_aside
            self._run_spent += spent
            self._step_spent += spent
            self._unwritten += spent
            self._unwritten_estimates += set_aside if cost is None else 0
            self._wake()


class Reserved:
    """Money set aside for one call."""

    __slots__ = ("_budget", "_parts")

    def __init__(self, budget: MoneyBudget, parts: int) -> None:
        self._budget: MoneyBudget | None = budget
        self._parts = parts

    def settle(self, cost: float | None) -> None:
        """The call has ended and cost so much; None where nobody knows: then all that was set aside is spent.

        A cancelled twin is such a call: the endpoint may bill it all the same. A second time changes nothing.
        """
        budget, self._budget = self._budget, None
        if budget is not None:
            budget._settle(self._parts, cost)


def spent_according_to(lines: Iterable[Mapping[str, Any]], *, judge: str) -> float:
    """What one judge has spent by an audit's lines (`judges.audit.read_audit`).

    A call is written down as it ends. A process that was killed has not written down those in flight: so much may be
    missing, and no more.
    """
    return math.fsum(amount for _, amount in _bookings(lines, judge=judge))


def spent_in_steps_according_to(lines: Iterable[Mapping[str, Any]], *, judge: str) -> dict[int, float]:
    """Training step -> what one judge has spent in it; an evaluation is no step."""
    amounts: dict[int, list[float]] = {}
    for step, amount in _bookings(lines, judge=judge):
        if step is not None:
            amounts.setdefault(step, []).append(amount)
    return {step: math.fsum(found) for step, found in amounts.items()}


def _bookings(lines: Iterable[Mapping[str, Any]], *, judge: str) -> Iterator[tuple[int | None, float]]:
    for line in lines:
        booking = line.get("booking")
        if booking is not None and booking["judge"] == judge:
            yield line.get("step"), booking["amount"]


def _end_wait(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():  # a cancelled one is
        waiter.set_result(None)


def _up(amount: float) -> int:
    return math.ceil(amount * PARTS)


def _down(amount: float) -> int:
    return math.floor(amount * PARTS)
