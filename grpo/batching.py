"""ScoredGroups -> TrainBatch. Knows tensors and masks; knows nothing of rewards, models or losses."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from grpo.advantages import Advantages, Combine, Scale, group_advantages
from grpo.config import TruncatedConfig, TruncatedKeep, TruncatedMask, TruncatedPenalty
from grpo.prompt_images import PromptImages
from grpo.types import Completion, ScoredGroup

PAIRS_PER_TOKEN = 6 * 1024
"""Pairs of query and key that cost as much as one token's products: 6 hidden sizes, here of a model of 1,024. A block's
products are about 24 H^2 operations a token, its attention 4 H a pair. Only how evenly rows are cut depends on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Rows that go through the model together: G prompts, each once, and their B completions. Right-padded."""

    prompt_ids: Tensor
    """[G, T_prompt]"""
    prompt_mask: Tensor
    """[G, T_prompt] 1 on tokens."""
    prompt_of_row: Tensor
    """[B] which of the G prompts a completion answers."""
    completion_ids: Tensor
    """[B, T] sampled tokens."""
    completion_mask: Tensor
    """[B, T] bool: sampled tokens, the first end token included; the loss tokens."""
    sampler_logprobs: Tensor
    """[B, T] float32, as the engine reported; 0 where masked out."""
    advantages: Tensor
    """[B] float32."""
    shares: Tensor
    """[B, O] float32, each objective's share of the advantage; they add up to it."""
    is_scored: Tensor
    """[B, O] bool: the objective gave the row a verdict."""
    images: tuple[PromptImages | None, ...] | None = None
    """[G] of each prompt, on the CPU until the model reads them; None where none has any."""

    @property
    def num_tokens(self) -> int:
        """Loss tokens."""
        return int(self.completion_mask.sum())

    @property
    def padded_tokens(self) -> int:
        """What the budget of a micro-batch counts: each prompt once, each completion, padding included."""
        return self.prompt_ids.numel() + self.completion_ids.numel()

    def rows(self, rows: Tensor) -> MicroBatch:
        """Some of its rows [B'], ascending, with the prompts that they answer and no more padding than they need."""
        mask = self.completion_mask[rows]
        prompts, prompt_of_row = self.prompt_of_row[rows].unique(return_inverse=True)
        prompt_mask = self.prompt_mask[prompts]
        columns, prompt_columns = width_of(mask), width_of(prompt_mask)
        return MicroBatch(
            prompt_ids=self.prompt_ids[prompts, :prompt_columns],
            prompt_mask=prompt_mask[:, :prompt_columns],
            prompt_of_row=prompt_of_row,
            completion_ids=self.completion_ids[rows, :columns],
            completion_mask=mask[:, :columns],
            sampler_logprobs=self.sampler_logprobs[rows, :columns],
            advantages=self.advantages[rows],
            shares=self.shares[rows],
            is_scored=self.is_scored[rows],
            images=self.images and tuple(self.images[prompt] for prompt in prompts.tolist()),
        )

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device; images stay where they are."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Field -> tensor."""
        values = {name: getattr(self, name) for name in MicroBatch.__dataclass_fields__}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """What a rank computes of a step: one window, or update.iterations windows over the same rows."""

    micro_batches: tuple[MicroBatch, ...]
    objectives: tuple[str, ...]
    """[O] names, the order of `is_scored`."""
    weights: Tensor
    """[O] weight of each objective."""
    num_tokens: int
    """Loss tokens of these micro-batches and of the idle rows; the denominators add up over the ranks."""
    num_rows: int
    """Rows that have loss tokens, the idle ones included."""
    advantages: Advantages
    """Of all completions of all ranks, rows without a verdict included."""
    num_idle_tokens: int = 0
    """Loss tokens of idle rows: their part of the loss is known to be 0, and they are in no micro-batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    group: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    advantage: float
    shares: list[float]
    is_scored: list[bool]
    images: PromptImages | None = None


def score_tensor(groups: Sequence[ScoredGroup], objectives: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Verdicts as tensors: scores [P, K, O] with NaN where there is none, and which objectives apply [P, O].

    K is the largest group's; smaller groups are filled up with NaN, which counts nowhere.
    """
    size = (len(groups), max(len(group.verdicts) for group in groups), len(objectives))
    scores = torch.full(size, torch.nan)
    applies = torch.zeros(size[0], size[2], dtype=torch.bool)
    for p, group in enumerate(groups):
        for o, name in enumerate(objectives):
            applies[p, o] = name in group.rollout.prompt.objectives
            for k, verdicts in enumerate(group.verdicts):
                value = verdicts[name].value if name in verdicts else None
                scores[p, k, o] = torch.nan if value is None else value
    return scores, applies


def teaches_something(group: ScoredGroup) -> bool:
    """Whether the group's scores differ for any of its objectives; where they do not, every advantage is 0."""
    scores, applies = score_tensor([group], group.rollout.prompt.objectives)
    advantages = group_advantages(scores, torch.ones(scores.shape[-1]), scale="none", applies=applies)
    return bool((advantages.per_objective != 0).any())


def overlong_penalty(num_tokens: int, *, max_new_tokens: int, buffer_tokens: int) -> float:
    """0 up to max_new_tokens - buffer_tokens, then linearly down to -1 at max_new_tokens (DAPO, arXiv:2503.14476)."""
    return -max(0.0, min(1.0, (num_tokens - (max_new_tokens - buffer_tokens)) / buffer_tokens))


def build_batch(
    groups: Sequence[ScoredGroup],
    weights: Mapping[str, float],
    *,
    combine: Combine,
    scale: Scale,
    micro_batch_tokens: int,
    max_new_tokens: int,
    truncated: TruncatedConfig | None = None,
    drops_flat_groups: bool = False,
    idle_when_flat: Collection[str] = (),
    own: Sequence[int] | None = None,
    images: Mapping[str, PromptImages] | None = None,
) -> TrainBatch:
    """Advantages, then rows into micro-batches of like cost under a token budget, a group's rows together where it
    holds them all.

    A row without any verdict leaves the update: no policy term, no KL term, not in the denominator.

    Args:
        groups: P groups of scored completions, of all ranks.
        weights: objective -> weight, in the recipe's order.
        micro_batch_tokens: prompts and completions of a micro-batch, padding included, stay within this; a row that
            alone is longer goes alone.
        max_new_tokens: at which completions were cut.
        truncated: what becomes of those; they are kept where None.
        drops_flat_groups: groups that teach no objective anything leave the update, KL term included; where all are
            such, they stay, for there must be something to update with.
        idle_when_flat: objectives without a term in the loss but the policy's. A group that teaches nothing, of such
            objectives alone, is idle: it counts in the denominators and goes through no model.
        own: places in `groups` whose rows this rank computes; all where None.
        images: prompt id -> its images, of those that have any.
    """
    objectives, truncated = tuple(weights), truncated or TruncatedKeep()
    scores, applies = score_tensor(groups, objectives)
    if isinstance(truncated, TruncatedPenalty):
        scores = scores + truncated.weight * _overlong_penalties(groups, scores, truncated, max_new_tokens)
    elif isinstance(truncated, TruncatedMask) and not truncated.in_baseline:
        scores = scores.masked_fill(_is_truncated(groups, scores)[..., None], torch.nan)
    objective_weights = torch.tensor(list(weights.values()))
    advantages = group_advantages(scores, objective_weights, combine=combine, scale=scale, applies=applies)
    shares = advantages.shares(objective_weights)  # [P, K, O]
    teaches = (shares != 0).any(dim=-1).any(dim=-1)  # [P]; every share: opposite ones may cancel in the sum
    rows = [
        _Row(
            group=p,
            prompt_ids=groups[p].rollout.prompt_token_ids,
            completion_ids=completion.token_ids,
            sampler_logprobs=completion.sampler_logprobs,
            advantage=float(advantages.combined[p, k]),
            shares=shares[p, k].tolist(),
            is_scored=advantages.valid[p, k].tolist(),
            images=images.get(groups[p].rollout.prompt.id) if images else None,
        )
        for p in (range(len(groups)) if own is None else own)
        if bool(teaches[p]) or not (drops_flat_groups and bool(teaches.any()))
        for k, completion in enumerate(groups[p].rollout.completions)
        if bool(advantages.valid[p, k].any()) and _is_trained_on(completion, truncated)
    ]
    idle = {
        p
        for p, group in enumerate(groups)
        if not teaches[p] and set(group.rollout.prompt.objectives) <= {*idle_when_flat}
    }
    computed = [row for row in rows if row.group not in idle]
    num_tokens, num_computed = (sum(len(row.completion_ids) for row in some) for some in (rows, computed))
    return TrainBatch(
        micro_batches=tuple(_collate(part) for part in _cut(computed, micro_batch_tokens)),
        objectives=objectives,
        weights=objective_weights,
        num_tokens=num_tokens,
        num_rows=len(rows),
        advantages=advantages,
        num_idle_tokens=num_tokens - num_computed,
    )


def _is_trained_on(completion: Completion, truncated: TruncatedConfig) -> bool:
    """Not an empty completion, which has no loss tokens, nor one that is masked because it was cut."""
    is_cut = completion.finish_reason == "length"
    return bool(completion.token_ids) and not (is_cut and isinstance(truncated, TruncatedMask))


def _is_truncated(groups: Sequence[ScoredGroup], scores: Tensor) -> Tensor:
    """[P, K] bool: cut at max_new_tokens."""
    is_cut = torch.zeros(scores.shape[:2], dtype=torch.bool)
    for p, group in enumerate(groups):
        for k, completion in enumerate(group.rollout.completions):
            is_cut[p, k] = completion.finish_reason == "length"
    return is_cut


def _overlong_penalties(
    groups: Sequence[ScoredGroup], scores: Tensor, truncated: TruncatedPenalty, max_new_tokens: int
) -> Tensor:
    """[P, K, 1] what is added to every score of a completion."""
    penalties = torch.zeros(*scores.shape[:2], 1)
    for p, group in enumerate(groups):
        for k, completion in enumerate(group.rollout.completions):
            penalties[p, k] = overlong_penalty(
                len(completion.token_ids), max_new_tokens=max_new_tokens, buffer_tokens=truncated.buffer_tokens
            )
    return penalties


def width_of(mask: Tensor) -> int:
    """Columns that hold a token of any row, of a right-padded mask [B, T]."""
    return int(mask.any(dim=0).sum())


def parts_within(batch: MicroBatch, budget: int) -> list[Tensor]:
    """Rows [B'] of each part of a micro-batch that stays within the budget, or is a single row; all rows, in order."""
    parts = [torch.arange(len(batch.prompt_of_row), device=batch.prompt_of_row.device)]
    while any(len(rows) > 1 and batch.rows(rows).padded_tokens > budget for rows in parts):
        parts = [
            half
            for rows in parts
            for half in (rows.tensor_split(2) if len(rows) > 1 and batch.rows(rows).padded_tokens > budget else [rows])
        ]
    return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Rows that go through the model together, and what that takes."""

    rows: tuple[_Row, ...]
    num_tokens: int
    num_prompts: int
    prompt_width: int
    completion_width: int

    @classmethod
    def of(cls, row: _Row) -> _Part:
        """A row alone."""
        prompt, completion = len(row.prompt_ids), len(row.completion_ids)
        tokens = prompt + completion
        return cls(rows=(row,), num_tokens=tokens, num_prompts=1, prompt_width=prompt, completion_width=completion)

    @property
    def padded_tokens(self) -> int:
        """What the budget counts: each prompt once, each completion, padding included."""
        return self.num_prompts * self.prompt_width + len(self.rows) * self.completion_width

    @property
    def cost(self) -> int:
        """Time that it takes, in pairs of query and key: its tokens, each prompt's once, and what they attend to. Only
        the attention computes padding."""
        pairs = self.num_prompts * self.prompt_width**2
        pairs += len(self.rows) * self.completion_width * (self.prompt_width + self.completion_width)
        return PAIRS_PER_TOKEN * self.num_tokens + pairs

    def joined(self, other: _Part) -> _Part:
        """Both together. Only the last rows of the one and the first of the other may have a prompt in common."""
        is_one_prompt = self.rows[-1].group == other.rows[0].group
        return _Part(
            rows=self.rows + other.rows,
            num_tokens=self.num_tokens + other.num_tokens - is_one_prompt * len(other.rows[0].prompt_ids),
            num_prompts=self.num_prompts + other.num_prompts - is_one_prompt,
            prompt_width=max(self.prompt_width, other.prompt_width),
            completion_width=max(self.completion_width, other.completion_width),
        )


def _cut(rows: Sequence[_Row], budget: int) -> list[list[_Row]]:
    """Rows of each micro-batch: a function of the rows alone. A group is cut only where the budget cannot hold it, for
    its prompt is computed once in every part."""
    groups = [
        [_Part.of(row) for row in sorted(own, key=lambda row: -len(row.completion_ids))]
        for _, own in groupby(sorted(rows, key=lambda row: row.group), key=lambda row: row.group)
    ]
    # groups of like length side by side: padding is computed too
    groups.sort(key=lambda parts: -(parts[0].prompt_width + parts[0].completion_width))
    pieces = [piece for parts in groups for piece in _evenly_joined(parts, budget)]
    return [list(part.rows) for part in _evenly_joined(pieces, budget)]


def _evenly_joined(parts: Sequence[_Part], budget: int) -> list[_Part]:
    """Neighbours joined into as few as the budget allows, such that the one that costs most costs the least.

    A part that alone is over the budget stays alone.
    """
    found = _joined(parts, budget)
    if len(found) < 2:
        return found
    costs = range(max(part.cost for part in parts), max(part.cost for part in found))
    # the higher the bound, the fewer the parts: the lowest that needs no more of them is found by halving
    least = bisect_left(costs, True, key=lambda cost: len(_joined(parts, budget, most=cost)) == len(found))
    return _joined(parts, budget, most=costs.start + least)


def _joined(parts: Sequence[_Part], budget: int, *, most: int | None = None) -> list[_Part]:
    """Neighbours joined as long as tokens stay within the budget and the cost within `most`; no way needs fewer."""
    found: list[_Part] = []
    for part in parts:
        joined = found[-1].joined(part) if found else part
        is_within = joined.padded_tokens <= budget and (most is None or joined.cost <= most)
        if found and is_within:
            found[-1] = joined
        else:
            found.append(part)
    return found


def _collate(rows: Sequence[_Row]) -> MicroBatch:
    prompts = {row.group: row.prompt_ids for row in rows}
    images = {row.group: row.images for row in rows}
    place = {group: index for index, group in enumerate(prompts)}
    completions = [row.completion_ids for row in rows]
    return MicroBatch(
        prompt_ids=_padded(list(prompts.values()), 0),
        prompt_mask=_padded([[1] * len(tokens) for tokens in prompts.values()], 0),
        prompt_of_row=torch.tensor([place[row.group] for row in rows]),
        completion_ids=_padded(completions, 0),
        completion_mask=_padded([[1] * len(tokens) for tokens in completions], 0).bool(),
        sampler_logprobs=_padded([row.sampler_logprobs for row in rows], 0.0),
        advantages=torch.tensor([row.advantage for row in rows]),
        shares=torch.tensor([row.shares for row in rows]),
        is_scored=torch.tensor([row.is_scored for row in rows]),
        images=tuple(images.values()) if any(images.values()) else None,
    )


def _padded(sequences: Sequence[Sequence[float]], fill: float) -> Tensor:
    """[B, T] right-padded with `fill`, int64 or float32 as `fill` is."""
    dtype = torch.float32 if isinstance(fill, float) else torch.int64
    tensors = [torch.tensor(sequence, dtype=dtype) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)
