"""Untrusted text -> text that is safe to look at. Knows neither terminals nor HTML; escaping markup is the caller's."""

from __future__ import annotations

import unicodedata

_SHOWN_AS_THEY_ARE = "\n\t\u200c\u200d"  # the joiners spell words in many scripts and hold emoji together
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (direction overrides too), surrogate, separators


def printable(text: object, encoding: str = "utf-8") -> str:
    """The text with what acts on a terminal, hides, or cannot be encoded replaced by its escape, such as `\\x1b`."""
    visible = "".join(
        c.encode("unicode_escape").decode("ascii")
        if c not in _SHOWN_AS_THEY_ARE and unicodedata.category(c) in _HIDDEN
        else c
        for c in str(text)
    )
    return visible.encode(encoding, errors="backslashreplace").decode(encoding)
