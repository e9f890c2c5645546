"""Accumulation: does one window of n micro-batches come to one large batch, and if not, what was done to it?

The gradient that reaches the optimizer is written as a sum of the micro-batches' own gradients. Its coefficients name
the fault: (0, ..., 0, 1) where each overwrites the one before, 1/n each where it was divided twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grpo.batching import TrainBatch
from grpo.diagnostics.checks.subject import Subject, undone, with_made_up_scores
from grpo.diagnostics.findings import Finding
from grpo.update.step import Updater

CHECK = "accumulation"
NUM_MICRO_BATCHES = 4
"""At most so many; more show no other faults."""
MAX_ENTRIES = 2**20
"""So many entries of a gradient are compared, spread evenly over it."""
NEGLIGIBLE = 1e-3
"""A micro-batch's gradient so much smaller than the largest tells nothing of how often it counts."""
TOLERANCE = 0.02
"""Of a coefficient."""
MAX_GAP = {torch.float32: 1e-3}
"""Relative difference between the large batch's gradient and the window's; what is padded otherwise rounds
otherwise."""
ROUNDED_GAP = 0.1
"""The same where products are rounded to 16 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulated:
    """What came to the optimizer, in terms of what went in."""

    coefficients: tuple[float, ...]
    """[n] how often each micro-batch's gradient is in it; 1 each is right."""
    stale: float
    """How often what was in `.grad` before the window is in it; 0 is right."""
    residual: float
    """Relative norm of what is none of these."""
    num_zeroings: int
    """How often a gradient was zeroed after the first micro-batch's was there."""


def check_accumulation(subject: Subject) -> Iterator[Finding]:
    """A window of micro-batches and the same rows as one batch, each up to the optimizer; both are undone."""
    updater, sums = subject.parts.updater, subject.config.update.gradients.method == "sum"
    # what another method makes of several objectives is no sum
    names = () if sums else subject.teaching[0].rollout.prompt.objectives[:1]
    # made-up scores differ from row to row: a micro-batch whose gradient is 0 would show nothing
    groups = [with_made_up_scores(group) for group in (subject.teaching if sums else subject.teaching[:1])]
    whole = subject.batch(groups, micro_batch_tokens=2**40, objectives=names)
    if whole.num_rows < 2:
        yield _not_judged("fewer than two completions to train on")
        return
    batch = _in_parts(subject, groups, names, whole)
    parts = [_own_gradient(updater, loss) for loss in subject.losses(batch)]
    sizes = [float(part.norm()) for part in parts]
    if not min(sizes) > NEGLIGIBLE * max(sizes):
        yield _not_judged("a micro-batch has no gradient of its own: its completions are all alike")
        return
    found = accumulated(updater, batch, parts, max_grad_norm=subject.config.optim.max_grad_norm)
    large = next(_own_gradient(updater, loss) for loss in subject.losses(whole))
    total = torch.stack(parts).sum(dim=0)
    gap = float((total - large).norm() / large.norm().clamp(min=1e-30))
    most = MAX_GAP.get(subject.parts.policy.compute_dtype, ROUNDED_GAP)
    yield judge_accumulation(found, num_tokens=[one.num_tokens for one in batch.micro_batches], gap=gap, max_gap=most)


def _not_judged(why: str) -> Finding:
    return Finding(
        check=CHECK,
        status="warning",
        what=f"not judged: {why}",
        meaning="how micro-batches are added up is not seen",
        remedy="verify other prompts (seed=1), with a higher rollout.temperature or more rollout.max_new_tokens",
    )


def judge_accumulation(found: Accumulated, *, num_tokens: Sequence[int], gap: float, max_gap: float) -> Finding:
    """Args: num_tokens: [n] loss tokens of each micro-batch; gap: relative difference between the large batch's
    gradient and the sum of the micro-batches' own, of which max_gap is rounding."""
    n = len(found.coefficients)
    shown = ", ".join(f"{coefficient:.2f}" for coefficient in found.coefficients)
    figures = {
        "coefficients": list(found.coefficients),
        "stale": found.stale,
        "residual": found.residual,
        "relative_gap_to_one_batch": gap,
        "num_tokens": list(num_tokens),
    }
    fault = name_fault(found)
    if fault is not None:
        return Finding(
            check=CHECK,
            status="failed",
            what=f"{fault[0]} ({n} micro-batches count {shown} times in the window's gradient)",
            meaning="the update is not the gradient of the batch, and nothing else would tell: the loss looks as usual",
            remedy=fault[1],
            figures=figures,
        )
    if not gap <= max_gap:
        return Finding(
            check=CHECK,
            status="failed",
            what=f"{n} micro-batches come to another gradient than the same rows as one batch: {gap:.1%} off",
            meaning="each micro-batch's loss is divided by a count of its own (its tokens or rows), so that short "
            "completions weigh more, or less, by how they were batched",
            remedy="divide by the window's counts: a loss of one's own returns unreduced losses per token",
            figures=figures,
        )
    return Finding(
        check=CHECK,
        status="ok",
        what=f"{n} micro-batches, each once, come to one large batch ({gap:.1e} relative difference; "
        f"rounding is up to {max_gap:.0e})",
        figures=figures,
    )


def name_fault(found: Accumulated) -> tuple[str, str] | None:
    """(what happened, what to do) in words; None where every micro-batch counts once and nothing else does."""
    coefficients, n = found.coefficients, len(found.coefficients)

    def are(*values: float) -> bool:
        return all(
            abs(one - value) <= TOLERANCE * max(1.0, abs(value))
            for one, value in zip(coefficients, values, strict=True)
        )

    mean = sum(coefficients) / n
    if found.stale > 0.5:
        return "the gradient of the window before is still there", "zero the gradients once before each window"
    if are(*[0.0] * n):
        return (
            "the gradient is zero when the optimizer steps",
            "zero before the first backward pass, not after the last",
        )
    if are(*[0.0] * (n - 1), 1.0) and found.num_zeroings:
        return "gradients are zeroed inside the window", "zero the gradients once, before the first micro-batch"
    if are(*[0.0] * (n - 1), 1.0):
        return "each micro-batch overwrites the one before", "add to the gradient: `+=`, not `=` or copy_"
    if are(1.0, *[0.0] * (n - 1)):
        return "only the first micro-batch counts", "go on adding after the first micro-batch"
    if n > 1 and are(*[1 / n] * n):
        return (
            f"the gradient is divided twice: by the window's counts, and by the number of micro-batches ({n})",
            "divide once: the losses are parts of one sum over one denominator already",
        )
    if are(*[mean] * n) and abs(mean - 1) > TOLERANCE:
        return f"the gradient is scaled by {mean:.3g}", "take that factor out: it acts as another learning rate"
    if not are(*[1.0] * n):
        return "micro-batches count differently", "add each micro-batch's gradient exactly once"
    if found.residual > ROUNDED_GAP:
        return (
            f"{found.residual:.0%} of the window's gradient comes from no micro-batch",
            "look for a hook, noise or a second loss between the backward passes and the optimizer",
        )
    return None


def accumulated(updater: Updater, batch: TrainBatch, parts: Sequence[Tensor], *, max_grad_norm: float) -> Accumulated:
    """What the updater's first window leaves for the optimizer; the step is undone.

    Args:
        parts: [n] of [D], the micro-batches' own gradients as `sampled` gives them.
    """
    parameters = updater.policy.trainable_parameters()
    left: list[Tensor] = []
    norms: list[float] = []
    scale = float(torch.stack(list(parts)).pow(2).mean().sqrt()) or 1.0
    generator = torch.Generator().manual_seed(0)
    watch = _Zeroings(parameters)

    def look(*_: Any) -> None:
        if not left:
            left.append(sampled({name: parameter.grad for name, parameter in parameters.items()}))
            watch.is_over = True

    clip = updater.gradients.clip

    def noted(max_norm: float) -> float:
        norms.append(clip(max_norm))
        return norms[-1]

    with undone(updater):
        for parameter in parameters.values():
            parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter)
        stale = sampled({name: parameter.grad for name, parameter in parameters.items()})
        handle = updater.optimizer.register_step_pre_hook(look)
        updater.gradients.clip = noted  # several windows over one batch: the stats tell the last one's norm
        try:
            with watch:
                updater.step(batch)
        finally:
            handle.remove()
            del updater.gradients.clip
    if not left:
        left.append(torch.zeros_like(stale))
    clipped_by = min(1.0, max_grad_norm / (norms[0] + 1e-6)) if norms else 1.0  # as clip_grad_norm_ does it
    basis = torch.stack([*parts, stale], dim=1)  # [D, n + 1]
    sizes = basis.norm(dim=0).clamp(min=1e-30)
    window = left[0] / clipped_by
    solution = torch.linalg.lstsq(basis / sizes, window[:, None]).solution[:, 0] / sizes  # [n + 1]
    rest = window - basis @ solution
    return Accumulated(
        coefficients=tuple(solution[:-1].tolist()),
        stale=float(solution[-1]),
        residual=float(rest.norm() / window.norm().clamp(min=1e-30)),
        num_zeroings=watch.count,
    )


def sampled(gradients: Mapping[str, Tensor | None]) -> Tensor:
    """[D] float64 on the CPU: evenly spread entries, at most MAX_ENTRIES or so; absent gradients are left out."""
    there = [gradient.detach().reshape(-1) for gradient in gradients.values() if gradient is not None]
    stride = max(1, sum(len(gradient) for gradient in there) // MAX_ENTRIES)
    return torch.cat([gradient[::stride].double().cpu() for gradient in there])


class _Zeroings(TorchFunctionMode):
    """Counts how often gradients are zeroed after the first backward pass."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._parameters = list(parameters.values())
        self.count, self.is_over, self._has_begun = 0, False, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in {"grad", "backward"}:
            self._has_begun = True
        is_zeroing = name in {"zero_", "zeros_like"} and bool(args) and self._is_own(args[0])
        if is_zeroing and self._has_begun and not self.is_over:
            self.count += 1
        return func(*args, **(kwargs or {}))

    def _is_own(self, tensor: Any) -> bool:
        return any(tensor is parameter or tensor is parameter.grad for parameter in self._parameters)


def _in_parts(subject: Subject, groups: Sequence[Any], names: Sequence[str], whole: TrainBatch) -> TrainBatch:
    """The same rows in 2 to NUM_MICRO_BATCHES micro-batches or a few more, however long they are."""
    budget = whole.micro_batches[0].padded_tokens // NUM_MICRO_BATCHES
    while True:
        batch = subject.batch(groups, micro_batch_tokens=max(budget, 1), objectives=names)
        if len(batch.micro_batches) <= NUM_MICRO_BATCHES or budget >= whole.micro_batches[0].padded_tokens // 2:
            return batch
        budget = budget * 5 // 4 + 1


def _own_gradient(updater: Updater, loss: Callable[[], Tensor]) -> Tensor:
    parameters = updater.policy.trainable_parameters()
    gradients = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    filled = [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters.values(), gradients, strict=True)
    ]
    return sampled(dict(zip(parameters, filled, strict=True)))
