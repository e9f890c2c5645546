"""Is the completion the reference, give or take case, spacing and a full stop? 1 or 0."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from rewards.answer_text import ReadsAnswer
from rewards.types import RewardInput, Score

_OPENING = "\"'“‘`*"
_CLOSING = "\"'”’`*.,;:!?"  # no opening signs among them: "-5" and ".5" are not "5"


class ExactMatch(ReadsAnswer):
    """1 where the whole completion (or its answer tag's inside) equals the reference, else 0.

    `meta["aliases"]`, where present, lists other spellings of the reference.
    """

    ignore_case: bool = True
    """Compare without regard to upper and lower case."""
    ignore_punctuation: bool = True
    """Drop quotes around the text and punctuation at its end; what stands inside is compared."""

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per completion; missing where the prompt has no reference."""
        return [self._score_one(one) for one in inputs]

    def _score_one(self, one: RewardInput) -> Score:
        if one.reference is None or not one.reference.strip():
            return Score(value=None, reason="the prompt has no reference")
        answer = self.answer_in(one.completion)
        if answer is None:
            return Score(value=0.0, reason=self.no_answer)
        if not answer.strip():
            return Score(value=0.0, reason="empty completion")
        accepted = {self._canonical(text) for text in (one.reference, *_strings(one.meta.get("aliases")))}
        if self._canonical(answer) in accepted:
            return Score(value=1.0, reason="equals the reference")
        return Score(value=0.0, reason="differs from the reference")

    def _canonical(self, text: str) -> str:
        canonical = " ".join(unicodedata.normalize("NFC", text).split())
        if self.ignore_punctuation:
            # "?" stripped of its punctuation would equal "!": what is nothing else is compared as it is
            canonical = canonical.lstrip(_OPENING).rstrip(_CLOSING).strip() or canonical
        return canonical.casefold() if self.ignore_case else canonical


def _strings(value: object) -> Sequence[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list | tuple) else []
