"""What a policy pass keeps: recomputed blocks and tensors on the host give the same gradient, and keep less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_batch, make_group, make_policy, make_updater
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.config import FullTrainable, LoraTrainable, TrainableConfig, UpdateConfig
from grpo.errors import ConfigError, ModelError
from grpo.rollout.base import SamplingParams
from grpo.runtime.policy import Policy, dropout_off
from grpo.update.activations import Checkpointing, checkpointed, checkpointed_blocks
from grpo.update.forward import policy_pass
from grpo.update.host_memory import PinnedHost, offloaded
from grpo.update.shared_prefix import can_share_prompts

LLAMA_LIKE = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 256, "n_embd": 48, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
KINDS = ("llama", "qwen3", "gemma3_text", "gpt2", "mistral")
"""Gemma 3 and Mistral slide a window over the text: whole rows."""


def model_of(kind: str, *, layers: int = 3, dtype: torch.dtype = torch.float32) -> Any:
    if kind == "gpt2":
        config = AutoConfig.for_model(kind, **GPT2, n_layer=layers)
    else:
        config = AutoConfig.for_model(kind, **LLAMA_LIKE, num_hidden_layers=layers)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def policy_of(kind: str, trainable: TrainableConfig, **options: Any) -> Policy:
    policy = Policy(model_of(kind, **options), trainable, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # an adapter's B is 0 at first, and A's gradient with it
        for parameter in policy.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return policy


def ragged_batch() -> Any:
    """Two groups of three and one row, of different lengths, in one micro-batch."""
    groups = [
        make_group([{"a": 1.0}, {"a": 0.0}, {"a": 0.5}], lengths=[4, 9, 1], prompt_length=7, seed=0),
        make_group([{"a": 0.2}, {"a": 0.9}], lengths=[6, 3], prompt_length=4, seed=1),
    ]
    (batch,) = make_batch(groups).micro_batches
    return batch


def gradients(policy: Policy, batch: Any, checkpointing: Checkpointing, *, backwards: int = 1) -> list[Tensor]:
    parameters = list(policy.trainable_parameters().values())
    found: tuple[Tensor | None, ...] = ()
    with dropout_off(policy.model):  # as in an update, whose backward passes are inside too
        loss = loss_of(policy, batch, checkpointing)
        for number in range(backwards):
            found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=number + 1 < backwards)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def loss_of(policy: Policy, batch: Any, checkpointing: Checkpointing) -> Tensor:
    params = SamplingParams(end_token_ids=(2,), max_new_tokens=16, temperature=0.8)
    with checkpointed(policy.causal_lm, checkpointing):
        logprobs = policy_pass(policy, batch, params).logprobs
    weights = torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)
    return (weights * logprobs).sum()


@pytest.mark.parametrize("trainable", [LoraTrainable(rank=4), FullTrainable(type="full")], ids=["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_computing_blocks_again_leaves_the_gradient_as_it_is(kind: str, trainable: TrainableConfig) -> None:
    policy, batch = policy_of(kind, trainable), ragged_batch()
    assert can_share_prompts(policy.causal_lm) == (kind not in ("gemma3_text", "mistral"))
    plain = gradients(policy, batch, "none")
    for checkpointing in ("selective", "full"):
        again = gradients(policy, batch, checkpointing)
        for mine, given in zip(again, plain, strict=True):
            assert float((mine - given).norm()) <= 1e-6 * float(given.norm())


def test_it_is_so_for_bfloat16_weights_under_float32_adapters() -> None:
    """The second computation is in the backward pass, outside of the pass's casts: it has to multiply as the first."""
    policy, batch = policy_of("llama", LoraTrainable(rank=4), dtype=torch.bfloat16), ragged_batch()
    plain = gradients(policy, batch, "none")
    again = gradients(policy, batch, "full")
    for mine, given in zip(again, plain, strict=True):
        torch.testing.assert_close(mine, given, rtol=0, atol=0)


def test_objectives_taken_apart_go_through_the_blocks_once_each() -> None:
    policy, batch = policy_of("llama", LoraTrainable(rank=4)), ragged_batch()
    plain = gradients(policy, batch, "none")
    again = gradients(policy, batch, "full", backwards=2)
    for mine, given in zip(again, plain, strict=True):
        assert float((mine - given).norm()) <= 1e-6 * float(given.norm())


def kept_bytes(policy: Policy, batch: Any, checkpointing: Checkpointing) -> int:
    """What autograd keeps of a pass, parameters not counted, every storage once; a block's input is counted too."""
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with dropout_off(policy.model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(policy, batch, checkpointing)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_every_second_block_keeps_half_and_every_block_its_input_alone(kind: str) -> None:
    policy, batch = policy_of(kind, LoraTrainable(rank=4), layers=8), ragged_batch()
    kept = {each: kept_bytes(policy, batch, each) for each in ("none", "selective", "full")}
    # of one block: its input [tokens, 48] in float32; each prompt once, a completion's last token never, or whole rows
    tokens = (7 + 4) + (3 + 8 + 0 + 5 + 2) if kind != "mistral" else 5 * (7 + 9)
    inputs = 8 * tokens * 48 * 4
    outside = kept["full"] - inputs  # embeddings, the last norm, the head, the cache's masks: the same in all three
    assert 0 <= outside < 0.1 * kept["none"]
    blocks = kept["none"] - outside
    assert kept["selective"] - outside == pytest.approx(blocks / 2 + inputs / 2, rel=0.05)
    assert kept["full"] < 0.2 * kept["none"]


def test_a_model_that_names_no_blocks_is_refused() -> None:
    model = model_of("llama")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ModelError, match=r"update\.checkpointing is full.*Set update\.checkpointing=none"):
        checkpointed_blocks(model, "full")


def test_blocks_are_their_own_again_afterwards() -> None:
    model = model_of("llama")
    with pytest.raises(IndexError), checkpointed(model, "full"):
        model(torch.tensor([[999]]))  # no such token
    assert not any("forward" in vars(layer) for layer in model.model.layers)


class OtherMemory:
    """A host that counts, and takes the tensors out of autograd's sight."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []
        self.fetched = 0

    def hold(self, tensor: Tensor) -> OtherPlace:
        self.held.append(tensor.clone())
        return OtherPlace(self, len(self.held) - 1)


class OtherPlace:
    """One tensor there."""

    def __init__(self, memory: OtherMemory, number: int) -> None:
        self.memory, self.number = memory, number

    def fetch(self) -> Tensor:
        self.memory.fetched += 1
        return self.memory.held[self.number].clone()


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_waits_elsewhere_comes_back_for_the_same_gradient(kind: str, checkpointing: Checkpointing) -> None:
    policy, batch, memory = policy_of(kind, LoraTrainable(rank=4)), ragged_batch(), OtherMemory()
    plain = gradients(policy, batch, "none")
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    with dropout_off(policy.model):
        with offloaded(policy.model, memory, smallest_bytes=512):
            loss = loss_of(policy, batch, checkpointing)
        parameters = list(policy.trainable_parameters().values())
        moved = torch.autograd.grad(loss, parameters)
    assert memory.held
    assert memory.fetched >= len(memory.held)
    assert all(tensor.nbytes >= 512 for tensor in memory.held)
    assert not {t.untyped_storage().data_ptr() for t in memory.held} & own
    for mine, given in zip(moved, plain, strict=True):
        assert float((mine - given).norm()) <= 1e-6 * float(given.norm())
    if checkpointing == "full":  # the blocks' inputs wait elsewhere too: two prompts' 11 tokens and 18 that follow
        assert [tuple(tensor.shape) for tensor in memory.held].count((1, 29, 48)) >= 3


def test_what_several_operators_keep_is_moved_once_unless_it_changed() -> None:
    memory = OtherMemory()
    weight = torch.nn.Parameter(torch.randn(4, 4))
    layer = torch.nn.Module()
    layer.register_parameter("weight", weight)
    with offloaded(layer, memory, smallest_bytes=1):
        values = torch.randn(3, 4)
        products = [values @ weight, values @ weight]  # both keep `values`; the weight stays
        values.add_(1.0)
        products.append(values @ weight)  # other values in the same storage
        expanded = torch.ones(1, 4).expand(3, 4)  # four numbers standing for twelve: stay
        products.append(weight[:1] * expanded)
    assert [tuple(tensor.shape) for tensor in memory.held] == [(3, 4), (3, 4)]
    given = memory.held[0]
    (gradient,) = torch.autograd.grad(torch.stack([p.sum() for p in products]).sum(), [weight])
    # d(sum(X W))/dW = X^T 1, for X twice and X + 1 once; and 3 rows of ones for the first row
    expected = (2 * given.sum(0) + (given + 1).sum(0))[:, None].expand(4, 4).clone()
    expected[0] += 3
    torch.testing.assert_close(gradient, expected)


def test_an_update_with_blocks_computed_again_ends_at_the_same_weights(tiny_model_dir: Path) -> None:
    groups = [make_group([{"a": 1.0}, {"a": 0.0}, {"a": 0.3}], seed=seed) for seed in range(3)]
    ends = []
    for checkpointing in ("none", "full"):
        policy = make_policy(tiny_model_dir)
        updater = make_updater(policy, update=UpdateConfig(checkpointing=checkpointing, iterations=2))
        updater.step(make_batch(groups))
        ends.append([p.detach().clone() for p in policy.trainable_parameters().values()])
    for mine, given in zip(*ends, strict=True):
        torch.testing.assert_close(mine, given, rtol=1e-6, atol=1e-7)


def test_offloading_needs_a_gpu(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"update\.offload is activations, which needs a GPU"):
        make_updater(make_policy(tiny_model_dir), update=UpdateConfig(offload="activations"))


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_on_a_card_the_host_takes_what_the_pass_keeps(checkpointing: Checkpointing) -> None:
    policy, device = policy_of("llama", LoraTrainable(rank=4), layers=8), torch.device("cuda")
    policy.model.to(device)
    batch = ragged_batch().to(device)
    parameters = list(policy.trainable_parameters().values())
    plain = gradients(policy, batch, "none")
    with dropout_off(policy.model):
        before = torch.cuda.memory_allocated()
        loss = loss_of(policy, batch, checkpointing)
        kept = torch.cuda.memory_allocated() - before
        del loss
        before = torch.cuda.memory_allocated()
        with offloaded(policy.model, PinnedHost(device), smallest_bytes=1024):
            loss = loss_of(policy, batch, checkpointing)
        torch.cuda.synchronize()
        kept_with_host = torch.cuda.memory_allocated() - before
        moved = torch.autograd.grad(loss, parameters)
    assert kept_with_host < 0.5 * kept
    for mine, given in zip(moved, plain, strict=True):
        assert float((mine - given).norm()) <= 1e-5 * float(given.norm())
