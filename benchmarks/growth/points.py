"""What is varied, and what is expected of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from grpo.bench.cases import MemoryCase

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
"""Of random weights: 5M numbers in its blocks."""
SMALL, LARGE = 49_152, 151_936
"""Vocabularies."""
WHOLE_STEP = 2**20
"""A budget that no step here uses up: one micro-batch."""
HEAD_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A step of one prompt."""

    group_size: int = 8
    prompt_tokens: int = 60
    completion_tokens: int = 64
    vocabulary: int = SMALL
    budget: int = WHOLE_STEP
    """Tokens of a micro-batch."""

    @property
    def name(self) -> str:
        budget = "" if self.budget == WHOLE_STEP else f", micro-batches of {self.budget}"
        sizes = f"K = {self.group_size}, prompt {self.prompt_tokens}, completions {self.completion_tokens}"
        return f"{sizes}, vocabulary {self.vocabulary}{budget}"

    @property
    def update_tokens(self) -> int:
        """That go through the model in the update: the prompt once."""
        return self.prompt_tokens + self.sampled_tokens

    @property
    def sampled_tokens(self) -> int:
        return self.group_size * self.completion_tokens

    def case(self, dtype: str) -> MemoryCase:
        """The same, as the memory bench takes it."""
        return MemoryCase(
            name=self.name,
            model={**MODEL, "vocab_size": self.vocabulary},
            dtype=dtype,
            prompts=1,
            group_size=self.group_size,
            prompt_tokens=self.prompt_tokens,
            max_new_tokens=self.completion_tokens,
            micro_batch_tokens=self.budget,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """A power of the tokens that a cost should grow by."""

    cost: str
    """update_s, update_bytes, sampling_s, sampling_bytes, head_s or head_bytes."""
    against: str
    """update_tokens, sampled_tokens or vocabulary."""
    least: float
    most: float
    why: str
    straight: float | None = None
    """How far a value may be from a straight line with a fixed part, as a share of it; None: the power is all that is
    looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points that differ in one thing."""

    points: tuple[Point, ...]
    expected: tuple[Expected, ...]


POINT = Point()
CHUNK = "a fixed part, the logits of 192 tokens, and linear"
SERIES: Mapping[str, Series] = {
    "K": Series(
        points=tuple(replace(POINT, group_size=k) for k in (4, 8, 16, 32)),
        expected=(
            Expected(cost="update_s", against="update_tokens", least=0.8, most=1.2, why="linear"),
            Expected(cost="update_bytes", against="update_tokens", least=0.2, most=1.1, why=CHUNK, straight=0.1),
            Expected(cost="sampling_s", against="sampled_tokens", least=0, most=1, why="rows are decoded together"),
            Expected(cost="sampling_bytes", against="sampled_tokens", least=0.75, most=1.15, why="logits and caches"),
        ),
    ),
    "prompts": Series(
        points=tuple(replace(POINT, prompt_tokens=tokens) for tokens in (60, 200, 600, 2000)),
        expected=(
            Expected(cost="update_s", against="update_tokens", least=0, most=1.1, why="once a group, without a head"),
            Expected(cost="update_bytes", against="update_tokens", least=0, most=1.3, why="and a square of scores"),
            Expected(cost="sampling_s", against="update_tokens", least=0, most=0.75, why="one prefill for K rows"),
        ),
    ),
    "completions": Series(
        points=tuple(replace(POINT, completion_tokens=tokens) for tokens in (32, 64, 128, 256, 512)),
        expected=(
            Expected(cost="update_s", against="update_tokens", least=0.8, most=1.3, why="linear but for attention"),
            Expected(cost="update_bytes", against="update_tokens", least=0.2, most=1.5, why="linear but for scores"),
            Expected(cost="sampling_s", against="sampled_tokens", least=0.8, most=1.2, why="a pass for each token"),
        ),
    ),
    "micro-batches": Series(
        points=tuple(replace(POINT, group_size=k, budget=600) for k in (8, 16, 32)),
        expected=(
            Expected(cost="update_s", against="update_tokens", least=0.8, most=1.2, why="linear"),
            Expected(cost="update_bytes", against="update_tokens", least=-0.1, most=0.1, why="bounded by the budget"),
        ),
    ),
    "vocabulary": Series(
        points=tuple(replace(POINT, vocabulary=size) for size in (SMALL, LARGE)),
        expected=(
            Expected(cost="update_s", against="vocabulary", least=0.2, most=1, why="the head is a part of it"),
            Expected(cost="sampling_s", against="vocabulary", least=0.2, most=1, why="the head is a part of it"),
        ),
    ),
}
HEADS = (16_384, SMALL, 98_304, LARGE)
"""Vocabularies of the head alone."""
HEAD_EXPECTED = (
    Expected(cost="head_s", against="vocabulary", least=0.85, most=1.15, why="linear"),
    Expected(cost="head_bytes", against="vocabulary", least=0.85, most=1.15, why="a chunk's logits"),
)
