"""How long an endpoint asks us to wait, and what we do not believe."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from judges.clients.retry_hints import remaining_requests, remaining_tokens, retry_after_s

NOON = "Sat, 21 Nov 2026 12:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": " 7 "}, 7.0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Sat, 21 Nov 2026 12:00:30 GMT", "date": NOON}, 30.0),
        ({"retry-after": "nonsense", "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1m2.5s"}, 62.5),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "120ms"}, 0.12),
        ({"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "120s"}, None),
        (
            {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "2s",
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-tokens": "6m0s",
            },
            360.0,
        ),
        (
            {
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "2026-11-21T12:00:05Z",
                "date": NOON,
            },
            5.0,
        ),
    ],
)
def test_a_wait_is_read_from_whichever_header_says_it(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers) == seconds


def test_a_date_without_the_servers_own_is_measured_from_our_clock() -> None:
    wait_s = retry_after_s({"retry-after": formatdate(time.time() + 60, usegmt=True)})
    assert wait_s is not None
    assert 50 < wait_s <= 61


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-5",
        "inf",
        "nan",
        "1e400",
        "1_0",
        "\u0661",
        "soon",
        "9" * 30,
        "86401",
        "+3",
        "0x10",
        "Sat, 21 Nov 2026 12:00:30",
        "Sat, 99 Nov 2026 12:00:30 GMT",
        "Sat, 21 Nov 2026 11:59:59 GMT",
        "Sat, 21 Nov 2026 14:00:00 GMT",
        "Fri, 31 Dec 9999 23:59:59 -2359",
    ],
)
def test_a_wait_that_makes_no_sense_is_none(text: str) -> None:
    assert retry_after_s({"retry-after": text, "date": NOON}) is None
    assert retry_after_s({"retry-after-ms": "-1", "retry-after": text, "date": NOON}) is None


def test_what_a_rate_limit_leaves_is_a_whole_number_or_unknown() -> None:
    assert remaining_requests({"x-ratelimit-remaining-requests": "12"}) == 12
    assert remaining_tokens({"anthropic-ratelimit-tokens-remaining": "0"}) == 0
    for nonsense in ("-1", "many", "inf", ""):
        assert remaining_tokens({"x-ratelimit-remaining-tokens": nonsense}) is None
    assert remaining_requests({}) is None
