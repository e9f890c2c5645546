"""Text -> JSON, or an error: what RFC 8259 does not know, and what two readers could read in two ways, is refused."""

from __future__ import annotations

import json
import math
from typing import Any


class NestedTooDeeply(ValueError):
    """The text is JSON of more levels than any honest answer has."""


def strict_loads(text: str | bytes) -> Any:
    """One JSON document.

    Raises:
        ValueError: not JSON or not UTF-8; NaN, an infinity or a number too large for a float; a key that comes twice;
            half of a surrogate pair; nested too deeply. The message shows nothing of the text.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")  # strict; a byte-order mark may stand in front (RFC 8259, section 8.1)
    try:
        content = _DECODER.decode(text)
    except json.JSONDecodeError as exc:
        raise ValueError(f"not JSON: {exc.msg} at character {exc.pos}") from None
    except RecursionError:
        raise NestedTooDeeply("nested too deeply") from None
    if "\\u" in text:  # only an escape can smuggle half of a pair in
        _refuse_lone_surrogates(content)
    return content


def strict_parse_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that starts at `start`, and where it ends; raises as `strict_loads` does, and for a negative zero.

    Written by a language model, -0 is a sign of a number that went wrong; in a log-probability it is an honest one.
    """
    try:
        content, end = _DECODER_OF_TEXT.raw_decode(text, start)
    except RecursionError:
        raise NestedTooDeeply("nested too deeply") from None
    if "\\u" in text[start:end]:
        _refuse_lone_surrogates(content)
    return content, end


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key comes twice")
    return content


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise ValueError("a number is too large for a float")
    return number


def _positive_zero_int(literal: str) -> int:
    if literal == "-0":
        raise ValueError("-0 is no score")
    return int(literal)


def _positive_zero_float(literal: str) -> float:
    number = _finite(literal)
    if number == 0 and literal.startswith("-"):
        raise ValueError("-0 is no score")
    return number


def _refuse_lone_surrogates(content: Any) -> None:
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair") from None


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_no_constant, parse_float=_finite)
_DECODER_OF_TEXT = json.JSONDecoder(
    object_pairs_hook=_without_duplicates,
    parse_constant=_no_constant,
    parse_float=_positive_zero_float,
    parse_int=_positive_zero_int,
)
