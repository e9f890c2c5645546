"""Per-token KL penalties, in nats. Pure functions of tensors; knows no batches, rows or objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from grpo.update.head import full_precision

Estimator = Literal["clamped", "k1", "k2", "k3", "k3+", "abs"]

K3_SLOPE_LIMIT = 20.0
"""Bound on the magnitude of k3's slope inside the clamp."""

TAIL_SLOPE_LIMIT = 1.0
"""Bound on the magnitude of every slope beyond the clamp."""


class _Curve(NamedTuple):
    """A penalty as a function of d = policy - reference inside the clamp, and the slope that training uses."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _k3(d: Tensor) -> Tensor:
    return torch.expm1(-d) + d  # expm1 keeps precision near 0


_CURVES: Mapping[Estimator, _Curve] = {
    # slope 0 at d = 0: a pull of -1 on every token of the first LoRA step, where both policies agree, is pure noise
    "clamped": _Curve(lambda d: torch.relu(-d), lambda d: -(d < 0).to(d.dtype)),
    "k1": _Curve(lambda d: d, torch.ones_like),
    "k2": _Curve(lambda d: d.square() / 2, lambda d: d),
    "k3": _Curve(_k3, lambda d: -torch.expm1(-d).clamp(-K3_SLOPE_LIMIT, K3_SLOPE_LIMIT)),
    "k3+": _Curve(_k3, lambda d: d),  # the slope of k2: still sane where k3's explodes
    "abs": _Curve(torch.abs, torch.sign),
}


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
    `k1` is d, `k2` is d^2 / 2, `abs` is |d| with subgradient 0 at 0.
    `k3` is exp(-d) + d - 1, its slope bounded to 20 in magnitude; `k3+` has k3's value and k2's gradient.
    Beyond the clamp the value is constant and the gradient straight-through, with the sign that the slope has at the
    edge and magnitude min(|slope at the edge|, 1): a plain clamp would not pull exactly where the policy is furthest.

    Args:
        logprobs: [B, T] policy log-probabilities of the sampled tokens, without penalties and filters.
        ref_logprobs: [B, T] the reference's, of the same tokens; no gradient flows into them.
        estimator: see above.
        max_log_ratio: the clamp, in nats.
        mask: [B, T] bool; entries outside are exactly 0, whatever the inputs hold (NaN too). All where None.
    Returns:
        [B, T] penalties, each >= 0 but for `k1`; NaN where a log-probability inside the mask is NaN or infinite.
    Raises:
        ValueError: the shapes differ, or the estimator is unknown.
    Source: Schulman 2020, "Approximating KL Divergence"; GRPO eq. 4 (arXiv:2402.03300). The clamp is ours.
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(f"logprobs {list(logprobs.shape)} and ref_logprobs {list(ref_logprobs.shape)} differ in shape")
    if estimator not in _CURVES:
        raise ValueError(f"unknown KL estimator {estimator!r}; known: {', '.join(_CURVES)}")
    difference = full_precision(logprobs) - full_precision(ref_logprobs.detach())  # [B, T]
    if mask is not None:
        difference = difference.masked_fill(~mask, 0.0)  # before exp: NaN * 0 is NaN
    curve = _CURVES[estimator]
    constant = difference.detach()
    inside = constant.clamp(-max_log_ratio, max_log_ratio)  # [B, T]
    slope = curve.slope(inside)  # [B, T]
    is_beyond = constant.abs() > max_log_ratio
    slope = torch.where(is_beyond, slope.clamp(-TAIL_SLOPE_LIMIT, TAIL_SLOPE_LIMIT), slope)
    return curve.value(inside) + slope * (difference - constant)  # [B, T], the second term is 0 and has the gradient
