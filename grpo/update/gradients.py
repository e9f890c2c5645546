"""Window gradients: every micro-batch's gradient is added to what is there. Knows tensors only.

The two classic failures are impossible by shape: nothing between `start_window` and the optimizer's step can zero or
overwrite a gradient, because adding is the only thing this class does there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class GradientWindow:
    """The gradient of one window, kept in `.grad`, in the parameters' dtype.

    start_window() -> add(loss) for each micro-batch -> clip() -> the optimizer steps. The caller's losses are parts of
    one sum over one denominator (FORMULAS 6), so that their gradients add up to the window's gradient.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Args: parameters: name -> parameter that learns. Raises ValueError for none, or one that is frozen."""
        frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
        if frozen or not parameters:
            raise ValueError(f"a window needs parameters that learn; frozen: {frozen or 'all'}")
        self._parameters = dict(parameters)

    def start_window(self) -> None:
        """Zero every gradient: once per window, before its first micro-batch."""
        for parameter in self._parameters.values():
            parameter.grad = torch.zeros_like(parameter)

    def add(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's part of the window's loss.

        Costs a second gradient of all parameters that learn while it runs: the micro-batch's own, beside the window's.

        Raises:
            RuntimeError: the loss is detached from every parameter: nothing could be learned from it.
        """
        gradients: tuple[Tensor | None, ...] = ()
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise RuntimeError(
                "the loss is detached from the parameters (no grad_fn leads to any of them): a no_grad block, a detach "
                "or an integer cast lies between them, and nothing would be learned"
            )
        for parameter, gradient in zip(self._parameters.values(), gradients, strict=True):
            if gradient is not None:
                assert parameter.grad is not None  # start_window comes first
                parameter.grad.add_(gradient)

    def first_non_finite(self) -> str | None:
        """Name of the first parameter whose gradient holds NaN or infinity."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return name
        return None

    def clip(self, max_norm: float) -> float:
        """Scale the whole gradient down to max_norm, once per window; returns its norm before."""
        return float(nn.utils.clip_grad_norm_(list(self._parameters.values()), max_norm))
