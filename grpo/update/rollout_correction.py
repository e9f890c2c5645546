"""Weights for the gap between the engine that sampled and the policy that is trained. Pure functions of tensors."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from grpo.update.head import full_precision
from grpo.update.losses import MAX_LOG_RATIO


def correction_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    *,
    level: Literal["token", "sequence"] = "token",
    mode: Literal["truncate", "mask"] = "truncate",
    low: float = 0.5,
    high: float = 2.0,
    sequence_log_ratio: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Importance weights exp(old - sampler) of the policy term, bounded (FORMULAS 5).

    Args:
        old_logprobs: [B, T] the policy's log-probabilities before this batch's first optimizer step.
        sampler_logprobs: [B, T] as the engine reported them, of the same tokens.
        mask: [B, T] bool, the loss tokens.
        level: a weight for each token, or one for all tokens of a row.
        mode: `truncate` bounds the weight at `high`; `mask` makes it 0 outside [low, high]. Tokens of weight 0 stay in
            the loss's denominators.
        low: for `mask` only.
        high: the upper bound.
        sequence_log_ratio: a row's log-ratio is the `mean` over its tokens (biased, but length does not decide) or
            their `sum` (the sequence's own importance weight).
    Returns:
        [B, T] detached weights, exactly 1 where masked out.
    Raises:
        ValueError: shapes do not fit, or a choice is unknown.
    Source: truncated importance sampling (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy
    RL Training"); the mean over tokens as in GSPO (arXiv:2507.18071).
    """
    _check_choice("level", level, ("token", "sequence"))
    _check_choice("mode", mode, ("truncate", "mask"))
    _check_choice("sequence_log_ratio", sequence_log_ratio, ("mean", "sum"))
    log_ratio = _log_ratio(old_logprobs, sampler_logprobs, mask)  # [B, T]
    if level == "sequence":
        total = log_ratio.sum(dim=1, keepdim=True)  # [B, 1]
        count = mask.sum(dim=1, keepdim=True).clamp(min=1)  # [B, 1]
        log_ratio = (total / count if sequence_log_ratio == "mean" else total).expand(mask.shape)
    weights = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()  # [B, T]
    bounded = weights.clamp(max=high) if mode == "truncate" else weights * ((weights >= low) & (weights <= high))
    return bounded.masked_fill(~mask, 1.0)


def ratio_tails(old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[N] |old - sampler| in nats on the N loss tokens, before any truncation: what percentiles are taken of.

    Args: [B, T] each, as in `correction_weights`. Raises ValueError where their shapes differ.
    """
    return _log_ratio(old_logprobs, sampler_logprobs, mask)[mask].abs()


def _log_ratio(old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[B, T] detached log(old / sampler), exactly 0 where masked out."""
    if not old_logprobs.shape == sampler_logprobs.shape == mask.shape:
        raise ValueError(
            f"old_logprobs {list(old_logprobs.shape)}, sampler_logprobs {list(sampler_logprobs.shape)} and mask "
            f"{list(mask.shape)} must have one shape [B, T]"
        )
    difference = full_precision(old_logprobs.detach()) - full_precision(sampler_logprobs.detach())
    return difference.masked_fill(~mask, 0.0)  # before exp: inf * 0 is NaN


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
