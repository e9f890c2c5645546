"""Which of some names does a text put forward? Whole words, whatever the case; a denied name is not put forward.

Shared by the rules that read an answer out of free text. Knows nothing of scores.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'"})
_ARTICLES = r"(?:(?:the|a|an)\s+)?"

# "not Anna", "isn't really Anna", "rather than Anna": the name is there only to be turned down
_DENIAL_BEFORE = re.compile(
    r"(?:\bnot|\bnever|n't|\bneither|\bnor|\brather than|\binstead of|\bother than|\bexcept(?: for)?)"
    r"\s+(?:(?:by|to|for|really|necessarily|actually|the|a|an)\s+)*$"
)
# "Anna didn't", "Anna is not the one", "Anna was not": the sentence turns down its own subject
_DENIAL_AFTER = re.compile(
    r"\s+(?:(?:is|was|did|does|do|has|had|could|would|can|will)(?:n't|\s+not)|(?:is|was)\s+never|cannot|never)\b"
)

_HEDGES = re.compile(
    r"\b(?:maybe|perhaps|possibly|probably|likely|presumably|either|might|could be|could have been|may be|may have"
    r"|i guess|i suppose|i assume)\b"
)


def normalized(text: str) -> str:
    """Lower case, plain apostrophes, single spaces; what every function here works on."""
    folded = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES).casefold()
    return " ".join(folded.split())


def mentioned(text: str, names: Iterable[str]) -> set[str]:
    """Those of `names` that the text puts forward, as they were given.

    A longer name hides a shorter one inside it: "Ann Lee" does not mention "Ann". A leading article is optional.
    """
    remaining = normalized(text)
    found: set[str] = set()
    for name in sorted(names, key=len, reverse=True):
        pattern = name_pattern(name)
        if any(not is_denied(remaining, match) for match in pattern.finditer(remaining)):
            found.add(name)
        remaining = pattern.sub(lambda match: "\x00" * len(match.group()), remaining)
    return found


def name_pattern(name: str) -> re.Pattern[str]:
    """Matches the name as whole words in normalized text: neither inside a word nor as half of a hyphenated one."""
    words = re.sub(rf"^{_ARTICLES}", "", normalized(name))
    return re.compile(rf"(?<!\w)(?<!\w-){_ARTICLES}{re.escape(words)}(?!\w)(?!-\w)(?![.,]\d)")


def is_denied(text: str, match: re.Match[str]) -> bool:
    """Whether the text around this mention turns it down."""
    return bool(_DENIAL_BEFORE.search(text[: match.start()]) or _DENIAL_AFTER.match(text[match.end() :]))


def is_hedged(text: str) -> bool:
    """Whether the text wavers: "maybe", "probably", "either", "could be"."""
    return bool(_HEDGES.search(normalized(text)))
