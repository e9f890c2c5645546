"""Policy loss per token, and its reduction over a window. Pure functions of tensors and numbers.

Also the records that a loss of one's own takes and gives (`LossInput`, `LossOutput`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from grpo.update.head import full_precision

Variant = Literal["dapo", "grpo", "bnpo", "dr_grpo", "gspo", "cispo", "sapo"]
Reduction = Literal["tokens", "rows", "max_tokens"]

REDUCTIONS: Mapping[Variant, Reduction] = {
    "dapo": "tokens",
    "cispo": "tokens",
    "bnpo": "tokens",
    "grpo": "rows",
    "sapo": "rows",
    "gspo": "rows",
    "dr_grpo": "max_tokens",
}
"""What each variant's sum is divided by (FORMULAS 6); see `reduce_loss`."""

RESERVED_METRICS = ("policy", "kl")
"""What the update itself logs under loss/: a metric of a loss of one's own may not add to these."""

MAX_LOG_RATIO = 20.0
"""Bound on a log-ratio before exp, in nats."""


def policy_ratio(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, *, level: Literal["token", "sequence"] = "token"
) -> Tensor:
    """Probability ratio of the policy to the policy before the update.

    Args:
        logprobs, old_logprobs: [B, T]; no gradient flows into the latter.
        mask: [B, T] bool, the loss tokens.
        level: `sequence` gives every token of a row exp(mean log-ratio over the row's tokens) (GSPO, arXiv:2507.18071).
    Returns:
        [B, T] within exp(+-20), constant beyond; exactly 1 where masked out.
    Raises:
        ValueError: shapes do not fit, or the level is unknown.
    """
    _check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    difference = full_precision(logprobs) - full_precision(old_logprobs.detach())  # [B, T]
    log_ratio = difference.masked_fill(~mask, 0.0)  # before exp: inf * 0 is NaN
    if level == "sequence":
        count = mask.sum(dim=1, keepdim=True).clamp(min=1)  # [B, 1]
        row_mean = log_ratio.sum(dim=1, keepdim=True) / count  # [B, 1]
        log_ratio = row_mean.expand(mask.shape).masked_fill(~mask, 0.0)  # [B, T]
    elif level != "token":
        raise ValueError(f"unknown level {level!r}; known: token, sequence")
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def loss_coefficients(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    variant: Variant,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    max_ratio: float = 5.0,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> Tensor:
    """The factor c such that c * advantage is the variant's token loss (FORMULAS 5).

    Only the sign of `advantages` matters here: it decides the side that clips, or SAPO's temperature. Multiplied with
    an objective's share of the advantage, c gives that objective's part of the loss, and the parts add up (FORMULAS 7).

    Args:
        logprobs, old_logprobs, mask, and the options: see `policy_loss`.
        advantages: [B] or [B, T]; 0 counts as unclipped, and for SAPO as not positive.
    Returns:
        [B, T] with the gradient to `logprobs`, exactly 0 where masked out.
    Raises:
        ValueError: as `policy_loss`.
    """
    if variant not in REDUCTIONS:
        raise ValueError(f"unknown loss variant {variant!r}; known: {', '.join(REDUCTIONS)}")
    if delta is not None and delta <= 1 + clip_high:
        raise ValueError(f"delta is {delta}, but must lie above 1 + clip_high = {1 + clip_high}")
    ratio = policy_ratio(logprobs, old_logprobs, mask, level="sequence" if variant == "gspo" else "token")  # [B, T]
    signs = _per_token(advantages, mask)  # [B, T]
    if variant == "cispo":
        weight = ratio.detach().clamp(max=max_ratio)  # [B, T] MiniMax-M1 eq. 4 (arXiv:2506.13585): no token is silenced
        coefficients = -weight * full_precision(logprobs).masked_fill(~mask, 0.0)
    elif variant == "sapo":
        cold = torch.full_like(ratio, temperature_negative)
        temperatures = cold.masked_fill(signs > 0, temperature_positive)  # [B, T]
        coefficients = -4 / temperatures * torch.sigmoid(temperatures * (ratio - 1))  # arXiv:2511.20347
    else:
        coefficients = -_clipped(ratio, signs, clip_low=clip_low, clip_high=clip_high, delta=delta)
    return coefficients.masked_fill(~mask, 0.0)


def _clipped(ratio: Tensor, signs: Tensor, *, clip_low: float, clip_high: float, delta: float | None) -> Tensor:
    """[B, T] ratio, bounded on the side where following the advantage further would leave the trust region.

    min(r*A, clip(r)*A) is A * min(r, 1 + clip_high) for A > 0 and A * max(r, 1 - clip_low) for A < 0; delta bounds the
    latter from above, where nothing else does. At A = 0 the ratio is left as it is.
    """
    highest = torch.full_like(ratio, torch.inf).masked_fill(signs > 0, 1 + clip_high)
    if delta is not None:
        highest = highest.masked_fill(signs < 0, delta)
    lowest = torch.zeros_like(ratio).masked_fill(signs < 0, 1 - clip_low)
    return ratio.clamp(lowest, highest)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    variant: Variant = "dapo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    max_ratio: float = 5.0,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> Tensor:
    """Policy-gradient loss per token (FORMULAS 5).

    Args:
        logprobs: [B, T] the policy's log-probabilities of the sampled tokens, with gradient.
        old_logprobs: [B, T] the same before this batch's first optimizer step; no gradient flows into them.
        advantages: [B] one per row, or [B, T]; no gradient flows into them.
        mask: [B, T] bool, the loss tokens; nothing outside reaches the loss, NaN neither.
        variant: how the loss is formed. `dapo`, `grpo`, `bnpo`, `dr_grpo` are GRPO's clipped loss and differ in their
            reduction only (`REDUCTIONS`); `gspo` clips the row's ratio; `cispo` weights log-probabilities with a
            detached ratio; `sapo` has a soft gate.
        clip_low: for the clipped ones, the ratio is clipped below 1 - clip_low.
        clip_high: and above 1 + clip_high.
        delta: bound from above on the ratio of tokens with a negative advantage (dual clip), > 1 + clip_high.
        max_ratio: for `cispo`, the bound on the ratio.
        temperature_positive: for `sapo`, the gate's temperature where the advantage is positive.
        temperature_negative: and elsewhere.
    Returns:
        [B, T], exactly 0 where masked out. The caller divides: see `reduce_loss`.
    Raises:
        ValueError: shapes do not fit, the variant is unknown, or delta is not above 1 + clip_high.
    Source: GRPO eq. 3 (arXiv:2402.03300); separate bounds as in DAPO (arXiv:2503.14476); dual clip
    (arXiv:1912.09729); GSPO eq. 5 (arXiv:2507.18071); CISPO (arXiv:2506.13585); SAPO (arXiv:2511.20347).
    """
    coefficients = loss_coefficients(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        variant=variant,
        clip_low=clip_low,
        clip_high=clip_high,
        delta=delta,
        max_ratio=max_ratio,
        temperature_positive=temperature_positive,
        temperature_negative=temperature_negative,
    )
    return coefficients * _per_token(advantages, mask).to(coefficients.dtype)


def clipped_tokens(ratio: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """[2] how many tokens the clip at 1 - clip_low (advantage < 0) and at 1 + clip_high (advantage > 0) silenced.

    Args: ratio, mask: [B, T]; advantages: [B] or [B, T]. Raises ValueError where they do not fit.
    """
    signs = _per_token(advantages, mask)  # [B, T]
    low = (ratio < 1 - clip_low) & (signs < 0) & mask
    high = (ratio > 1 + clip_high) & (signs > 0) & mask
    return torch.stack([low.sum(), high.sum()])


def reduce_loss(
    token_loss: Tensor,
    mask: Tensor,
    *,
    num_tokens: int,
    reduction: Reduction = "tokens",
    num_rows: int | None = None,
    max_new_tokens: int | None = None,
) -> Tensor:
    """The micro-batch's part of the window's loss (FORMULAS 6).

    A window is all micro-batches on all ranks between two optimizer steps; its counts are taken before its first
    backward. `tokens`: sum / num_tokens. `rows`: sum over rows of the row's token mean / num_rows. `max_tokens`:
    sum / (num_rows * max_new_tokens), a constant, so that a row's weight does not depend on its length.

    Args:
        token_loss: [B, T] loss of each token of this micro-batch; a row is never split over two.
        mask: [B, T] bool, the loss tokens.
        num_tokens: loss tokens of the window.
        reduction: see above.
        num_rows: rows of the window that have loss tokens; for `rows` and `max_tokens`.
        max_new_tokens: the longest that a completion can be; for `max_tokens`.
    Returns:
        A scalar. The parts of a window add up to the window's loss, however it is split.
    Raises:
        ValueError: shapes do not fit, the reduction is unknown, or a count that it needs is missing or below 1.
    Source: DAPO (arXiv:2503.14476), GRPO (arXiv:2402.03300), Dr. GRPO (arXiv:2503.20783).
    """
    _check_same_shape(token_loss=token_loss, mask=mask)
    row_sums = full_precision(token_loss).masked_fill(~mask, 0.0).sum(dim=1)  # [B]
    if reduction == "tokens":
        return row_sums.sum() / _at_least_one(num_tokens=num_tokens)
    if reduction == "rows":
        row_means = row_sums / mask.sum(dim=1).clamp(min=1)  # [B], 0 for a row without loss tokens
        return row_means.sum() / _at_least_one(num_rows=num_rows)
    if reduction == "max_tokens":
        return row_sums.sum() / (_at_least_one(num_rows=num_rows) * _at_least_one(max_new_tokens=max_new_tokens))
    raise ValueError(f"unknown reduction {reduction!r}; known: tokens, rows, max_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInput:
    """What a loss of one's own is given: one micro-batch. Entries outside the mask are arbitrary, NaN included."""

    logprobs: Tensor
    """[B, T] the policy's log-probabilities of the sampled tokens, with gradient, under the sampling law."""
    old_logprobs: Tensor
    """[B, T] the policy's before this batch's first optimizer step, under the sampling law."""
    sampler_logprobs: Tensor
    """[B, T] as the engine reported them."""
    ref_logprobs: Tensor
    """[B, T] the frozen reference's, under logits / temperature, without penalties and filters."""
    advantages: Tensor
    """[B] or [B, T] the combined advantages, detached."""
    mask: Tensor
    """[B, T] bool, the loss tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """What a loss of one's own gives back; the update masks it, adds the KL and entropy terms, and divides."""

    token_loss: Tensor
    """[B, T] loss of each token, not divided by any count; its gradient must reach `logprobs`."""
    metrics: Mapping[str, Tensor]
    """Name -> [B, T], logged as loss/<name>, a mean over the window's loss tokens, or [B], as one over its rows with
    any; `policy` and `kl` are taken."""


CustomLoss = Callable[..., LossOutput]
"""(LossInput, **params of the recipe) -> LossOutput."""


def load_custom_loss(path: str) -> CustomLoss:
    """The function that `path` names.

    Args:
        path: "package.module:name", importable from where the run starts.
    Raises:
        ValueError: the path has another form, its module cannot be imported, or holds no such function.
    """
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise ValueError(f"the loss {path!r} is not of the form package.module:name")
    try:
        module = importlib.import_module(module_name)
    except Exception as exc:  # whatever a module of the user's does when it is run
        raise ValueError(
            f"the loss {path!r} cannot be loaded, for importing its module ends in {type(exc).__name__}: {exc}. Put "
            "the module beside the recipe, or install it"
        ) from exc
    if not hasattr(module, name):
        raise ValueError(f"the loss {path!r} cannot be loaded: {module_name} holds nothing named {name}")
    loss = getattr(module, name)
    if not callable(loss):
        raise ValueError(f"the loss {path!r} is a {type(loss).__name__}; expected a function of LossInput")
    return cast(CustomLoss, loss)


def check_custom_output(output: object, inputs: LossInput) -> LossOutput:
    """The output of a loss of one's own, once it is known to fit its input.

    Raises:
        ValueError: it is no LossOutput, token_loss or a metric has another shape, token_loss has no gradient, or a
            metric has a name that the update itself logs.
    """
    if not isinstance(output, LossOutput):
        raise ValueError(f"a custom loss must give back a LossOutput, got {type(output).__name__}")
    shape = inputs.logprobs.shape
    if not isinstance(output.token_loss, Tensor) or output.token_loss.shape != shape:
        raise ValueError(
            f"token_loss of a custom loss must be a tensor [B, T] = {list(shape)}, got {_shown(output.token_loss)}; "
            "the update divides, not the loss"
        )
    if inputs.logprobs.requires_grad and not output.token_loss.requires_grad:
        raise ValueError(
            "token_loss of a custom loss has no grad_fn: nothing would be learned. Compute it from logprobs, without "
            "detach, no_grad or item()"
        )
    for name, values in output.metrics.items():
        if name in RESERVED_METRICS:
            raise ValueError(
                f"metric {name!r} of a custom loss has a name that the update itself logs; give it another than "
                f"{', '.join(RESERVED_METRICS)}"
            )
        if not isinstance(values, Tensor) or values.shape not in (shape, shape[:1]):
            raise ValueError(
                f"metric {name!r} of a custom loss must be a tensor [B, T] = {list(shape)} or [B] = {list(shape[:1])}, "
                f"got {_shown(values)}"
            )
    return output


def _shown(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """[B] or [B, T] -> [B, T] detached, 0 where masked out. Raises ValueError for another shape."""
    if advantages.shape == mask.shape[:1]:
        advantages = advantages[:, None].expand(mask.shape)  # [B, T]
    elif advantages.shape != mask.shape:
        raise ValueError(
            f"advantages must be [B] = {list(mask.shape[:1])} or [B, T] = {list(mask.shape)}, "
            f"got {list(advantages.shape)}"
        )
    return advantages.detach().masked_fill(~mask, 0.0)


def _check_same_shape(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"{shapes} must have one shape [B, T]")


def _at_least_one(**count: int | None) -> int:
    """The one count given by name. Raises ValueError where it is missing or below 1."""
    ((name, value),) = count.items()
    if value is None or value < 1:
        raise ValueError(f"{name} is {value}, but this reduction divides by it: a window needs at least 1")
    return value
