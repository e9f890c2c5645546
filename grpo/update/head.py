"""Some hidden states through a language-model head: values per row, and derivatives by the states.

What is done to logits is passes over [tokens, V], and on a CPU a pass costs what it moves: so they go a few rows at a
time, which fit in a cache, between two products of many rows. Knows tensors; knows no model and no batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.runtime.filling import filler

CACHED_ROWS = 8
"""Rows of logits that a CPU goes through at a time: 1.5 MB of 49,152 of them."""


def full_precision(values: Tensor) -> Tensor:
    """Float32, or float64 where the values are: sums and exponentials are never taken in half precision."""
    return values if values.dtype == torch.float64 else values.float()


Process = Callable[[Tensor, Tensor], Tensor]
"""(raw logits [C, V] float32, positions [C] into the N given) -> processed logits [C, V], before temperature."""


_PullBack = Callable[[Tensor], Tensor]
"""Derivative [C, V] by a function's result -> by its argument."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
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

    @property
    def can_ban(self) -> bool:
        """Whether a logit may be -inf."""
        return self.process is not None or self.bias is not None

    def product(self, hidden: Tensor) -> Tensor:
        """[C', V] hidden @ weight.T, in the weight's dtype; in half precision on a CPU with rows of 0 behind the C."""
        hidden = hidden.to(self.weight.dtype)
        is_narrow = hidden.dtype.itemsize < torch.float32.itemsize
        if is_narrow and hidden.device.type == "cpu" and (behind := filler(len(hidden))):
            hidden = F.pad(hidden, (0, 0, 0, behind))
        return hidden @ self.weight.T

    def blocks(self, hidden: Tensor) -> Iterator[slice]:
        """Rows that are gone through at a time. A card, and processors, want all at once."""
        size = len(hidden) if self.process is not None or hidden.device.type != "cpu" else CACHED_ROWS
        return (slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size))

    def logits(self, product: Tensor) -> Tensor:
        """[R, V] raw logits. Each line is a pass over [R, V]: those that would change nothing are left out. Overwrites
        a product in full precision."""
        logits = full_precision(product)
        if self.bias is not None:
            logits += self.bias  # before the scale: it belongs to the head
        if self.logit_scale != 1:
            logits *= self.logit_scale
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def scaled(self, logits: Tensor) -> Tensor:
        """[R, V] divided by the temperature."""
        return logits if self.temperature == 1 else logits / self.temperature

    def processed(self, logits: Tensor, positions: Tensor, *, wants_slope: bool) -> tuple[Tensor, _PullBack]:
        """[R, V] logits of the sampling law, and the way back from a derivative by them to one by the raw logits."""
        if self.process is None:
            return logits, lambda slope: slope
        with torch.set_grad_enabled(wants_slope):  # what the processors do to a derivative only they know
            source = logits.detach().requires_grad_(wants_slope)
            processed = self.process(source, positions)
        return processed.detach(), lambda slope: torch.autograd.grad(processed, source, slope, retain_graph=True)[0]

    def before_the_logits(self, slope: Tensor, logits: Tensor | None) -> Tensor:
        """[R, V] derivative by the raw logits -> by the product."""
        if self.softcap is not None:
            assert logits is not None
            slope = slope * (1 - (logits / self.softcap).square())
        return slope if self.logit_scale == 1 else slope * self.logit_scale


def plain_values(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """[C] log-probabilities of the targets under logits / temperature."""
    product = head.product(hidden)  # [C', V]
    found = [
        torch.log_softmax(head.scaled(head.logits(product[rows])), dim=-1).gather(1, targets[rows, None])[:, 0]
        for rows in head.blocks(hidden)
    ]
    return torch.cat(found)


def values_and_slopes(
    head: Head, hidden: Tensor, targets: Tensor, positions: Tensor, *, wants_slopes: bool
) -> tuple[Tensor, ...]:
    """One chunk's three outputs [C], and after them their derivatives [C, H]: of the law, of the plain law where it
    differs, of the entropy where it has a gradient. None of these where no slopes are wanted."""
    product = head.product(hidden)  # [C', V]
    wanted = 1 + (head.process is not None) + head.entropy_has_gradient if wants_slopes else 0
    # a block's first derivative takes the place of what its logits were made of
    derivatives = [product, *(torch.empty_like(product) for _ in range(wanted - 1))][:wanted]
    values: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows in head.blocks(hidden):
        found, errors = _values_and_errors(
            head, product[rows], targets[rows, None], positions[rows], wants_errors=wants_slopes
        )
        values.append(found)
        for place, error in zip(derivatives, errors, strict=True):
            place[rows] = error
        del errors  # before the next block's
    # the constants of the chain are left for the small side
    slopes = (full_precision((one @ head.weight)[: len(hidden)]).div_(-head.temperature) for one in derivatives)
    return *(torch.cat(parts) for parts in zip(*values, strict=True)), *slopes


def _values_and_errors(
    head: Head, product: Tensor, chosen: Tensor, positions: Tensor, *, wants_errors: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """A block's outputs [R], and their derivatives by the product times minus the temperature [R, V]. Args: chosen:
    [R, 1]."""
    logits = head.logits(product)  # [R, V]
    capped = logits if head.softcap is not None else None  # nothing else asks for them again, and they are large
    plain: Tensor | None = None
    errors: list[Tensor] = []
    if head.process is not None:
        plain_law = torch.log_softmax(head.scaled(logits), dim=-1)
        plain = plain_law.gather(1, chosen)[:, 0]
        if wants_errors:
            errors.append(head.before_the_logits(_error(plain_law.exp_(), chosen), capped))
        del plain_law
    processed, pull_back = head.processed(logits, positions, wants_slope=wants_errors)
    law = torch.log_softmax(head.scaled(processed), dim=-1)  # [R, V]
    del logits, processed
    logprobs = law.gather(1, chosen)[:, 0]
    if head.can_ban:
        law.clamp_(min=_LEAST)
    probabilities = law.exp()  # [R, V]
    surprise = law.mul_(probabilities)  # [R, V] in place, as all that follows: fresh memory costs as much as the sum
    entropy = -surprise.sum(dim=-1)
    values = logprobs, entropy, logprobs.clone() if plain is None else plain
    if not wants_errors:
        return values, errors
    if head.entropy_has_gradient:
        by_entropy = pull_back(surprise.addcmul_(probabilities, entropy[:, None]))
        errors.append(head.before_the_logits(by_entropy, capped))
    del law, surprise
    errors.insert(0, head.before_the_logits(pull_back(_error(probabilities, chosen)), capped))
    return values, errors


def slope_of_product(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    positions: Tensor,
    of_logprobs: Tensor,
    of_entropy: Tensor,
    of_plain: Tensor,
    entropy: Tensor,
) -> Tensor:
    """[C, V] one chunk's gradient by the product, in the weight's dtype, from those [C] by its outputs."""
    logits = head.logits(head.product(hidden)[: len(hidden)])  # [C, V]
    chosen = targets[:, None]
    if head.process is None:
        of_logprobs = of_logprobs + of_plain

    def weighted(gradient: Tensor) -> Tensor:
        """[C, 1]"""
        return (gradient / -head.temperature)[:, None]

    plain: Tensor | None = None
    if head.process is not None:
        plain = _error(torch.softmax(head.scaled(logits), dim=-1), chosen).mul_(weighted(of_plain))
    processed, pull_back = head.processed(logits, positions, wants_slope=True)
    scaled = head.scaled(processed)
    capped = logits if head.softcap is not None else None
    del logits, processed
    error = _error(torch.softmax(scaled, dim=-1), chosen).mul_(weighted(of_logprobs))
    if head.entropy_has_gradient:
        law = torch.log_softmax(scaled, dim=-1).clamp_(min=_LEAST)
        error += law.exp() * (law + entropy[:, None]) * weighted(of_entropy)
    del scaled
    slope = pull_back(error)
    slope = head.before_the_logits(slope if plain is None else plain.add_(slope), capped)
    return slope.to(head.weight.dtype)


def _error(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """[R, V] minus the derivative of the chosen log-probability by the logits: every token's probability, less 1 at
    the chosen one. Overwrites the probabilities."""
    return probabilities.scatter_add_(1, chosen, -torch.ones_like(probabilities[:, :1]))


_LEAST = -1e4
"""Log-probability of a dropped token, instead of -inf: its exp is 0 as well, and 0 times it is 0."""
