"""Policy loss per token, and its reduction over a window. Pure functions of tensors and numbers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Variant = Literal["dapo"]

MAX_LOG_RATIO = 20.0
"""Bound on |logprobs - old_logprobs| before exp, in nats."""


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[B, T] probability ratio of the policy to the policy before the update; exactly 1 where masked out."""
    difference = (logprobs - old_logprobs.detach()).masked_fill(~mask, 0.0)  # before exp: inf * 0 is NaN
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    variant: Variant = "dapo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """Clipped policy-gradient loss per token (FORMULAS 5).

    Args:
        logprobs: [B, T] the policy's log-probabilities of the sampled tokens, with gradient.
        old_logprobs: [B, T] the same before this batch's first optimizer step; no gradient flows into them.
        advantages: [B] one per row.
        mask: [B, T] bool, true on the sampled tokens.
        variant: how the loss is formed; `dapo` is GRPO's clipped loss, to be reduced over tokens.
        clip_low: the ratio is clipped below 1 - clip_low.
        clip_high: the ratio is clipped above 1 + clip_high.
    Returns:
        [B, T], exactly 0 where masked out. The caller divides: see `reduce_loss`.
    Raises:
        ValueError: shapes do not fit, or the variant is unknown.
    Source: GRPO eq. 3 (arXiv:2402.03300); separate bounds as in DAPO (arXiv:2503.14476).
    """
    if logprobs.shape != old_logprobs.shape or logprobs.shape != mask.shape:
        raise ValueError(
            f"logprobs {list(logprobs.shape)}, old_logprobs {list(old_logprobs.shape)} and mask {list(mask.shape)} "
            "must have one shape [B, T]"
        )
    if advantages.shape != logprobs.shape[:1]:
        raise ValueError(f"advantages must be [B] = [{logprobs.shape[0]}], got {list(advantages.shape)}")
    if variant != "dapo":
        raise ValueError(f"unknown loss variant {variant!r}; known: dapo")
    ratio = policy_ratio(logprobs, old_logprobs, mask)  # [B, T]
    weight = advantages.detach()[:, None]  # [B, 1]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # [B, T]
    return -torch.minimum(ratio * weight, clipped * weight).masked_fill(~mask, 0.0)


def clipped_tokens(ratio: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """[2] how many tokens the clip at 1 - clip_low (advantage < 0) and at 1 + clip_high (advantage > 0) silenced."""
    weight = advantages[:, None]
    low = (ratio < 1 - clip_low) & (weight < 0) & mask
    high = (ratio > 1 + clip_high) & (weight > 0) & mask
    return torch.stack([low.sum(), high.sum()])


def reduce_loss(token_loss: Tensor, mask: Tensor, *, num_tokens: int) -> Tensor:
    """The micro-batch's part of the window's loss: sum over its loss tokens / loss tokens of the whole window.

    Args:
        token_loss: [B, T] loss of each token of this micro-batch.
        mask: [B, T] bool, the loss tokens.
        num_tokens: loss tokens of the window: all micro-batches on all ranks, counted before its first backward.
    Returns:
        A scalar. The parts of a window add up to the window's loss, however it is split.
    Raises:
        ValueError: num_tokens is not positive.
    Source: token-level reduction of DAPO (arXiv:2503.14476), FORMULAS 6.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; a window without loss tokens has no loss")
    return token_loss.masked_fill(~mask, 0.0).sum() / num_tokens
