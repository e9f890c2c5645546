"""Does the completion have the asked-for shape? 1 or 0. Needs no reference."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, field_validator, model_validator

from rewards.config import StrictModel
from rewards.types import RewardInput, Score


class Format(StrictModel):
    """1 where the completion, stripped, meets every condition that is set, else 0."""

    pattern: str | None = None
    """Regular expression that the whole completion must match; flags inline, as in "(?s)<think>.*</think>.*".
    It runs on the event loop: write one that cannot backtrack without end."""
    max_words: int | None = Field(None, gt=0)
    """Most words, separated by white space."""
    one_line: bool = False
    """No line break inside."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as exc:
            raise ValueError(f"not a regular expression: {exc}") from exc
        return pattern

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.pattern is None and self.max_words is None and not self.one_line:
            raise ValueError("nothing is asked for; set pattern, max_words or one_line")
        return self

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per completion."""
        return [self._score_one(one.completion.strip()) for one in inputs]

    def _score_one(self, text: str) -> Score:
        problem = self._problem(text)
        return Score(value=0.0 if problem else 1.0, reason=problem or "has the asked-for format")

    def _problem(self, text: str) -> str:
        if not text:
            return "empty completion"
        num_words = len(text.split())
        if self.max_words is not None and num_words > self.max_words:
            return f"{num_words} words, at most {self.max_words} were asked for"
        if self.one_line and len(text.splitlines()) > 1:
            return "more than one line"
        if self.pattern is not None and not re.fullmatch(self.pattern, text):
            return "does not match the pattern"
        return ""
