"""ScoredGroups -> TrainBatch. Knows tensors and masks; knows nothing of rewards, models or losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.advantages import Advantages, Combine, Scale, group_advantages
from grpo.types import ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Rows that go through the model together. Right-padded."""

    input_ids: Tensor
    """[B, L] prompt, then completion."""
    attention_mask: Tensor
    """[B, L] 1 on tokens."""
    prompt_lengths: Tensor
    """[B] tokens before the completion."""
    completion_ids: Tensor
    """[B, T] sampled tokens."""
    completion_mask: Tensor
    """[B, T] bool: sampled tokens, the first end token included; the loss tokens."""
    sampler_logprobs: Tensor
    """[B, T] float32, as the engine reported; 0 where masked out."""
    advantages: Tensor
    """[B] float32."""
    is_scored: Tensor
    """[B, O] bool: the objective gave the row a verdict."""

    @property
    def num_tokens(self) -> int:
        """Loss tokens."""
        return int(self.completion_mask.sum())

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        return MicroBatch(**{name: getattr(self, name).to(device) for name in MicroBatch.__dataclass_fields__})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """One window: all that one optimizer step learns from."""

    micro_batches: tuple[MicroBatch, ...]
    objectives: tuple[str, ...]
    """[O] names, the order of `is_scored`."""
    weights: Tensor
    """[O] weight of each objective."""
    num_tokens: int
    """Loss tokens of the whole window, the denominator of its loss."""
    advantages: Advantages
    """Of all completions, rows without a verdict included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    advantage: float
    is_scored: list[bool]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def score_tensor(groups: Sequence[ScoredGroup], objectives: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Verdicts as tensors: scores [P, K, O] with NaN where there is none, and which objectives apply [P, O]."""
    size = (len(groups), len(groups[0].verdicts), len(objectives))
    scores = torch.full(size, torch.nan)
    applies = torch.zeros(size[0], size[2], dtype=torch.bool)
    for p, group in enumerate(groups):
        for o, name in enumerate(objectives):
            applies[p, o] = name in group.rollout.prompt.objectives
            for k, verdicts in enumerate(group.verdicts):
                value = verdicts[name].value if name in verdicts else None
                scores[p, k, o] = torch.nan if value is None else value
    return scores, applies


def build_batch(
    groups: Sequence[ScoredGroup],
    weights: dict[str, float],
    *,
    combine: Combine,
    scale: Scale,
    micro_batch_tokens: int,
) -> TrainBatch:
    """Advantages, then rows sorted by length into micro-batches under a token budget.

    A row without any verdict leaves the update: no policy term, no KL term, not in the denominator.

    Args:
        groups: P groups of K scored completions each.
        weights: objective -> weight, in the recipe's order.
        micro_batch_tokens: rows times the longest row, padding included, stays within this; a longer row goes alone.
    """
    objectives = tuple(weights)
    scores, applies = score_tensor(groups, objectives)
    objective_weights = torch.tensor(list(weights.values()))
    advantages = group_advantages(scores, objective_weights, combine=combine, scale=scale, applies=applies)
    rows = [
        _Row(
            prompt_ids=group.rollout.prompt_token_ids,
            completion_ids=completion.token_ids,
            sampler_logprobs=completion.sampler_logprobs,
            advantage=float(advantages.combined[p, k]),
            is_scored=advantages.valid[p, k].tolist(),
        )
        for p, group in enumerate(groups)
        for k, completion in enumerate(group.rollout.completions)
        if bool(advantages.valid[p, k].any())
    ]
    return TrainBatch(
        micro_batches=tuple(_collate(part) for part in _split(rows, micro_batch_tokens)),
        objectives=objectives,
        weights=objective_weights,
        num_tokens=sum(len(row.completion_ids) for row in rows),
        advantages=advantages,
    )


def _split(rows: Sequence[_Row], budget: int) -> list[list[_Row]]:
    parts: list[list[_Row]] = []
    for row in sorted(rows, key=lambda row: row.length, reverse=True):
        # the first row of a part is its longest: its length is the padded width
        if parts and (len(parts[-1]) + 1) * parts[-1][0].length <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def _collate(rows: Sequence[_Row]) -> MicroBatch:
    texts = [[*row.prompt_ids, *row.completion_ids] for row in rows]
    completions = [row.completion_ids for row in rows]
    return MicroBatch(
        input_ids=_padded(texts, 0),
        attention_mask=_padded([[1] * len(text) for text in texts], 0),
        prompt_lengths=torch.tensor([len(row.prompt_ids) for row in rows]),
        completion_ids=_padded(completions, 0),
        completion_mask=_padded([[1] * len(tokens) for tokens in completions], 0).bool(),
        sampler_logprobs=_padded([row.sampler_logprobs for row in rows], 0.0),
        advantages=torch.tensor([row.advantage for row in rows]),
        is_scored=torch.tensor([row.is_scored for row in rows]),
    )


def _padded(sequences: Sequence[Sequence[float]], fill: float) -> Tensor:
    """[B, T] right-padded with `fill`, int64 or float32 as `fill` is."""
    dtype = torch.float32 if isinstance(fill, float) else torch.int64
    tensors = [torch.tensor(sequence, dtype=dtype) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)
