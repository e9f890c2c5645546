"""Is the completion the reference, give or take case, spacing and a full stop? 1 or 0."""

from __future__ import annotations

import unicodedata

from rewards.config import StrictModel
from rewards.types import RewardInput, Score

_OPENING = "\"'“‘`*"
_CLOSING = "\"'”’`*.,;:!?"  # no opening signs among them: "-5" and ".5" are not "5"


class ExactMatch(StrictModel):
    """1 where the whole completion equals the reference, else 0."""

    ignore_case: bool = True
    """Compare without regard to upper and lower case."""
    ignore_punctuation: bool = True
    """Drop quotes around the text and punctuation at its end; what stands inside is compared."""

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per completion; missing where the prompt has no reference."""
        return [self._score_one(one) for one in inputs]

    def _score_one(self, one: RewardInput) -> Score:
        if one.reference is None:
            return Score(value=None, reason="the prompt has no reference")
        is_match = self._canonical(one.completion) == self._canonical(one.reference)
        if is_match:
            return Score(value=1.0, reason="equals the reference")
        return Score(value=0.0, reason="differs from the reference" if one.completion.strip() else "empty completion")

    def _canonical(self, text: str) -> str:
        canonical = " ".join(unicodedata.normalize("NFC", text).split())
        if self.ignore_punctuation:
            canonical = canonical.lstrip(_OPENING).rstrip(_CLOSING).strip()
        return canonical.casefold() if self.ignore_case else canonical
