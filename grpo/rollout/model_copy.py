"""The engine's own copy of the policy's language model: plain layers, merged weights, no shared storage."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo.errors import ModelError
from grpo.runtime.policy import Policy
from grpo.runtime.quantization import is_packed, written_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plain_copy(policy: Policy) -> PreTrainedModel:
    """The language model without adapter layers, in the compute dtype, sharing no storage with the policy.

    Raises:
        ModelError: the model keeps a tensor where it cannot be copied from.
    """
    build: Any = type(policy.causal_lm)
    with torch.device("meta"):  # no weights yet: random ones would cost their time and twice the memory
        blank: Any = build(copy.deepcopy(policy.causal_lm.config))
    model: PreTrainedModel = blank.to(dtype=policy.compute_dtype).to_empty(device=policy.device)
    model.eval().requires_grad_(False)
    model.tie_weights()
    source = {name.replace(".base_layer.", "."): tensor for name, tensor in _tensors_of(policy.causal_lm)}
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(written_out(source[name]))
        for name, buffer in policy.causal_lm.named_buffers():  # rotary frequencies are in no state dict
            module, _, last = name.replace(".base_layer.", ".").rpartition(".")
            setattr(model.get_submodule(module), last, buffer.clone())
    _check_all_real(model)
    return model


def _tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The state dict, but with a packed weight itself, which knows what its bytes stand for."""
    yield from model.state_dict().items()
    yield from ((name, weight) for name, weight in model.named_parameters() if is_packed(weight))


def copy_merged_weights(model: PreTrainedModel, policy: Policy) -> None:
    """The policy's current weights, adapters merged in float32 and then rounded to the model's dtype."""
    own = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, weight in policy.merged_weights():
            own[name].copy_(weight)


def _check_all_real(model: PreTrainedModel) -> None:
    """Raises ModelError for a tensor that is still on the meta device: it would be without values."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in model.named_modules():
        attributes = {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
        tensors |= {f"{name}.{key}".lstrip("."): value for key, value in attributes.items()}
    empty = sorted(name for name, tensor in tensors.items() if tensor.is_meta)
    if empty:
        raise ModelError(
            f"{type(model).__name__} keeps {empty[0]} neither as a parameter nor as a buffer, so that the engine's "
            "copy of the model would be without its values. Such an architecture cannot be sampled from."
        )
