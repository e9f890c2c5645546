"""Which module was the first to make a number that is none: a search that is only run once something went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

NOWHERE = (
    "no module: every weight, output and gradient is finite, so what came in from outside is not (the advantages, a "
    "loss of one's own, or a sampled token that the sampling law forbids)"
)


def first_non_finite_module(model: nn.Module, loss: Callable[[], Tensor]) -> str:
    """Run the loss once more, forwards and backwards, and name where NaN or infinity first appears.

    Args:
        model: whose modules are watched.
        loss: computes the loss through the model, with gradient.
    Returns:
        Such as "model.layers.3.mlp (its output)", or "lm_head.weight (the weight itself)": the head is no module's
        call. NOWHERE where all these are finite: then what came in from outside (advantages, reference) is not.
    """
    found: list[str] = []

    def look(where: str, *tensors: Tensor) -> None:
        if not found and not all(is_finite(tensor) for tensor in tensors):
            found.append(where)

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            tensors = list(_tensors(output))
            look(f"{name} (its output)", *tensors)
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(partial(look, f"{name} (the gradient of its output)"))

        return after

    # inner modules are looked at before the ones that hold them, in the order in which they run
    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        value = loss()
        if not found and bool(torch.isfinite(value)):  # a loss that is NaN makes every gradient so
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.autograd.grad(value, parameters, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    weights = (f"{name} (the weight itself)" for name, weight in model.named_parameters() if not is_finite(weight))
    return found[0] if found else next(weights, NOWHERE)


def is_finite(values: Tensor) -> bool:
    """Whether every entry is."""
    return bool(torch.isfinite(values).all())


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
