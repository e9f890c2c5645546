"""(status, headers, body) of an answer that is no success -> the failure it stands for. Believes codes before words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from judges.clients.retry_hints import retry_after_s
from judges.errors import JudgeDenied, JudgeFailure, JudgeOverloaded, JudgeRefused, JudgeRejected, JudgeUnavailable
from judges.strict_json import strict_loads

EXCERPT_CHARS = 200
RETRYABLE = frozenset({408, 409, 425})
QUOTA_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "billing_error"})
TOO_LONG_CODES = frozenset(
    {"context_length_exceeded", "string_above_max_length", "exceed_context_size_error", "request_too_large"}
)
REFUSAL_CODES = frozenset({"content_filter", "content_policy_violation"})
TOO_LONG_WORDS = re.compile(
    r"maximum context length|maximum model length|context (?:window|size|length)|prompt is too long|input is too long"
    r"|input token count|inputs? tokens|longer than the maximum",
    re.IGNORECASE,
)
UNPAID_WORDS = re.compile(r"credit balance is too low", re.IGNORECASE)
CONTEXT_LENGTH = re.compile(r"(?:context|model) length (?:is|of) ([0-9]{1,9})", re.IGNORECASE)


def failure_of(
    *, status: int, headers: Mapping[str, str], body: str, reason: str, max_tokens: int | None
) -> JudgeFailure:
    """What an answer with a status other than 200 means for the caller.

    Args:
        status: the HTTP status, not a redirect.
        headers: in a mapping that ignores the case.
        body: the answer's text, without secrets.
        reason: the status line's words, without secrets.
        max_tokens: what the request allowed the reply; None where it asked for no reply.
    """
    codes, message = _codes_and_message(body)
    excerpt = " ".join((message or body).split())[:EXCERPT_CHARS] or reason
    text = f"HTTP {status}: {excerpt}"
    if status == 402 or (status in (400, 403, 429) and codes & QUOTA_CODES):
        return JudgeDenied(text, kind="quota", status=status)
    if status == 400 and UNPAID_WORDS.search(message):
        return JudgeDenied(text, kind="quota", status=status)
    if status in (401, 403):
        return JudgeDenied(text, status=status)
    if status == 429:
        return JudgeOverloaded(text, status=status, retry_after_s=retry_after_s(headers))
    if status in RETRYABLE or status >= 500:
        return JudgeUnavailable(text, status=status, retry_after_s=retry_after_s(headers))
    if status == 400 and codes & REFUSAL_CODES:
        return JudgeRefused(text, status=status)
    if status == 413 or codes & TOO_LONG_CODES or (status in (400, 422) and TOO_LONG_WORDS.search(message)):
        return _too_long(text, status=status, message=message, max_tokens=max_tokens)
    return JudgeRejected(text, status=status)


def _too_long(text: str, *, status: int, message: str, max_tokens: int | None) -> JudgeRejected:
    """Too much was asked for: by the text, or by settings that fit no text at all."""
    limit = CONTEXT_LENGTH.search(message)
    if limit and max_tokens is not None and max_tokens >= int(limit[1]):
        return JudgeRejected(
            f"{text}. max_tokens ({max_tokens}) alone fills the judge's context: lower it.", status=status
        )
    return JudgeRejected(text, kind="too_long", status=status)


def _codes_and_message(body: str) -> tuple[frozenset[str], str]:
    """The error's code and type, and its message: OpenAI's, Anthropic's and vLLM's forms. Words are never codes."""
    try:
        content: Any = strict_loads(body)
    except ValueError:
        return frozenset(), ""
    error = content.get("error", content) if isinstance(content, dict) else None
    if isinstance(error, str):
        return frozenset(), error
    if not isinstance(error, dict):
        return frozenset(), ""
    codes = frozenset(value for key in ("code", "type") if isinstance(value := error.get(key), str))
    message = error.get("message")
    return codes, message if isinstance(message, str) else ""
