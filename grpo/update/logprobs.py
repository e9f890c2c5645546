"""Hidden states -> log-probabilities of the sampled tokens, in chunks, so that [tokens, V] is never held.

Pure functions of tensors; knows no model, no batch and no penalties (`process` brings those).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 256
"""Positions whose logits exist at one time."""


def full_precision(values: Tensor) -> Tensor:
    """Float32, or float64 where the values are: sums and exponentials are never taken in half precision."""
    return values if values.dtype == torch.float64 else values.float()


Process = Callable[[Tensor, Tensor], Tensor]
"""(raw logits [C, V] float32, positions [C] into the N given) -> processed logits [C, V], before temperature."""


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
    head = _Head(
        weight=lm_head_weight,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        process=process,
        entropy_has_gradient=entropy_has_gradient,
    )
    learns = lm_head_weight.requires_grad or (bias is not None and bias.requires_grad)
    if learns and torch.is_grad_enabled():
        parts = [
            # logits again in the backward pass
            checkpoint(head.logprobs, *chunk, use_reentrant=False)
            for chunk in _chunks(hidden, targets, chunk_tokens)
        ]
        logprobs, entropy, plain = (torch.cat(part) for part in zip(*parts, strict=True))
        return logprobs, entropy, plain
    return _FrozenHead.apply(hidden, targets, head, chunk_tokens)  # pyright: ignore[reportReturnType]


def _chunks(hidden: Tensor, targets: Tensor, chunk_tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(hidden [C, H], targets [C], positions [C]) of each chunk."""
    positions = torch.arange(hidden.shape[0], device=hidden.device)
    parts = (values.split(chunk_tokens) for values in (hidden, targets, positions))
    return list(zip(*parts, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """A language-model head with the sampling law that follows it."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    """[V]"""
    logit_scale: float
    softcap: float | None
    temperature: float
    process: Process | None
    entropy_has_gradient: bool

    def logits(self, hidden: Tensor) -> Tensor:
        """[C, V] raw logits. Each line is a pass over [C, V]: those that would change nothing are left out."""
        logits = full_precision(hidden.to(self.weight.dtype) @ self.weight.T)
        logits = logits if self.bias is None else logits + self.bias  # before the scale: it belongs to the head
        logits = logits if self.logit_scale == 1 else logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def scaled(self, logits: Tensor) -> Tensor:
        """[C, V] divided by the temperature."""
        return logits if self.temperature == 1 else logits / self.temperature

    def logprobs(self, hidden: Tensor, targets: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One chunk by autograd: log-probabilities, entropy and plain log-probabilities, each [C]."""
        logits = self.logits(hidden)
        plain = torch.log_softmax(self.scaled(logits), dim=-1)  # [C, V]
        law = plain if self.process is None else torch.log_softmax(self.scaled(self.process(logits, positions)), dim=-1)
        chosen = targets[:, None]
        entropy = _entropy(law if self.entropy_has_gradient else law.detach())
        return law.gather(1, chosen)[:, 0], entropy, plain.gather(1, chosen)[:, 0]


class _FrozenHead(torch.autograd.Function):
    """The same for a head that does not learn, without a second pass over the logits.

    Every output is one number per row, and its gradient is linear in what comes from above; so the derivative by the
    row's hidden state, [N, H] per output, is taken while the logits are there, and only scaled in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: _Head, chunk_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        slopes: list[tuple[Tensor, ...]] = []
        for chunk in _chunks(hidden, targets, chunk_tokens):
            values, chunk_slopes = _values_and_slopes(head, *chunk, wants_slopes=ctx.needs_input_grad[0])
            parts.append(values)
            slopes.append(chunk_slopes)
        logprobs, entropy, plain = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.is_plain, ctx.dtype = head.process is None, hidden.dtype
        ctx.save_for_backward(*(torch.cat(part) for part in zip(*slopes, strict=True)))
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


def _values_and_slopes(
    head: _Head, hidden: Tensor, targets: Tensor, positions: Tensor, *, wants_slopes: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """One chunk's three outputs [C], and their derivatives [C, H]: of the law, of the plain law where it differs, of
    the entropy where it has a gradient. None where no slopes are wanted."""
    logits = head.logits(hidden)  # [C, V]
    chosen = targets[:, None]

    def to_hidden(slope: Tensor) -> Tensor:
        """The chain from the logits back through cap and scale: [C, V] -> [C, H]."""
        if head.softcap is not None:
            slope = slope * (1 - (logits / head.softcap).square())
        slope = slope if head.logit_scale == 1 else slope * head.logit_scale
        return full_precision(slope.to(head.weight.dtype) @ head.weight)

    if head.process is None:
        law = torch.log_softmax(head.scaled(logits), dim=-1)
        values = law.gather(1, chosen)[:, 0], _entropy(law)
        slopes = tuple(_slopes(head, law, chosen, values[1])) if wants_slopes else ()
        return (*values, values[0].clone()), tuple(to_hidden(slope) for slope in slopes)

    plain = torch.log_softmax(head.scaled(logits), dim=-1)
    plain_value = plain.gather(1, chosen)[:, 0]
    plain_slope = to_hidden(_logprob_slope(head, plain, chosen)) if wants_slopes else None
    with torch.set_grad_enabled(wants_slopes):  # what the processors do to a derivative only they know
        source = logits.detach().requires_grad_(wants_slopes)
        processed = head.process(source, positions)  # [C, V]
    law = torch.log_softmax(head.scaled(processed.detach()), dim=-1)
    values = law.gather(1, chosen)[:, 0], _entropy(law), plain_value
    if plain_slope is None:
        return values, ()
    through = [
        to_hidden(torch.autograd.grad(processed, source, slope, retain_graph=True)[0])
        for slope in _slopes(head, law, chosen, values[1])
    ]
    return values, (through[0], plain_slope, *through[1:])


def _slopes(head: _Head, law: Tensor, chosen: Tensor, entropy: Tensor) -> list[Tensor]:
    """[C, V] derivatives by the (processed) logits of the chosen log-probability and, where asked, of the entropy."""
    slopes = [_logprob_slope(head, law, chosen)]
    if head.entropy_has_gradient:
        # d(-sum p log p)/dz = -p (log p + entropy)
        slopes.append(head.scaled(-law.exp() * (_finite(law) + entropy[:, None])))
    return slopes


def _logprob_slope(head: _Head, law: Tensor, chosen: Tensor) -> Tensor:
    """[C, V] 1 at the chosen token minus every token's probability, over the temperature."""
    slope = law.exp().neg_()
    return head.scaled(slope.scatter_add_(1, chosen, torch.ones_like(slope[:, :1])))


def _entropy(logprobs: Tensor) -> Tensor:
    """[C] entropy of each row of [C, V] log-probabilities; a filtered token (-inf) adds 0, not 0 * -inf."""
    finite = _finite(logprobs)
    return -(finite.exp() * finite).sum(dim=-1)


def _finite(logprobs: Tensor) -> Tensor:
    """-inf as a number whose exp is 0 as well."""
    return logprobs.clamp(min=-1e4)
