"""A penalty for saying "unknown" or "not stated" where there is an answer.

A policy that always abstains is right on every unanswerable question, and finds that out long before it learns to
tell the two apart; from then on it samples no answer that could be rewarded. The penalty makes that a bad place.
"""

from __future__ import annotations

import asyncio

from rewards.abstention import is_abstention
from rewards.config import StrictModel
from rewards.types import RewardInput, Score


class AbstentionPenalty(StrictModel):
    """-1 where the completion abstains and the reference does not; 0 otherwise."""

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per completion; missing where the prompt has no reference."""
        return await asyncio.to_thread(lambda: [_score_one(one) for one in inputs])


def _score_one(one: RewardInput) -> Score:
    if one.reference is None:
        return Score(value=None, reason="the prompt has no reference")
    if is_abstention(one.completion) and not is_abstention(one.reference):
        return Score(value=-1.0, reason=f"abstains, though the answer is {one.reference}")
    return Score(value=0.0, reason="")
