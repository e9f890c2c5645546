"""Recipe -> the largest micro-batch of a step, and how many there are: what `grpo.batching` packs. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo.config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The largest micro-batch: G prompts, B completions of them, all of full length."""

    prompts: int
    rows: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def loss_tokens(self) -> int:
        return self.rows * self.completion_tokens

    @property
    def padded_tokens(self) -> int:
        """As the budget counts."""
        return self.prompts * self.prompt_tokens + self.loss_tokens


def largest_micro_batch(config: RunConfig, prompt_tokens: int) -> Rows:
    """The largest that `build_batch` makes of a step whose rows are all of full length."""
    cut = _cut_of(config, prompt_tokens)
    return Rows(
        prompts=cut.prompts,
        rows=cut.rows,
        prompt_tokens=prompt_tokens,
        completion_tokens=config.rollout.max_new_tokens,
    )


def count_micro_batches(config: RunConfig, prompt_tokens: int) -> int:
    """Micro-batches of a step whose rows are all of full length."""
    return _cut_of(config, prompt_tokens).count


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    prompts: int
    """Of the largest micro-batch."""
    rows: int
    """Of the largest."""
    count: int
    """Micro-batches of a step."""


def _cut_of(config: RunConfig, prompt_tokens: int) -> _Cut:
    """As few as the budget allows, and of like size: whole groups side by side, or a group in parts."""
    budget, k, length = config.update.micro_batch_tokens, config.rollout.group_size, config.rollout.max_new_tokens
    groups = config.prompts.per_step
    rows = max((budget - prompt_tokens) // length, 1)  # that fit beside one prompt
    if rows >= k:
        count = math.ceil(groups / min(budget // (prompt_tokens + k * length), groups))
        together = math.ceil(groups / count)
        return _Cut(prompts=together, rows=together * k, count=count)
    parts = math.ceil(k / rows)
    return _Cut(prompts=1, rows=math.ceil(k / parts), count=groups * parts)
