"""A penalty on long completions, in tokens. Needs no reference."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from rewards.config import StrictModel
from rewards.types import RewardInput, Score


class Length(StrictModel):
    """0 up to the target, falling linearly to -1 at the limit and beyond.

    Source: the soft overlong punishment of DAPO (arXiv:2503.14476), eq. 13.
    """

    target_tokens: int = Field(gt=0)
    """Longest completion without a penalty."""
    limit_tokens: int = Field(gt=0)
    """Length at which the penalty is full; above target_tokens."""

    @model_validator(mode="after")
    def _limit_is_above_target(self) -> Self:
        if self.limit_tokens <= self.target_tokens:
            raise ValueError(f"limit_tokens ({self.limit_tokens}) must be above target_tokens ({self.target_tokens})")
        return self

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per completion; missing where its number of tokens is not known."""
        return [self._score_one(one) for one in inputs]

    def _score_one(self, one: RewardInput) -> Score:
        if one.num_tokens <= 0 and one.completion:
            return Score(value=None, reason="the completion's number of tokens is not known")
        value = length_penalty(one.num_tokens, target_tokens=self.target_tokens, limit_tokens=self.limit_tokens)
        return Score(value=value, reason=f"{one.num_tokens} tokens, target {self.target_tokens}")


def length_penalty(num_tokens: int, *, target_tokens: int, limit_tokens: int) -> float:
    """A number in [-1, 0]: 0 up to target_tokens, -1 from limit_tokens on, linear between."""
    overshoot = max(0, num_tokens - target_tokens) / (limit_tokens - target_tokens)
    return -min(1.0, overshoot)
