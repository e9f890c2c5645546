"""A penalty on completions that are too long, or too short, in tokens. Needs no reference."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from rewards.config import StrictModel
from rewards.types import RewardInput, Score


class Length(StrictModel):
    """0 up to the target, falling linearly to -1 at the limit and beyond; with a minimum, below that to -1 at no token.

    Source: the soft overlong punishment of DAPO (arXiv:2503.14476), eq. 13. The minimum is ours.
    """

    target_tokens: int = Field(gt=0)
    """Longest completion without a penalty."""
    limit_tokens: int = Field(gt=0)
    """Length at which the penalty is full; above target_tokens."""

    min_tokens: int = Field(0, ge=0)
    """Shortest completion without a penalty, the end token counted; at most target_tokens. Against a policy that learns
    to say nothing."""

    @model_validator(mode="after")
    def _limits_are_in_order(self) -> Self:
        if self.min_tokens > self.target_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must not be above target_tokens ({self.target_tokens})")
        if self.limit_tokens <= self.target_tokens:
            raise ValueError(f"limit_tokens ({self.limit_tokens}) must be above target_tokens ({self.target_tokens})")
        return self

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per completion; missing where its number of tokens is not known."""
        return [self._score_one(one) for one in inputs]

    def _score_one(self, one: RewardInput) -> Score:
        if one.num_tokens <= 0 and one.completion:
            return Score(value=None, reason="the completion's number of tokens is not known")
        value = length_penalty(
            one.num_tokens,
            target_tokens=self.target_tokens,
            limit_tokens=self.limit_tokens,
            min_tokens=self.min_tokens,
        )
        least = f"at least {self.min_tokens}, " if self.min_tokens else ""
        return Score(value=value, reason=f"{one.num_tokens} tokens, {least}target {self.target_tokens}")


def length_penalty(num_tokens: int, *, target_tokens: int, limit_tokens: int, min_tokens: int = 0) -> float:
    """A number in [-1, 0]: 0 from min_tokens to target_tokens, -1 at 0 and from limit_tokens on, linear between."""
    overshoot = max(0, num_tokens - target_tokens) / (limit_tokens - target_tokens)
    shortfall = max(0, min_tokens - num_tokens) / min_tokens if min_tokens else 0.0
    return 0.0 - min(1.0, max(overshoot, shortfall))  # never -0.0
