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
    """What `build_batch` puts together at most: whole groups, evenly, or parts of one where the budget is too small."""
    groups, rows, _ = _packed(config, prompt_tokens)
    length = config.rollout.max_new_tokens
    return Rows(prompts=groups, rows=rows, prompt_tokens=prompt_tokens, completion_tokens=length)


def count_micro_batches(config: RunConfig, prompt_tokens: int) -> int:
    """Micro-batches of a step whose rows are all of full length."""
    return _packed(config, prompt_tokens)[2]


def _packed(config: RunConfig, prompt_tokens: int) -> tuple[int, int, int]:
    """Groups and rows of the largest micro-batch, and the number of them."""
    budget, k, length = config.update.micro_batch_tokens, config.rollout.group_size, config.rollout.max_new_tokens
    groups = config.prompts.per_step
    at_most = budget // (prompt_tokens + k * length)
    if at_most:
        count = math.ceil(groups / at_most)
        largest = math.ceil(groups / count)
        return largest, largest * k, count
    parts = math.ceil(k / max((budget - prompt_tokens) // length, 1))
    return 1, math.ceil(k / parts), groups * parts
