"""A layer's product with its adapter in it: peft's numbers in float32, and in bfloat16 what peft's sum drops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_policy
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from grpo.config import FullTrainable
from grpo.rollout.model_copy import engine_model
from grpo.runtime.adapted_product import AdaptedLinear, Factors, adapted_product, round_once
from grpo.runtime.policy import Policy
from grpo.runtime.trainable import lora_layers, plain_name

INPUTS, OUTPUTS, RANK = 48, 40, 4


def adapted(layer: nn.Module, *, dropout: float = 0.0, dora: bool = False) -> Any:
    """peft's layer on top of this one, with factors that are not 0."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=12,
        target_modules=["0"],
        lora_dropout=dropout,
        use_dora=dora,
        fan_in_fan_out=isinstance(layer, Conv1D),
    )
    torch.manual_seed(0)
    model: Any = get_peft_model(nn.Sequential(layer), config)  # pyright: ignore[reportArgumentType]
    found = model.base_model.model[0]
    nn.init.normal_(found.lora_B["default"].weight, std=0.1)
    return found


def gradients(layer: Any, inputs: Tensor) -> list[Tensor]:
    inputs = inputs.clone().requires_grad_(True)
    layer(inputs).sin().sum().backward()
    found = [inputs.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
    layer.zero_grad()
    return found


@pytest.mark.parametrize(
    "layer", [nn.Linear(INPUTS, OUTPUTS), nn.Linear(INPUTS, OUTPUTS, bias=False), Conv1D(OUTPUTS, INPUTS)]
)
def test_outputs_and_gradients_are_those_of_pefts_layer(layer: nn.Module) -> None:
    theirs = adapted(layer)
    inputs = torch.randn(3, 5, INPUTS, generator=torch.Generator().manual_seed(1))
    outputs, slopes = theirs(inputs), gradients(theirs, inputs)
    theirs.__class__ = AdaptedLinear
    assert torch.allclose(theirs(inputs), outputs, atol=1e-5)
    for mine, given in zip(gradients(theirs, inputs), slopes, strict=True):
        assert torch.allclose(mine, given, atol=1e-5)


def test_the_backward_pass_is_the_derivative_of_the_forward_pass() -> None:
    inputs, matrix, down, up, bias = (
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        for number, shape in enumerate([(3, 6), (6, 5), (2, 6), (5, 2), (5,)])
    )

    def product(inputs: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return adapted_product(inputs, matrix, bias, Factors(down=down, up=up, scaling=1.7))

    assert torch.autograd.gradcheck(product, tuple(one.requires_grad_(True) for one in (inputs, down, up)))


@pytest.mark.parametrize("has_bias", [False, True])
def test_what_a_young_adapter_adds_is_there_in_bfloat16_where_a_sum_afterwards_drops_it(has_bias: bool) -> None:
    layer = nn.Linear(512, 512, bias=has_bias)
    if has_bias:
        nn.init.normal_(layer.bias, std=10.0)  # of Qwen2's size, far above what it is added to
    theirs = adapted(layer.bfloat16())
    nn.init.normal_(theirs.lora_B["default"].weight, std=5e-5)
    inputs = torch.randn(400, 512, generator=torch.Generator().manual_seed(1))

    def share_kept() -> float:
        exact: Any = theirs.get_delta_weight("default").detach().double()
        delta = inputs.bfloat16().double() @ exact.T
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            moved = theirs(inputs).double() - layer(inputs).double()
        return float((moved * delta).sum() / delta.square().sum())

    dropped = share_kept()
    round_once(nn.Sequential(theirs))
    assert type(theirs) is AdaptedLinear
    assert dropped < 0.5
    assert share_kept() == pytest.approx(1.0, abs=0.1)


def test_gradients_in_bfloat16_are_the_exact_ones_up_to_rounding_checkpointed_or_not() -> None:
    layer = adapted(nn.Linear(INPUTS, OUTPUTS).bfloat16())
    round_once(nn.Sequential(layer))
    generator = torch.Generator().manual_seed(1)
    inputs, slopes = torch.randn(300, INPUTS, generator=generator), torch.randn(300, OUTPUTS, generator=generator)
    learned = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)

    def found(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        own = inputs.clone().requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = call(own)
        return list(torch.autograd.grad(outputs, (own, *learned), slopes.bfloat16()))

    down, up = (one.detach().double() for one in learned)
    weight: Any = layer.get_base_layer().weight
    x, slope, scaling = inputs.double(), slopes.double(), layer.scaling["default"]
    exact = [
        slope @ (weight.detach().double() + scaling * up @ down),
        scaling * (slope @ up).T @ x,
        scaling * slope.T @ (x @ down.T),
    ]
    plain = found(layer)
    assert [one.dtype for one in plain] == [torch.float32] * 3
    for mine, true in zip(plain, exact, strict=True):
        assert float((mine.double() - true).norm() / true.norm()) < 0.01
    again = found(lambda own: checkpoint(layer, own, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_an_adapter_that_adds_nothing_changes_no_bit(dtype: torch.dtype, rows: int) -> None:
    layer = adapted(nn.Linear(INPUTS, OUTPUTS).to(dtype))
    nn.init.zeros_(layer.lora_B["default"].weight)
    layer.__class__ = AdaptedLinear
    inputs = torch.randn(rows, INPUTS, dtype=dtype)
    with_it = layer(inputs)
    layer.enable_adapters(False)
    assert torch.equal(layer(inputs), with_it)


@pytest.mark.parametrize("kind", [{"dropout": 0.1}, {"dora": True}])
def test_a_layer_that_does_more_keeps_pefts_product(kind: dict[str, Any]) -> None:
    layer = adapted(nn.Linear(INPUTS, OUTPUTS).bfloat16(), **kind)
    round_once(nn.Sequential(layer))
    assert type(layer) is Linear


def test_in_full_precision_pefts_product_stays() -> None:
    layer = adapted(nn.Linear(INPUTS, OUTPUTS))
    round_once(nn.Sequential(layer))
    assert type(layer) is Linear


def test_an_engines_model_shares_what_training_does_not_change_and_copies_the_rest(tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir)
    engine = engine_model(policy)
    theirs = {plain_name(name): one.data_ptr() for name, one in policy.causal_lm.named_parameters()}
    changed = {f"{name}.weight" for name in lora_layers(policy.causal_lm)}
    assert changed
    for name, one in engine.named_parameters():
        assert (one.data_ptr() == theirs[name]) == (name not in changed), name
        assert not one.requires_grad


def test_an_engines_model_copies_what_learns_and_keeps_tied_weights_tied() -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    config.tie_word_embeddings = True
    policy = Policy(LlamaForCausalLM(config), FullTrainable(type="full"), seed=0)
    engine = engine_model(policy)
    assert {one.data_ptr() for one in engine.parameters()}.isdisjoint(
        one.data_ptr() for one in policy.causal_lm.parameters()
    )
    own: Any = engine
    assert own.lm_head.weight is own.model.embed_tokens.weight
