"""Tiny random models of four architectures, ways to cut their gradient, and what a cut does to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from grpo.diagnostics.tracing import with_tensors

NUM_LAYERS = 3
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
ARCHITECTURES = ("llama", "qwen3", "gemma3", "gpt2")


def make_causal_lm(name: str) -> nn.Module:
    """Random weights, on the CPU, in train mode without dropout."""
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        match name:
            case "llama":
                model: nn.Module = LlamaForCausalLM(LlamaConfig(**GROUPED))
            case "qwen3":
                model = Qwen3ForCausalLM(Qwen3Config(**GROUPED))
            case "gemma3":
                model = Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, sliding_window=8))
            case _:
                dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
                model = GPT2LMHeadModel(GPT2Config(**SIZES, **dropout))
        return model.train()


def with_adapter(model: nn.Module, *, layers: list[int] | None = None) -> nn.Module:
    """LoRA on every linear layer, or on those of some layers; its B matrices are zero, as at a run's start."""
    config = LoraConfig(
        r=2,
        target_modules="all-linear" if layers is None else ["q_proj", "v_proj", "down_proj"],
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
        fan_in_fan_out=model.config.model_type == "gpt2",  # pyright: ignore[reportAttributeAccessIssue]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    """Cross-entropy of a fixed text, under gradients as they are set."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (2, 9), generator=generator)
    return lambda: model(input_ids=ids, labels=ids).loss


def gradients_of(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor | None]:
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    value = loss()
    if not value.requires_grad:
        return dict.fromkeys(learning)
    return dict(zip(learning, torch.autograd.grad(value, list(learning.values()), allow_unused=True), strict=True))


def _detached(value: Any) -> Any:
    return with_tensors(value, lambda _, tensor: tensor.detach())


def _cast(value: Any) -> Any:
    def there_and_back(_: int, tensor: Tensor) -> Tensor:
        return (tensor * 1024).long().to(tensor.dtype) / 1024 if tensor.is_floating_point() else tensor

    return with_tensors(value, there_and_back)


class _OneWay(torch.autograd.Function):
    """A forward of one's own whose result is marked as without gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        result = tensor.clone()
        ctx.mark_non_differentiable(result)
        return result


def _custom(value: Any) -> Any:
    return with_tensors(value, lambda _, tensor: _OneWay.apply(tensor) if tensor.is_floating_point() else tensor)


CUTS: dict[str, Callable[[Any], Any]] = {"detach": _detached, "integer cast": _cast, "custom forward": _custom}
KINDS = ("no_grad", *CUTS)


@contextmanager
def cut_at(module: nn.Module, kind: str) -> Iterator[None]:
    """The module's forward loses its gradient, for the while."""
    forward = module.forward

    def cut_forward(*args: Any, **kwargs: Any) -> Any:
        if kind == "no_grad":
            with torch.no_grad():
                return forward(*args, **kwargs)
        return CUTS[kind](forward(*args, **kwargs))

    module.forward = cut_forward
    try:
        yield
    finally:
        module.forward = forward


def does_harm(model: nn.Module, module: nn.Module, kind: str, loss: Callable[[], Tensor]) -> bool:
    """The slow truth: whether any parameter's gradient is another one with the module cut.

    A cast and a forward of one's own stand in by a detach: values stay, and nothing but the cut can be the reason. A
    no_grad may be harmless where a detach is not: around an Identity.
    """
    before = gradients_of(model, loss)
    with cut_at(module, kind if kind == "no_grad" else "detach"):
        after = gradients_of(model, loss)
    return any(
        (one is None) != (other is None) or (one is not None and other is not None and not torch.equal(one, other))
        for one, other in zip(before.values(), after.values(), strict=True)
    )
