"""Per-token KL penalties, in nats. Pure functions of tensors; knows no batches, rows or objectives."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from grpo.update.logprobs import full_precision

Estimator = Literal["clamped", "k3"]

K3_SLOPE_LIMIT = 20.0
"""Bound on the magnitude of k3's slope inside the clamp."""


def bounded(log_ratio: Tensor, limit: float) -> Tensor:
    """Clamp to [-limit, limit] with a straight-through gradient, so that beyond the bound there is still a pull.

    A plain clamp has gradient 0 exactly where the policy is furthest from its reference.
    """
    # this order: log_ratio + (clamped - log_ratio) would round, and leave the bound, where log_ratio is large
    return log_ratio.detach().clamp(-limit, limit) + (log_ratio - log_ratio.detach())


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: Estimator = "clamped",
    max_log_ratio: float = 10.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Penalty for moving away from the reference, per token, in nats (FORMULAS 3).

    With d = logprobs - ref_logprobs, clamped to [-max_log_ratio, max_log_ratio]:
    `clamped` is relu(-d): one-sided, linear, cannot explode; its subgradient at d = 0 is exactly 0.
    `k3` is exp(-d) + d - 1: >= 0, low variance. Its slope is bounded inside the clamp.
    Beyond the clamp the value is constant and the gradient straight-through, with magnitude at most 1.

    Args:
        logprobs: [B, T] policy log-probabilities of the sampled tokens, without penalties and filters.
        ref_logprobs: [B, T] the reference's, of the same tokens; no gradient flows into them.
        estimator: see above.
        max_log_ratio: the clamp, in nats.
        mask: [B, T] bool; entries outside are exactly 0, whatever the inputs hold (NaN too). All where None.
    Returns:
        [B, T] penalties, each >= 0, at most max_log_ratio for `clamped`.
    Raises:
        ValueError: the shapes differ, or the estimator is unknown.
    Source: Schulman 2020, "Approximating KL Divergence"; GRPO eq. 4 (arXiv:2402.03300). The clamp is ours.
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(f"logprobs {list(logprobs.shape)} and ref_logprobs {list(ref_logprobs.shape)} differ in shape")
    difference = full_precision(logprobs) - full_precision(ref_logprobs.detach())  # [B, T]
    if mask is not None:
        difference = difference.masked_fill(~mask, 0.0)  # before exp: NaN * 0 is NaN
    if estimator == "clamped":
        # relu, then cap: torch.clamp(min=0) would pull with -1 on every token where policy and reference are equal
        return bounded(torch.relu(-difference), max_log_ratio)
    if estimator == "k3":
        return _k3(difference, max_log_ratio)
    raise ValueError(f"unknown KL estimator {estimator!r}; known: clamped, k3")


def _k3(difference: Tensor, limit: float) -> Tensor:
    """k3's value at the clamped difference; its gradient with the slope bounded (inside 20, beyond the clamp 1)."""
    inside = difference.detach().clamp(-limit, limit)
    value = torch.expm1(-inside) + inside  # expm1 keeps precision near 0
    slope = -torch.expm1(-inside)  # d/dd of k3
    is_beyond = difference.detach().abs() > limit
    slope = torch.where(is_beyond, slope.clamp(-1.0, 1.0), slope.clamp(-K3_SLOPE_LIMIT, K3_SLOPE_LIMIT))
    return value + slope * (difference - difference.detach())
