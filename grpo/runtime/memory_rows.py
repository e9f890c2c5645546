"""Recipe -> the largest micro-batch of a step, and how many there are: what `grpo.batching` packs. Imports no torch."""

from __future__ import annotations

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
    """What `build_batch` puts together at most: rows of a group side by side, until the budget is used up."""
    budget, k, length = config.update.micro_batch_tokens, config.rollout.group_size, config.rollout.max_new_tokens
    per_group = prompt_tokens + k * length
    groups, left = divmod(budget, per_group)
    groups = min(groups, config.prompts.per_step)
    rest = 0
    if groups < config.prompts.per_step:
        rest = min(max((left - prompt_tokens) // length, 0), k)
    rows = groups * k + rest
    if rows == 0:
        return Rows(prompts=1, rows=1, prompt_tokens=prompt_tokens, completion_tokens=length)
    return Rows(prompts=groups + (rest > 0), rows=rows, prompt_tokens=prompt_tokens, completion_tokens=length)


def count_micro_batches(config: RunConfig, prompt_tokens: int) -> int:
    """Micro-batches of a step whose rows are all of full length, as `build_batch` packs them one by one."""
    budget, k, length = config.update.micro_batch_tokens, config.rollout.group_size, config.rollout.max_new_tokens
    count = rows = groups = 0
    for number in range(config.prompts.per_step * k):
        begins = number % k == 0
        if rows and (groups + begins) * prompt_tokens + (rows + 1) * length <= budget:
            rows, groups = rows + 1, groups + begins
        else:
            count, rows, groups = count + 1, 1, 1
    return count
