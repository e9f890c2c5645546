"""A linear layer's product with its adapter's part in it before it is rounded. Knows peft's layers; knows no model.

In bfloat16 a layer's output lies on a coarse grid already, and what a young adapter adds is less than half of a step of
that grid: added afterwards, most of it would be gone. So the adapter's part, rounded in its own size, comes first, and
the large product is added up on top of it in float32; a bias is added last.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Conv1D, Linear  # pyright: ignore[reportPrivateImportUsage]  # transformers' own
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """An adapter's part of a layer: scaling * up down x."""

    down: Tensor
    """[r, in], peft's lora_A"""
    up: Tensor
    """[out, r], peft's lora_B"""
    scaling: float


def adapted_product(inputs: Tensor, matrix: Tensor, bias: Tensor | None, factors: Factors | None) -> Tensor:
    """inputs matrix + bias, and the adapter's part; in the dtype of a surrounding autocast, or that of the matrix.

    Args:
        inputs: [..., in]
        matrix: [in, out], frozen.
        bias: [out], frozen.
        factors: None: no adapter, but the same arithmetic, so that one that adds nothing changes no bit.
    Returns:
        [..., out]
    """
    assert not matrix.requires_grad, "it would get no gradient"
    device = inputs.device.type
    is_mixed = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_mixed else matrix.dtype
    flat = inputs.to(dtype).reshape(-1, matrix.shape[0])
    with torch.autocast(device, enabled=False) if is_mixed else nullcontext():
        outputs = _product(flat, matrix.to(dtype), factors)
        if bias is not None:  # last: added to the adapter's part first, it would swallow it
            outputs = outputs + bias.to(dtype)
    return outputs.view(*inputs.shape[:-1], matrix.shape[1])


def _product(inputs: Tensor, matrix: Tensor, factors: Factors | None) -> Tensor:
    """[N, in] -> [N, out]"""
    if factors is None:
        return _onto(inputs.new_zeros(len(inputs), matrix.shape[1]), inputs, matrix)
    if not torch.is_grad_enabled():
        return _with_adapter(inputs, matrix, factors.down, factors.up, factors.scaling)[0]
    return _AdaptedProduct.apply(inputs, matrix, factors.down, factors.up, factors.scaling)  # pyright: ignore[reportReturnType]


def _with_adapter(inputs: Tensor, matrix: Tensor, down: Tensor, up: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """[N, out], and what the adapter hides in between, scaled: [N, r]"""
    hidden = (inputs @ down.to(inputs.dtype).T).mul_(scaling)
    return _onto(hidden @ up.to(inputs.dtype).T, inputs, matrix), hidden


def _onto(start: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """start + left right, rounded at the end; overwrites start, unless it takes part in a gradient."""
    return torch.addmm(start, left, right) if torch.is_grad_enabled() else start.addmm_(left, right)


class _AdaptedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, matrix: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        outputs, hidden = _with_adapter(inputs, matrix, down, up, scaling)
        ctx.save_for_backward(inputs, matrix, down, up, hidden)
        ctx.scaling = scaling
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, matrix, down, up, hidden = ctx.saved_tensors
        low, wide = (factor.to(inputs.dtype) for factor in (down, up))
        of_hidden = (gradient @ wide).mul_(ctx.scaling)  # [N, r]
        of_inputs = _onto(of_hidden @ low, gradient, matrix.T) if ctx.needs_input_grad[0] else None
        of_down = (of_hidden.T @ inputs).to(down.dtype)
        of_up = (gradient.T @ hidden).to(up.dtype)
        return of_inputs, None, of_down, of_up, None


class AdaptedLinear(Linear):
    """peft's layer of a frozen linear layer and one adapter, with the product above."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]"""
        if self.merged or len(self.active_adapters) != 1 or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        matrix = base.weight if self.fan_in_fan_out else base.weight.T  # [in, out]
        return adapted_product(x, matrix, base.bias, None if self.disable_adapters else factors_of(self))


def factors_of(layer: Any) -> Factors:
    """Of one of peft's layers and its one active adapter; peft's own tensors."""
    name = layer.active_adapters[0]
    return Factors(down=layer.lora_A[name].weight, up=layer.lora_B[name].weight, scaling=float(layer.scaling[name]))


def round_once(model: nn.Module) -> None:
    """peft's layers of linear layers take the product above, where it is theirs: no DoRA, no dropout, no layer with a
    product of its own; packed weights keep the product that unpacks them. In half precision alone: in full precision a
    sum afterwards drops nothing."""
    for module in model.modules():
        if type(module) is not Linear or module.lora_variant or not _never_drops(module):
            continue
        base: Any = module.get_base_layer()
        if type(base) in (nn.Linear, Conv1D) and base.weight.dtype.itemsize < torch.float32.itemsize:
            module.__class__ = AdaptedLinear


def _never_drops(layer: Linear) -> bool:
    return all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
