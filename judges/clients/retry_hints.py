"""Headers of an answer -> how long to wait, and how much of the rate limit is left. Believes no nonsense."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime

MAX_HINT_S = 86_400.0
"""A wait beyond a day is nonsense."""
MAX_DATED_HINT_S = 3_600.0
"""A date beyond an hour is more likely a clock that is wrong."""

NUMBER = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,15})?")
SPAN = re.compile(r"(?:([0-9.]{1,15})h)?(?:([0-9.]{1,15})m)?(?:([0-9.]{1,15})s)?(?:([0-9.]{1,15})ms)?")
RESETS = (
    ("x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
    ("x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
    ("anthropic-ratelimit-requests-remaining", "anthropic-ratelimit-requests-reset"),
    ("anthropic-ratelimit-tokens-remaining", "anthropic-ratelimit-tokens-reset"),
    ("anthropic-ratelimit-input-tokens-remaining", "anthropic-ratelimit-input-tokens-reset"),
    ("anthropic-ratelimit-output-tokens-remaining", "anthropic-ratelimit-output-tokens-reset"),
)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that an endpoint asks us to wait, by the first of these that makes sense:
    retry-after-ms, Retry-After (seconds or a date), the latest reset of a limit of which nothing remains.

    A date is measured against the answer's own Date header where it has one, so that our clock and the server's need
    not agree. Negative, infinite and absurd waits are none.

    Args:
        headers: by lower-case name, or in a mapping that ignores the case.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None and milliseconds <= MAX_HINT_S * 1000:
        return milliseconds / 1000
    text = headers.get("retry-after")
    if text is not None:
        seconds = _number(text)
        waits = _sane(seconds) if seconds is not None else _until(text, headers.get("date"))
        if waits is not None:
            return waits
    resets = [
        wait_s
        for remaining, reset in RESETS
        if _number(headers.get(remaining)) == 0 and (wait_s := _span_s(headers.get(reset), headers.get("date")))
    ]
    return max(resets, default=None)


def remaining_requests(headers: Mapping[str, str]) -> int | None:
    """Requests that the rate limit still allows in its window; None where the endpoint does not say."""
    return _remaining(headers, "x-ratelimit-remaining-requests", "anthropic-ratelimit-requests-remaining")


def remaining_tokens(headers: Mapping[str, str]) -> int | None:
    """Tokens that the rate limit still allows in its window; None where the endpoint does not say."""
    return _remaining(headers, "x-ratelimit-remaining-tokens", "anthropic-ratelimit-tokens-remaining")


def _remaining(headers: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        number = _number(headers.get(name))
        if number is not None:
            return int(number)
    return None


def _number(text: str | None) -> float | None:
    """A plain decimal number >= 0; float() itself would take "inf", "1e400", "1_0" and other scripts' digits."""
    if text is None or not NUMBER.fullmatch(text.strip()):
        return None
    return float(text)


def _sane(wait_s: float, most_s: float = MAX_HINT_S) -> float | None:
    return wait_s if math.isfinite(wait_s) and 0 <= wait_s <= most_s else None


def _span_s(text: str | None, date: str | None) -> float | None:
    """ "6m0s", "20ms", "1.5" (seconds) or a date (RFC 3339, HTTP's)."""
    if text is None:
        return None
    text = text.strip()
    seconds = _number(text)
    if seconds is not None:
        return _sane(seconds)
    match = SPAN.fullmatch(text)
    if text and match:
        try:
            parts = [float(part or 0) for part in match.groups()]
        except ValueError:
            return None
        return _sane(parts[0] * 3600 + parts[1] * 60 + parts[2] + parts[3] / 1000)
    return _until(text, date)


def _until(text: str, date: str | None) -> float | None:
    """Seconds from the answer's date (else from now) to the date in the text; None where it is no date or is past."""
    then = _timestamp(text)
    if then is None:
        return None
    now = _timestamp(date) if date is not None else None
    return _sane(then - (now if now is not None else time.time()), MAX_DATED_HINT_S)


def _timestamp(text: str) -> float | None:
    for parse in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            moment = parse(text.strip())
        except (ValueError, TypeError, OverflowError):
            continue
        if moment.tzinfo is None:
            return None  # whose time that is, nobody knows
        try:
            return moment.timestamp()
        except (ValueError, OverflowError):
            return None
    return None
