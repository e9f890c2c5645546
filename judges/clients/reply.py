"""What the dialects have in common when an answer becomes a `ChatReply`. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from judges.errors import InvalidVerdict
from judges.types import TRUNCATED_REASONS, ChatReply, Usage

MAX_TOKENS_BELIEVED = 10_000_000
"""No model reads or writes more in one call; a count beyond is nonsense, and would empty a budget."""


def make_reply(
    *,
    text: Any,
    finish_reason: Any,
    usage: Usage | None,
    remaining_requests: int | None,
    remaining_tokens: int | None,
    redacted: Callable[[str], str],
) -> ChatReply:
    """A reply, if there is any text in it.

    Raises:
        InvalidVerdict: the text is missing ("empty"; "truncated" where the token limit left none, as when a model
            spends it all on reasoning).
    """
    finish_reason = finish_reason if isinstance(finish_reason, str) else ""
    if text is not None and not isinstance(text, str):
        raise InvalidVerdict(f"the reply's content is no text but a {type(text).__name__}", usage=usage)
    if not text or not text.strip():
        is_truncated = finish_reason in TRUNCATED_REASONS
        raise InvalidVerdict(
            "the token limit was used up before any text" if is_truncated else "the reply holds no text",
            kind="truncated" if is_truncated else "empty",
            usage=usage,
        )
    return ChatReply(
        text=redacted(text),
        finish_reason=finish_reason,
        usage=usage,
        remaining_requests=remaining_requests,
        remaining_tokens=remaining_tokens,
    )


def whole_number(value: Any) -> int | None:
    """A count of tokens, if it is believable."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKENS_BELIEVED
    return value if is_count else None
