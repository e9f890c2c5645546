"""Frozen weights in 4 bits: what is multiplied, what learns, and what the engine is given."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_batch, make_group, make_updater
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from grpo.config import LoraTrainable
from grpo.errors import ConfigError
from grpo.recipe_loader import load_recipe
from grpo.rollout.base import SamplingParams
from grpo.rollout.model_copy import engine_model, take_weights
from grpo.runtime.policy import Policy
from grpo.runtime.quantization import check_quantization, is_packed, num_entries, quantize, written_out
from grpo.update.forward import policy_pass, reference_logprobs

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes, the extra qlora, is not installed"
)
CPU = torch.device("cpu")
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Nats."""


def small_llama(*, dtype: torch.dtype = torch.float32) -> Any:
    """Inputs of 64, and of 96 to the last layer of a block."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(dtype)


def packed_policy(*, dtype: torch.dtype = torch.float32, modules: Any = "all-linear") -> Policy:
    model = quantize(small_llama(dtype=dtype), device=CPU, compute_dtype=dtype)
    return Policy(model, LoraTrainable(rank=4, alpha=8, modules=modules), seed=0)


def nf4_by_hand(weight: torch.Tensor) -> torch.Tensor:
    """Every number replaced by the nearest of NF4's sixteen, in units of the largest of its block of 64.

    The sixteen are those of the paper's appendix E (arXiv:2305.14314).
    """
    levels = torch.tensor(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
         0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    )  # fmt: skip
    blocks = weight.float().reshape(-1, 64)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks[:, :, None] / scales[:, :, None] - levels).abs().argmin(dim=-1)
    return (levels[nearest] * scales).view_as(weight)


@needs_bitsandbytes
def test_linear_layers_are_packed_and_stand_for_the_nearest_numbers() -> None:
    plain = small_llama()
    packed = packed_policy().causal_lm
    weights = dict(packed.named_parameters())
    linears = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    fitting = [name for name in linears if not name.endswith("down_proj")]
    for name in fitting:
        weight, given = weights[f"{name}.base_layer.weight"], plain.get_submodule(name).weight
        assert is_packed(weight)
        assert weight.nbytes == given.numel() // 2
        assert num_entries(weight) == given.numel()
        # scales are kept in 8 bits themselves, which moves them by up to about 1/100
        expected = nf4_by_hand(given.detach())
        assert float((written_out(weight) - expected).abs().max()) <= 0.03 * float(expected.abs().max())
    for layer in range(2):  # 96 inputs are a block and a half
        name = f"model.layers.{layer}.mlp.down_proj"
        assert torch.equal(weights[f"{name}.base_layer.weight"], plain.get_submodule(name).weight)
    assert not is_packed(packed.get_output_embeddings().weight)  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_over_packed_weights_learn_and_the_engine_has_the_same_model(
    dtype: torch.dtype,
) -> None:
    policy = packed_policy(dtype=dtype)
    batch = make_batch([make_group([{"a": 1.0}, {"a": 0.0}], seed=seed) for seed in range(2)])
    (micro,) = batch.micro_batches
    params = SamplingParams(end_token_ids=(2,), max_new_tokens=16)
    packed_before = [p.detach().clone() for p in policy.model.parameters() if is_packed(p)]
    reference = reference_logprobs(policy, micro, params)
    assert torch.equal(policy_pass(policy, micro, params).plain_logprobs.detach(), reference)  # adapters are 0 at first
    stats = make_updater(policy).step(batch)
    assert stats.grad_norm is not None
    assert stats.grad_norm > 0
    after = policy_pass(policy, micro, params).plain_logprobs.detach()
    assert not torch.equal(after, reference)
    assert torch.equal(reference_logprobs(policy, micro, params), reference)
    for now, before in zip((p for p in policy.model.parameters() if is_packed(p)), packed_before, strict=True):
        assert torch.equal(now.detach(), before)
    engine = engine_model(policy)
    take_weights(engine, policy)
    assert not any(is_packed(parameter) for parameter in engine.parameters())
    merged = Policy(engine.requires_grad_(True), LoraTrainable(rank=1), seed=0)  # its own adapter is 0
    difference = (policy_pass(merged, micro, params).plain_logprobs.detach() - after)[micro.completion_mask]
    assert float(difference.abs().max()) <= ROUNDING[dtype]


@needs_bitsandbytes
def test_what_was_learned_over_packed_weights_is_saved_and_taken_back(tmp_path: Path) -> None:
    policy = packed_policy()
    make_updater(policy).step(make_batch([make_group([{"a": 1.0}, {"a": 0.0}])]))
    policy.save(tmp_path)
    other = packed_policy()
    other.load(tmp_path)
    for mine, given in zip(other.model.parameters(), policy.model.parameters(), strict=True):
        assert torch.equal(mine, given)


@needs_bitsandbytes
def test_layers_without_an_adapter_reach_the_engine_as_they_are_multiplied() -> None:
    policy = packed_policy(modules=("q_proj",))
    weights = dict(policy.merged_weights())
    packed = dict(policy.causal_lm.named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights[name], written_out(packed[name]))
    assert not policy.learns_one_adapter  # an engine would put it on other weights than it was trained on


def test_packed_weights_are_for_adapters_alone() -> None:
    with pytest.raises(ConfigError, match=r"set trainable.type = lora, or quantization = none"):
        load_recipe("quickstart", ["quantization=nf4", "trainable={type: full}"])


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_the_extra_it_is_named() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'grpo-toolkit\[qlora\]'"):
        check_quantization("nf4")
