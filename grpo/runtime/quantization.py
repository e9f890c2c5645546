"""Frozen weights in 4 bits (QLoRA, arXiv:2305.14314): what goes into them, and the numbers that they stand for.

NF4 in blocks of 64 with one scale each, the scales themselves in 8 bits: 0.516 bytes a number. Products are taken with
the weights written out, one layer at a time, in the compute dtype. bitsandbytes is the extra `qlora`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64
"""Numbers that share a scale. Rows of a weight that do not fill blocks are not packed: bitsandbytes 0.50 on a CPU takes
the wrong scales for them (a relative error of 0.25 to 0.4 where NF4's is 0.09)."""
_PACKED = "Params4bit"
"""bitsandbytes' class of a packed weight, by name: a run without any never imports it."""


def check_quantization(name: str) -> None:
    """Whether the recipe's `quantization` can be had here. Raises ConfigError where its package is missing."""
    if name != "none" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization is {name}, but bitsandbytes is not installed. Install it with "
            "pip install 'grpo-toolkit[qlora]', or set quantization=none."
        )


def quantize(model: PreTrainedModel, *, device: torch.device, compute_dtype: torch.dtype) -> PreTrainedModel:
    """Put every linear layer but the head into NF4, in place, one at a time. The rest of the model stays as it is, and
    so do layers whose inputs are no multiple of `BLOCK`.

    Args:
        model: as it was loaded, on the host.
        device: where the packed weights go; a card packs them itself.
        compute_dtype: of the products.
    Raises:
        ConfigError: bitsandbytes is not installed; there is no such layer.
    """
    check_quantization("nf4")
    from bitsandbytes.nn import Linear4bit, Params4bit  # pyright: ignore[reportMissingImports]  # an extra

    head = model.get_output_embeddings()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and module.in_features % BLOCK == 0
    }
    if not layers:
        raise ConfigError(
            f"quantization is nf4, but {type(model).__name__} has no linear layers (torch.nn.Linear) besides its head "
            f"whose inputs are a multiple of {BLOCK}. Set quantization=none."
        )
    for name, layer in layers.items():
        with torch.device("meta"):
            packed: Any = Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=compute_dtype,
                quant_type="nf4",
            )
        weight = layer.weight.detach().contiguous()
        packed.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=packed).to(device)
        packed.bias = layer.bias
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, packed)
    model.is_loaded_in_4bit = True  # pyright: ignore[reportArgumentType]  # peft asks for it
    return model


def written_out(weight: Tensor) -> Tensor:
    """The numbers that a weight stands for: its own, or those that a packed one is multiplied as.

    Returns:
        The tensor itself where it is not packed; else a new one of the shape and dtype that were packed.
    """
    if not is_packed(weight):
        return weight
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]  # an extra

    return dequantize_4bit(weight.data, weight.quant_state)  # pyright: ignore[reportAttributeAccessIssue]


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is in 4 bits."""
    return type(weight).__name__ == _PACKED


def num_entries(weight: Tensor) -> int:
    """How many numbers a weight stands for; a packed one keeps two in a byte."""
    return weight.quant_state.shape.numel() if is_packed(weight) else weight.numel()  # pyright: ignore[reportAttributeAccessIssue]
