"""Scores [P, K, O] -> advantages. Knows tensors; knows nothing of rewards, tokens or models.

A missing verdict is NaN. It gets advantage 0 and moves nothing else: not the group's mean, not its
standard deviation (FORMULAS 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RANGE_TOLERANCE = 1e-6
"""Scores of a group that differ by no more than this share of their size count as equal."""

Combine = Literal["decoupled", "summed"]
Scale = Literal["group", "batch", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """What the policy gradient weighs each completion with."""

    per_objective: Tensor
    """[P, K, O] each objective's advantage, exactly 0 where there is no verdict. Weights are not applied."""
    combined: Tensor
    """[P, K] the advantage that the loss uses."""
    valid: Tensor
    """[P, K, O] bool: a verdict is there and the objective applies."""
    is_flat: Tensor
    """[P, O] bool: at least two verdicts, all equal; such a group teaches nothing."""
    scale_factor: float
    """What the combined advantage was multiplied with, 1 / (std + eps); 1.0 where nothing was rescaled."""

    def shares(self, weights: Tensor) -> Tensor:
        """[P, K, O] each objective's share of `combined`, given the weights [O] it was made with (FORMULAS 7).

        They add up to `combined`.
        """
        return self.per_objective * weights.to(self.per_objective) * self.scale_factor


def group_advantages(
    scores: Tensor,
    weights: Tensor,
    *,
    combine: Combine = "decoupled",
    scale: Scale = "group",
    eps: float = 1e-4,
    applies: Tensor | None = None,
) -> Advantages:
    """Group-relative advantages of K completions per prompt for O objectives.

    Args:
        scores: [P, K, O] scores, NaN where there is no verdict.
        weights: [O] weight of each objective, applied after normalising (`decoupled`) or to the scores (`summed`).
        combine: `decoupled` normalises each objective on its own, sums, and rescales over the batch (GDPO);
            `summed` adds the weighted scores first (classic GRPO): there a row that misses one of its objectives
            is itself missing.
        scale: divide by the standard deviation of the `group`, of the objective's scores in the `batch`, or by `none`.
        eps: added to every standard deviation.
        applies: [P, O] bool, which objectives score which prompt; all where None.
    Returns:
        Advantages, float32 (float64 for float64 scores).
    Raises:
        ValueError: shapes do not fit, or a score is infinite.
    Source: Shao et al. 2024 (arXiv:2402.03300); GDPO (arXiv:2601.05242); `scale: none` as in Dr. GRPO
    (arXiv:2503.20783).
    """
    if scores.dim() != 3 or weights.shape != scores.shape[-1:]:
        raise ValueError(
            f"scores must be [P, K, O] and weights [O], got {list(scores.shape)} and {list(weights.shape)}"
        )
    if torch.isinf(scores).any():
        raise ValueError("scores hold an infinite value; a reward must answer a finite number, or None")
    scores = scores.detach()
    scores = scores if scores.dtype == torch.float64 else scores.float()  # [P, K, O]
    weights = weights.to(scores)  # [O]
    valid = ~scores.isnan()  # [P, K, O]
    if applies is not None:
        valid = valid & applies[:, None, :]
    if combine == "summed":
        return _summed(scores, weights, valid, applies, scale=scale, eps=eps)
    per_objective, is_flat = _normalise(scores, valid, scale=scale, eps=eps)  # [P, K, O], [P, O]
    weighted = (per_objective * weights).sum(dim=-1)  # [P, K]
    combined, factor = weighted, 1.0
    if scores.shape[-1] >= 2:
        # every (p, o) is centred, so the batch mean is 0 and rows at 0 stay exactly 0
        factor = _rescaling(weighted[valid.any(dim=-1)], eps)
        combined = weighted * factor
    return Advantages(per_objective=per_objective, combined=combined, valid=valid, is_flat=is_flat, scale_factor=factor)


def _rescaling(rows: Tensor, eps: float) -> float:
    """1 / (std + eps) over the rows that have any verdict; 0 for fewer than two rows."""
    if rows.numel() < 2:
        return 0.0
    return float(1.0 / (rows.std() + eps))


def _summed(
    scores: Tensor, weights: Tensor, valid: Tensor, applies: Tensor | None, *, scale: Scale, eps: float
) -> Advantages:
    asked = torch.ones_like(valid) if applies is None else applies[:, None, :].expand_as(valid)
    is_complete = (valid | ~asked).all(dim=-1) & valid.any(dim=-1)  # [P, K]
    valid = valid & is_complete[..., None]
    total = (scores.masked_fill(~valid, 0.0) * weights).sum(dim=-1, keepdim=True)  # [P, K, 1]
    sums = is_complete[..., None]  # [P, K, 1]
    combined, is_flat = _normalise(total, sums, scale=scale, eps=eps)
    # an objective's part of the sum, over the sum's own divisor: the weighted parts add up to `combined`
    parts = _centred(scores, valid)[0] / _divisor(total, sums, scale=scale, eps=eps)  # [P, K, O]
    teaches = ~is_flat[:, None, :] & (sums.sum(dim=1, keepdim=True) >= 2)  # [P, 1, 1]
    return Advantages(
        per_objective=torch.where(teaches & valid, parts, 0.0),
        combined=combined[..., 0],
        valid=valid,
        is_flat=is_flat & asked.any(dim=1),
        scale_factor=1.0,
    )


def _centred(scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Scores minus their group's mean over the verdicts ([P, K, O], 0 where missing), and verdict counts [P, 1, O]."""
    count = valid.sum(dim=1, keepdim=True)  # [P, 1, O]
    filled = scores.masked_fill(~valid, 0.0)
    mean = _ordered_sum(filled) / count.clamp(min=1)  # [P, 1, O]
    return (filled - mean).masked_fill(~valid, 0.0), count


def _ordered_sum(filled: Tensor) -> Tensor:
    """[P, K, O] -> [P, 1, O], added from left to right, so that the 0 of a missing row moves no bit.

    `sum` groups its terms by their places and strides: there, a missing row would move the others by a rounding.
    """
    return filled.cumsum(dim=1)[:, -1:]


def _normalise(scores: Tensor, valid: Tensor, *, scale: Scale, eps: float) -> tuple[Tensor, Tensor]:
    """Centre and scale each (prompt, objective) over its verdicts: [P, K, O] advantages and [P, O] flat groups."""
    centred, count = _centred(scores, valid)
    highest = scores.masked_fill(~valid, -torch.inf).amax(dim=1)  # [P, O]
    lowest = scores.masked_fill(~valid, torch.inf).amin(dim=1)  # [P, O]
    largest = scores.masked_fill(~valid, 0.0).abs().amax(dim=1)  # [P, O]
    is_enough = count[:, 0] >= 2  # [P, O]
    is_flat = is_enough & (highest - lowest <= RANGE_TOLERANCE * largest.clamp(min=1.0))
    centred = centred / _divisor(scores, valid, scale=scale, eps=eps)
    teaches = (is_enough & ~is_flat)[:, None, :]  # [P, 1, O]
    return torch.where(teaches & valid, centred, 0.0), is_flat


def _divisor(scores: Tensor, valid: Tensor, *, scale: Scale, eps: float) -> Tensor:
    """What centred scores are divided by: [P, 1, O] for `group`, [O] for `batch`, 1 for `none`."""
    if scale == "none":
        return torch.ones_like(scores[:1, :1])
    if scale == "batch":
        return _batch_std(scores, valid) + eps
    # a centred sum, not E[x^2] - E[x]^2, which cancels for scores far from 0
    centred, count = _centred(scores, valid)
    return (_ordered_sum(centred.square()) / (count - 1).clamp(min=1)).sqrt() + eps


def _batch_std(scores: Tensor, valid: Tensor) -> Tensor:
    """[O] unbiased standard deviation of each objective's verdicts in the batch; 0 for fewer than two."""
    centred, count = _centred(scores.flatten(0, 1)[None], valid.flatten(0, 1)[None])  # [1, P*K, O], [1, 1, O]
    return (_ordered_sum(centred.square()) / (count - 1).clamp(min=1)).sqrt()[0, 0]
