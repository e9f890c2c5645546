"""Does a text say that the answer is not there to be had? "Unknown", "can't be determined", "not stated", ...

Shared by the rules for which saying so can be the right answer. Knows nothing of scores.
"""

from __future__ import annotations

import re

from rewards.mentions import normalized

# Whoever fails to know must be the speaker or the text: "Anna did not know the way" answers "Who did not know the way?"
_SPEAKER = (
    r"(?:^|(?<=[.,;:!?(*])\s*|(?:\b(?:but|so|and|i|we|you|one|it|there|text|passage|context|facts?|story|scene"
    r"|information|sentences?|statements?|question|paragraph|this|that)\s+(?:just\s+|simply\s+|really\s+)?))"
)
_INFORMATION = r"(?:info|information|details?|context|evidence|data|facts)"
_CANNOT = r"(?:can(?:not| not|'t)|could(?: not|n't))"
_IS_NOT = r"(?:(?:is|was|are|were|has|have)(?: not|n't)|(?<!if )not)"

# "unknown whether Anna or Ben did": the people it wonders about are not put forward
_WHAT_IS_NOT_KNOWN = r"(?:\s+(?:if|whether|which|who)\b[^.,;:!?]*)?"

_ABSTENTIONS = re.compile(
    "(?:"
    + "|".join(
        (
            r"(?<!not )(?<!n't )\b(?:unknown|unknowable|undetermined|indeterminate|undeterminable|unclear|unspecified"
            r"|unstated|unanswerable)\b",
            rf"\b{_CANNOT}\s+(?:\w+ly\s+)?be\s+(?:\w+ly\s+)?(?:known|determined|told|said|inferred|identified"
            r"|established|answered|concluded|deduced|decided)\b",
            rf"{_SPEAKER}(?:{_CANNOT}|(?:am\s+|are\s+|'m\s+|m\s+)?(?:unable|not able)\s+to)\s+(?:\w+ly\s+)?"
            r"(?:know|tell|say|determine|infer|identify|establish|answer|conclude)\b",
            r"\b(?:impossible|not possible|no way|hard|difficult)\s+(?:for me\s+)?to\s+(?:\w+ly\s+)?"
            r"(?:know|tell|say|determine|be sure|be certain|infer|identify)\b",
            rf"\b{_IS_NOT}\s+(?:been\s+)?(?:\w+ly\s+)?(?:stated|mentioned|specified|known|indicated|disclosed|clear"
            r"|revealed|determined|determinable|answerable|(?:given|provided|told|said)(?!\s+(?:an?|the|to|any|h[ei][rs])\b))\b",
            rf"\b(?:(?:is|are|was)(?: not|n't)|not|without|lacks?|lacking)\s+(?:enough|sufficient)\s+{_INFORMATION}\b",
            rf"{_SPEAKER}(?:no|not)\s+(?:enough|sufficient)\s+{_INFORMATION}\b",
            rf"\binsufficient {_INFORMATION}\b|{_SPEAKER}(?:is\s+|are\s+|was\s+)?no {_INFORMATION}\b",
            rf"{_SPEAKER}(?:do|does|did)(?: not|n't)\s+(?:\w+ly\s+)?(?:know|say|state|specify|mention|tell|give|provide"
            r"|indicate|reveal|answer)\b",
            rf"(?:{_SPEAKER}(?:(?:am|are|is)\s+)?|\bi'm\s+|\bwe're\s+)(?:not (?:sure|certain)|unsure|uncertain)\b",
            r"\bno ?(?:body|one) (?:knows|can (?:know|tell|say))\b",
        )
    )
    + ")"
    + _WHAT_IS_NOT_KNOWN
)


def is_abstention(text: str) -> bool:
    """Whether the text says somewhere that the answer is unknown or not stated."""
    return bool(_ABSTENTIONS.search(normalized(text)))


def without_abstentions(text: str) -> str:
    """The normalized text with each such phrase cut out, so that its words are not read as an answer."""
    return _ABSTENTIONS.sub(" ; ", normalized(text))
