"""Window gradients: every micro-batch's gradient is added to what is there. Knows tensors only.

The two classic failures are impossible by shape: nothing between `start_window` and the optimizer's step can zero or
overwrite a gradient with one micro-batch's, because adding is the only thing that `add` does. Several objectives'
gradients are kept apart until the window is whole, then combined once (FORMULAS 7).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from grpo.update.combination import CombinationMethod, combination_weights

_BUCKET_BYTES = 32 * 2**20
"""Small tensors travel between ranks together, up to so many bytes at once; a larger tensor travels alone."""
_GRAM_COLUMNS = 2**20
"""So many entries of each gradient are in float64 at a time."""


def combine_gradients(gradients: Tensor, *, method: CombinationMethod = "sum", seed: int = 0) -> Tensor:
    """One gradient from several objectives' window gradients, on the scale of their sum.

    Args:
        gradients: [O, D] one row per objective, accumulated over a whole window; combining each micro-batch's own and
            adding up is something else.
        method: `sum`, `pcgrad`, `cagrad` or `mgda` (FORMULAS 7, grpo.update.combination).
        seed: of PCGrad's orders.
    Returns:
        [D] in the gradients' dtype; the one row unchanged where O = 1.
    Raises:
        ValueError: gradients is not [O, D] with O >= 1, an entry is not finite, or the method is unknown.
    """
    if gradients.ndim != 2 or not len(gradients):
        raise ValueError(f"gradients are [O, D] with O >= 1, these are {list(gradients.shape)}")
    return _weighted_sum(combination_weights(gram_matrix(gradients), method=method, seed=seed), gradients)


def gram_matrix(gradients: Tensor) -> Tensor:
    """[O, O] inner products of the O gradients [O, ...], in float64 on the CPU; a part at a time is in float64."""
    num_objectives = len(gradients)
    gram = torch.zeros(num_objectives, num_objectives, dtype=torch.float64, device=gradients.device)
    rows = gradients.detach().reshape(num_objectives, gradients[0].numel())  # [O, D]
    for part in rows.split(_GRAM_COLUMNS, dim=1):
        wide = part.double()  # [O, columns]
        gram += wide @ wide.T
    return gram.cpu()


class GradientWindow:
    """The gradient of one window, kept in `.grad`, in the parameters' dtype; each objective's apart where asked for.

    start_window() -> add(loss) for each micro-batch -> reduce() over the ranks -> combine() where objectives are kept
    apart -> clip() -> the optimizer steps. The caller's losses are parts of one sum over one denominator (FORMULAS 6),
    so that their gradients add up to the window's gradient.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Args: parameters: name -> parameter that learns. Raises ValueError for none, or one that is frozen."""
        frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
        if frozen or not parameters:
            raise ValueError(f"a window needs parameters that learn; frozen: {frozen or 'all'}")
        self._parameters = dict(parameters)
        self._per_objective: list[Tensor] = []  # [O, *shape] for each parameter, between start_window and combine

    def start_window(self, *, num_objectives: int = 0) -> None:
        """Zero every gradient: once per window, before its first micro-batch.

        Args:
            num_objectives: O objectives' gradients are kept apart, at a cost of O gradients of all parameters that
                learn, in float32 (float64 for parameters in float64), until combine() frees them. 0: none is.
        """
        for parameter in self._parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self._per_objective = [
            torch.zeros(num_objectives, *parameter.shape, dtype=_wide(parameter.dtype), device=parameter.device)
            for parameter in self._parameters.values()
            if num_objectives
        ]

    def add(self, loss: Tensor, *, objective: int | None = None, keep_graph: bool = False) -> None:
        """Add the gradient of one micro-batch's part of the window's loss.

        Costs a second gradient of all parameters that learn while it runs: the micro-batch's own, beside the window's.
        A rank, or an objective, that has nothing to learn from a micro-batch does not call this.

        Args:
            objective: index of the objective that the loss is a share of; None adds to `.grad` itself.
            keep_graph: another loss of the same forward pass is added next.
        Raises:
            RuntimeError: the loss is detached from every parameter: nothing could be learned from it.
            ValueError: the window was not started with that many objectives, or is combined already.
        """
        sums = self._sums(objective)
        gradients: tuple[Tensor | None, ...] = ()
        if loss.requires_grad:
            gradients = torch.autograd.grad(
                loss, list(self._parameters.values()), allow_unused=True, retain_graph=keep_graph
            )
        if all(gradient is None for gradient in gradients):
            raise RuntimeError(
                "the loss is detached from the parameters (no grad_fn leads to any of them): a no_grad block, a detach "
                "or an integer cast lies between them, and nothing would be learned"
            )
        for window_sum, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                window_sum.add_(gradient)

    def reduce(self, all_reduce: Callable[[Tensor], Tensor] | None) -> None:
        """Add the ranks' gradients together: once per window, after every rank's last micro-batch, on every rank.

        A rank that added nothing takes part with zeros. What travels is at least float32, whatever the gradients are.

        Args:
            all_reduce: a flat tensor -> its sum over the ranks, in place or new; None: this is the only rank.
        """
        if all_reduce is None:
            return
        sums = [*self._sums(None), *(part for stack in self._per_objective for part in stack)]
        for bucket in _buckets(sums):
            flat = torch.cat([each.reshape(-1).to(_wide(each.dtype)) for each in bucket])
            reduced = all_reduce(flat).split([each.numel() for each in bucket])
            for each, total in zip(bucket, reduced, strict=True):
                each.copy_(total.view_as(each))

    def combine(self, method: CombinationMethod = "sum", seed: int = 0) -> Tensor:
        """Combine the objectives' gradients and add the result to `.grad`; frees them, so it is once per window.

        The weights are worked out on each rank from its own copy of the reduced gradients.

        Args:
            method: FORMULAS 7; with `sum`, `.grad` ends as plain accumulation would have left it.
            seed: of PCGrad's orders; the same on every rank, another in each window.
        Returns:
            [O, O] inner products of the objectives' gradients, in float64 on the CPU, for gradient_cosines.
        Raises:
            ValueError: no objective is kept apart, or a gradient is not finite: ask first_non_finite() before.
        """
        if not self._per_objective:
            raise ValueError("no objective's gradient is kept apart: start_window(num_objectives=O), combine() once")
        gram = torch.stack([gram_matrix(stack) for stack in self._per_objective]).sum(dim=0)
        weights = combination_weights(gram, method=method, seed=seed)
        for window_sum, stack in zip(self._sums(None), self._per_objective, strict=True):
            window_sum.add_(_weighted_sum(weights, stack))
        self._per_objective = []
        return gram

    def first_non_finite(self) -> str | None:
        """Name of the first parameter whose gradient, or an objective's share of it, holds NaN or infinity."""
        for i, (name, parameter) in enumerate(self._parameters.items()):
            held = [] if parameter.grad is None else [parameter.grad]
            if not all(bool(torch.isfinite(each).all()) for each in held + self._per_objective[i : i + 1]):
                return name
        return None

    def clip(self, max_norm: float) -> float:
        """Scale the whole gradient down to max_norm, once per window; returns its norm before.

        Raises:
            RuntimeError: the objectives' gradients are not combined yet.
        """
        if self._per_objective:
            raise RuntimeError("the objectives' gradients are not in `.grad` yet: combine() comes before clip()")
        return float(nn.utils.clip_grad_norm_(list(self._parameters.values()), max_norm))

    def _sums(self, objective: int | None) -> list[Tensor]:
        """What the window's gradients are added to, one tensor per parameter."""
        if objective is None:
            gradients = [parameter.grad for parameter in self._parameters.values()]
            assert all(gradient is not None for gradient in gradients)  # start_window comes first
            return [gradient for gradient in gradients if gradient is not None]
        num_objectives = len(self._per_objective[0]) if self._per_objective else 0
        if not 0 <= objective < num_objectives:
            raise ValueError(
                f"objective {objective} of a window that keeps {num_objectives} apart; "
                "start_window(num_objectives=O) comes before add, combine() after the last one"
            )
        return [stack[objective] for stack in self._per_objective]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _weighted_sum(weights: Tensor, gradients: Tensor) -> Tensor:
    """[...] weights [O] times gradients [O, ...], in the gradients' dtype."""
    total = torch.zeros_like(gradients[0], dtype=_wide(gradients.dtype))
    for weight, gradient in zip(weights.tolist(), gradients, strict=True):
        total.add_(gradient, alpha=weight)  # not a matrix product, which a GPU may round to TF32
    return total.to(gradients.dtype)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype and device together, up to _BUCKET_BYTES; the same on every rank."""
    buckets: list[list[Tensor]] = []
    num_bytes, kind = 0, None
    for tensor in tensors:
        size = tensor.numel() * _wide(tensor.dtype).itemsize
        if buckets and kind == (tensor.dtype, tensor.device) and num_bytes + size <= _BUCKET_BYTES:
            buckets[-1].append(tensor)
            num_bytes += size
        else:
            buckets.append([tensor])
            num_bytes, kind = size, (tensor.dtype, tensor.device)
    return buckets
