"""The engine's model beside the policy's: plain layers, merged weights, and what never changes in memory once."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grpo.errors import ModelError
from grpo.runtime.policy import Policy
from grpo.runtime.quantization import written_out
from grpo.runtime.trainable import lora_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def engine_model(policy: Policy) -> PreTrainedModel:
    """The language model without adapter layers, in the compute dtype, with the policy's current weights merged.

    What training does not change is shared with the policy; the rest is a copy, which `take_weights` brings up to date.

    Raises:
        ModelError: the model keeps a tensor where it cannot be copied from.
    """
    build: Any = type(policy.causal_lm)
    with torch.device("meta"):  # no weights yet: random ones would cost their time and twice the memory
        model: Any = build(copy.deepcopy(policy.causal_lm.config))
    model.eval().requires_grad_(False)
    changed = {id(layer.get_base_layer().weight) for layer in lora_layers(policy.causal_lm).values()}
    own: dict[int, nn.Parameter] = {}
    for name, source in policy.causal_lm.named_parameters(remove_duplicate=False):
        if policy.is_adapters_own(name):
            continue
        if id(source) not in own:  # tied weights stay one
            is_changed = source.requires_grad or id(source) in changed
            value = written_out(source).detach().to(policy.compute_dtype, copy=is_changed)
            own[id(source)] = nn.Parameter(value, requires_grad=False)
        _put(model, name, own[id(source)])
    for name, buffer in policy.causal_lm.named_buffers():  # rotary frequencies are in no state dict
        _put(model, name, buffer.clone())
    _check_all_real(model)
    take_weights(model, policy)
    return model


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """A parameter or buffer in the place of its name in the policy."""
    path, _, last = name.replace(".base_layer.", ".").rpartition(".")
    setattr(model.get_submodule(path), last, value)


@torch.no_grad()
def take_weights(model: PreTrainedModel, policy: Policy) -> None:
    """Into an `engine_model` of the policy, what training has changed; adapters are merged and rounded to its dtype."""
    own = dict(model.named_parameters(remove_duplicate=False))
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
