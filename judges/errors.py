"""Everything that judges raise on purpose, sorted by who can act.

JudgeError
├── JudgeConfigError        the user: a setting is wrong or a secret is missing
├── AuditFailed             stop: a verdict could not be written down
└── JudgeFailure            one call gave no verdict; `kind` says why, `fault` whose doing it was
    ├── JudgeUnavailable    try again: unreachable, cut off, 408, 409, 425, 5xx (may say when: retry_after_s)
    │   ├── JudgeTimeout    no whole answer in time
    │   └── JudgeOverloaded 429: try again, and ask less at a time
    ├── InvalidVerdict      try once more: the judge answered, but not with a verdict
    ├── JudgeRefused        another judge, perhaps: this one will not judge this text
    ├── JudgeRejected       another judge, perhaps: this endpoint does not take this (400, 404, 413, a redirect, ...)
    ├── JudgeDenied         nobody asks this endpoint again: it does not take our key, or our money is used up
    └── BudgetExceeded      nobody asks anybody: the recipe's cap on money is reached

A client raises any JudgeFailure but the last, which is the budget's; the pool turns them all into `Failed`.
JudgeConfigError and AuditFailed leave the pool: going on would be a guess.
"""

from __future__ import annotations

from typing import ClassVar

from judges.types import FailureKind, Fault, Usage


class JudgeError(Exception):
    """Base of every error raised on purpose."""


class JudgeConfigError(JudgeError):
    """A setting is wrong. The message says what was wrong, what was expected and what to do."""


class AuditFailed(JudgeError):
    """The audit could not be written."""


class JudgeFailure(JudgeError):
    """One call gave no verdict. The message goes to files and people: it must hold no secret."""

    default_kind: ClassVar[FailureKind] = "client_error"

    def __init__(
        self,
        message: str,
        *,
        kind: FailureKind | None = None,
        status: int | None = None,
        fault: Fault = "judge",
        usage: Usage | None = None,
    ) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind or self.default_kind
        """Why, for counting."""
        self.status = status
        """The HTTP status; None where the cause is another."""
        self.fault: Fault = fault
        """"completion": the judged text makes a healthy judge fail."""
        self.usage: Usage | None = usage
        """Tokens that were counted, and may be billed, all the same; None where none are known."""


class JudgeUnavailable(JudgeFailure):
    """The judge could not be had now; the same request may do better later."""

    default_kind = "unavailable"

    def __init__(
        self,
        message: str,
        *,
        kind: FailureKind | None = None,
        status: int | None = None,
        fault: Fault = "judge",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, kind=kind, status=status, fault=fault)
        self.retry_after_s = retry_after_s
        """Seconds the endpoint asks us to wait, finite and >= 0; None where it does not say, or says nonsense."""


class JudgeTimeout(JudgeUnavailable):
    """No whole answer came in time."""

    default_kind = "timeout"


class JudgeOverloaded(JudgeUnavailable):
    """The endpoint asks for fewer requests (429). Its health is not in doubt: the breaker does not count it."""

    default_kind = "overloaded"


class InvalidVerdict(JudgeFailure):
    """The judge's reply holds no usable verdict. Kinds: invalid_verdict, empty, truncated."""

    default_kind = "invalid_verdict"


class JudgeRefused(JudgeFailure):
    """The judge, or its provider's filter, will not judge this text."""

    default_kind = "refused"

    def __init__(self, message: str, *, status: int | None = None, usage: Usage | None = None) -> None:
        super().__init__(message, status=status, fault="completion", usage=usage)


class JudgeRejected(JudgeFailure):
    """The endpoint does not take this request, and will not take it later.

    Kinds: rejected, too_long (the fault is then the completion's), redirect, tls, address, reply_too_large.
    """

    default_kind = "rejected"

    def __init__(self, message: str, *, kind: FailureKind | None = None, status: int | None = None) -> None:
        kind = kind or ("too_long" if status == 413 else self.default_kind)
        super().__init__(message, kind=kind, status=status, fault="completion" if kind == "too_long" else "judge")


class JudgeDenied(JudgeFailure):
    """The endpoint takes nothing from us any more. Kinds: auth (401, 403), quota (402, 429 insufficient_quota)."""

    default_kind = "auth"


class BudgetExceeded(JudgeFailure):
    """A call could cost more than the recipe's cap leaves."""

    default_kind = "budget"
