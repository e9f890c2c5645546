"""Everything that judges raise on purpose, sorted by who can act.

JudgeError
├── JudgeConfigError        the user: a setting is wrong or a secret is missing
├── JudgeUnavailable        try again: unreachable, overloaded, cut off (may say when: retry_after_s)
│   └── JudgeTimeout        no whole answer in time
├── JudgeRejected           do not try again: the endpoint does not take the request (400, 401, 404, a redirect, ...)
├── JudgeRefused            do not try again: the judge will not judge this text
├── InvalidVerdict          try once more: the judge answered, but not with a verdict
└── AuditFailed             stop: a verdict could not be written down

A client raises JudgeUnavailable, JudgeRejected, JudgeRefused or InvalidVerdict; the pool turns them into `Failed`.
JudgeConfigError and AuditFailed leave the pool: going on would be a guess.
"""

from __future__ import annotations


class JudgeError(Exception):
    """Base of every error raised on purpose."""


class JudgeConfigError(JudgeError):
    """A setting is wrong. The message says what was wrong, what was expected and what to do."""


class JudgeUnavailable(JudgeError):
    """The judge could not be had now; the same request may do better later."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """Seconds the endpoint asks us to wait; None where it does not say."""


class JudgeTimeout(JudgeUnavailable):
    """No whole answer came in time."""


class JudgeRejected(JudgeError):
    """The endpoint does not take this request, and will not take it later."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        """The HTTP status; None where the cause is another."""


class JudgeRefused(JudgeError):
    """The judge, or its provider's filter, will not judge this text."""


class InvalidVerdict(JudgeError):
    """The judge's reply holds no usable verdict."""


class AuditFailed(JudgeError):
    """The audit could not be written."""
