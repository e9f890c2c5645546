"""Hidden states -> log-probabilities of the sampled tokens, in chunks, so that [tokens, V] is never held.

Pure functions of tensors; knows no model, no batch and no penalties (`process` brings those).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo.update.head import Head, Process, full_precision, plain_values, slope_of_product, values_and_slopes

CHUNK_TOKENS = 192
"""Positions whose logits exist at one time."""

_PRODUCT_ROWS = 8192
"""Rows of the head whose gradient is rounded to half precision at one time, before it joins the sum."""


def token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    process: Process | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    entropy_has_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of its distribution, in nats.

    Args:
        hidden: [N, H] the last hidden state at the position that predicts each target.
        lm_head_weight: [V, H].
        targets: [N] token ids.
        temperature: divides the (processed) logits; > 0.
        bias: [V] of the head, where it has one.
        logit_scale: multiplies the raw logits, bias included, for models that scale them.
        softcap: logits become softcap * tanh(logits / softcap), for models that cap them.
        process: acts on a chunk of raw logits (replay of penalties and filters); see `Process`.
        chunk_tokens: positions per chunk; changes memory, not values.
        entropy_has_gradient: for an entropy bonus; otherwise the entropy is detached, which is cheaper.
    Returns:
        (logprobs [N], entropy [N]), float32.
    Raises:
        ValueError: temperature is not positive, or hidden and targets differ in length.
    """
    both = logprobs_under_both_laws(
        hidden,
        lm_head_weight,
        targets,
        temperature=temperature,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        process=process,
        chunk_tokens=chunk_tokens,
        entropy_has_gradient=entropy_has_gradient,
    )
    return both[0], both[1]


def logprobs_under_both_laws(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    process: Process | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    entropy_has_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `token_logprobs`, and thirdly the log-probabilities [N] without `process`: one set of logits, two normalisers.

    The policy ratio is taken under the first law, the KL under the second (FORMULAS 1).
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need temperature > 0")
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"{hidden.shape[0]} hidden states for {targets.shape[0]} targets")
    if hidden.shape[0] == 0:
        empty = full_precision(hidden.new_zeros(0))
        return empty, empty, empty
    head = Head(
        weight=lm_head_weight,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        process=process,
        entropy_has_gradient=entropy_has_gradient,
    )
    if lm_head_weight.requires_grad or (bias is not None and bias.requires_grad):
        outputs = _LearningHead.apply(hidden, lm_head_weight, bias, targets, head, chunk_tokens)
    else:
        outputs = _FrozenHead.apply(hidden, targets, head, chunk_tokens)
    return outputs  # pyright: ignore[reportReturnType]


@torch.no_grad()
def plain_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """[N] the third of `logprobs_under_both_laws` alone, to the bit, without gradient: the entropy is left out."""
    if len(targets) == 0:
        return full_precision(hidden.new_zeros(0))
    head = Head(
        weight=lm_head_weight,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        process=None,
        entropy_has_gradient=False,
    )
    return torch.cat([plain_values(head, rows, chosen) for rows, chosen, _ in _chunks(hidden, targets, chunk_tokens)])


def _chunks(hidden: Tensor, targets: Tensor, chunk_tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(hidden [C, H], targets [C], positions [C]) of each chunk."""
    positions = torch.arange(hidden.shape[0], device=hidden.device)
    parts = (values.split(chunk_tokens) for values in (hidden, targets, positions))
    return list(zip(*parts, strict=True))


class _FrozenHead(torch.autograd.Function):
    """Values for a head that does not learn, and their gradient without a second pass over the logits.

    Every output is one number per row, and its gradient is linear in what comes from above; so the derivative by the
    row's hidden state, [N, H] per output, is taken while the logits are there, and only scaled in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Head, chunk_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_slopes = ctx.needs_input_grad[0]
        logprobs, entropy, plain, *slopes = _gathered(
            (
                values_and_slopes(head, *chunk, wants_slopes=wants_slopes)
                for chunk in _chunks(hidden, targets, chunk_tokens)
            ),
            len(hidden),
        )
        ctx.is_plain, ctx.dtype = head.process is None, hidden.dtype
        ctx.save_for_backward(*slopes)
        if not head.entropy_has_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy, plain

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # autograd passes ctx by place
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, None, None, None]:
        of_logprobs, of_entropy, of_plain = gradients
        law_slope, *others = ctx.saved_tensors
        if ctx.is_plain:
            total = (of_logprobs + of_plain)[:, None] * law_slope
        else:
            total = of_logprobs[:, None] * law_slope + of_plain[:, None] * others.pop(0)
        if others:
            total = total + of_entropy[:, None] * others[0]
        return total.to(ctx.dtype), None, None, None


class _LearningHead(torch.autograd.Function):
    """Values for a head that learns: its gradient needs what comes from above, so the backward pass makes each chunk's
    logits again and turns them into the gradient, added up over the chunks in full precision."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprobs, entropy, plain = _gathered(
            (values_and_slopes(head, *chunk, wants_slopes=False) for chunk in _chunks(hidden, targets, chunk_tokens)),
            len(hidden),
        )
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        ctx.head, ctx.chunk_tokens = head, chunk_tokens
        if not head.entropy_has_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy, plain

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # autograd passes ctx by place
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        head = replace(ctx.head, weight=weight, bias=bias)  # those whose change in between autograd notices
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight, dtype=_wide(weight)) if wants_weight else None
        of_bias = torch.zeros_like(bias, dtype=_wide(bias)) if wants_bias else None
        per_row = (values.split(ctx.chunk_tokens) for values in (*gradients, entropy))
        for (rows, chosen, positions), *upstream in zip(
            _chunks(hidden, targets, ctx.chunk_tokens), *per_row, strict=True
        ):
            slope = slope_of_product(head, rows, chosen, positions, *upstream)  # [C, V]
            if of_hidden is not None:
                of_hidden[positions] = (slope @ weight).to(hidden.dtype)
            if of_weight is not None:
                _add_product(of_weight, slope.T, rows.to(weight.dtype))
            if of_bias is not None:
                of_bias += slope.sum(dim=0, dtype=of_bias.dtype)
            del slope  # before the next chunk's logits: it is as large as they are
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _gathered(parts: Iterable[tuple[Tensor, ...]], num_rows: int) -> tuple[Tensor, ...]:
    """The chunks' tensors [C, ...], one chunk after another, as [N, ...].

    Written into place at once: kept apart, each would sit where a freed block of logits was, and the next chunk's,
    which no longer fit there, make the heap of a CPU process grow by the size of all logits together.
    """
    whole: tuple[Tensor, ...] = ()
    start = 0
    for chunk in parts:
        whole = whole or tuple(part.new_empty(num_rows, *part.shape[1:]) for part in chunk)
        end = start + len(chunk[0])
        for place, values in enumerate(whole):
            values[start:end] = chunk[place]
        start = end
        del chunk  # before the next is made
    return whole


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, each product rounded to the factors' dtype, the sum to that of the total."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for rows, part in zip(total.split(_PRODUCT_ROWS), left.split(_PRODUCT_ROWS), strict=True):
        rows += part @ right


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
