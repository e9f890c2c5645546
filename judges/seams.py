"""What a pool may be given besides its clients (a cache of verdicts, a budget, an audit), and what it is to its users.
Protocols, no code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from judges.audit import AuditRecord
from judges.types import Judgement, JudgeRequest, Verdict


class VerdictCache(Protocol):
    """Keeps whole, valid verdicts. Its own failures are its own affair: it answers None, and the run goes on."""

    async def get(self, key: str) -> Verdict | None:
        """The verdict kept under the key."""
        ...

    async def put(self, key: str, verdict: Verdict) -> None:
        """Keep a verdict; the pool gives only those in which every text has its score."""
        ...


class Reservation(Protocol):
    """Money set aside for one call."""

    def settle(self, cost: float | None) -> None:
        """The call has ended and cost so much; None where that is unknown: then all that was set aside is spent."""
        ...


class Budget(Protocol):
    """Caps on money."""

    async def wait_for_room(self, upper_bound: float) -> None:
        """Return at once where so much can be set aside, or where it cannot be even when all calls have ended; else
        wait for calls in flight to end. What they leave of their upper bounds may be enough."""
        ...

    def reserve(self, upper_bound: float) -> Reservation:
        """Set aside the most that a call can cost, at once.

        Raises:
            BudgetExceeded: the caps leave less.
        """
        ...


class AuditSink(Protocol):
    """Where every judgement is written down, and every call's money."""

    async def append(self, record: AuditRecord) -> None:
        """Write one record.

        Raises:
            AuditFailed: it could not be written.
        """
        ...

    def append_booking(self) -> None:
        """Write down at once what the budget has booked. Asked only where there is a budget, as each call ends.

        Raises:
            AuditFailed: it could not be written.
        """
        ...


class Judging(Protocol):
    """A judge pool, or what stands in for one."""

    async def judge(self, requests: Sequence[JudgeRequest]) -> list[Judgement]:
        """One judgement per request, in the requests' order."""
        ...
