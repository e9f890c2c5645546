"""The memory planner: its sizes are transformers', its terms are what autograd and the allocator do."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_batch, make_group
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.batching import MicroBatch
from grpo.config import RunConfig
from grpo.errors import ConfigError, ModelError
from grpo.recipe_loader import parse_recipe
from grpo.rollout import decoding, drawing, shared_prompts
from grpo.rollout.base import SamplingParams
from grpo.runtime import quantization
from grpo.runtime.memory import plan
from grpo.runtime.memory_changes import changed
from grpo.runtime.memory_hardware import GIB, Hardware, hardware_named
from grpo.runtime.memory_model import KNOWN, ModelShape, read_shape, shape_of
from grpo.runtime.memory_rows import Rows, count_micro_batches, largest_micro_batch
from grpo.runtime.memory_terms import CACHE_GROWTH, DRAWN_ROWS, PACKED_BLOCK, PREFILL_TOKENS, Terms
from grpo.runtime.memory_update import CACHED_ROWS, CHUNK_TOKENS, PLAIN_ATTENTION_SCORES, PROMPT_TILE, UpdateTerms
from grpo.runtime.policy import Policy, dropout_off
from grpo.update import head, logprobs, shared_prefix, tiled_attention
from grpo.update.activations import Checkpointing, checkpointed
from grpo.update.forward import policy_pass

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {"vocab_size": 1000, "n_embd": 96, "n_layer": 6, "n_head": 6, "bos_token_id": 1, "eos_token_id": 2}
LORA = {"type": "lora", "rank": 4}
FULL = {"type": "full"}
FEED, ATTENTION = {"type": "full", "modules": "**.mlp"}, {"type": "lora", "rank": 4, "modules": "**.self_attn"}
MIXED = {"type": "parts", "parts": [FEED, ATTENTION]}
LAST_BLOCK = {"type": "parts", "parts": [{"type": "full", "modules": "model.layers.5"}]}
LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "dtype": "bfloat16",
}


def config_of(kind: str) -> Any:
    return AutoConfig.for_model(kind, **(GPT2_SIZES if kind == "gpt2" else SIZES))


def recipe(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": "model",
        "steps": 1,
        "output_dir": "run",
        "dtype": "float32",
        "prompts": {"type": "tasks", "names": ["fairness"], "per_step": 8},
        "objectives": {"a": {"rewards": [{"name": "choice"}], "beta": {"type": "fixed", "value": 0.02}}},
        "rollout": {"group_size": 8, "max_new_tokens": 256},
        "optim": {"learning_rate": 1e-4},
        **changes,
    }
    return parse_recipe(values, base_dir=Path("/nowhere"), source="the test")


@pytest.mark.parametrize("kind", KNOWN)
def test_sizes_of_every_known_model_type_are_those_of_its_model(kind: str) -> None:
    config = config_of(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config.to_dict(), source=kind)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.shares_prompts == shared_prefix.can_share_prompts(model)
    adapted = Policy(
        AutoModelForCausalLM.from_config(config), recipe(trainable={"type": "lora", "rank": 3}).trainable, seed=0
    )
    learning = sum(p.numel() for p in adapted.trainable_parameters().values())
    assert terms_of(shape, trainable={"type": "lora", "rank": 3}).learning == learning


def terms_of(shape: ModelShape, *, rows: Rows | None = None, width: int = 4, **changes: Any) -> Terms:
    rows = rows or Rows(prompts=2, rows=6, prompt_tokens=40, completion_tokens=30)
    return Terms(shape=shape, config=recipe(**changes), rows=rows, width=width, is_cpu=True)


def test_constants_are_the_codes() -> None:
    assert CHUNK_TOKENS == logprobs.CHUNK_TOKENS
    assert CACHED_ROWS == head.CACHED_ROWS
    assert DRAWN_ROWS == drawing.CACHED_ROWS
    assert PLAIN_ATTENTION_SCORES == shared_prefix.PLAIN_ATTENTION_SCORES
    assert PROMPT_TILE == tiled_attention.PROMPT_TILE
    assert CACHE_GROWTH == shared_prompts.GROWTH
    assert PREFILL_TOKENS == decoding.PREFILL_TOKENS
    assert PACKED_BLOCK == quantization.BLOCK


def full_rows(rows: Rows) -> MicroBatch:
    """A micro-batch of that size without padding."""
    groups = rows.rows // rows.prompts
    of_row = torch.arange(rows.prompts).repeat_interleave(groups)
    return MicroBatch(
        prompt_ids=torch.randint(3, 900, (rows.prompts, rows.prompt_tokens)),
        prompt_mask=torch.ones(rows.prompts, rows.prompt_tokens, dtype=torch.long),
        prompt_of_row=of_row,
        completion_ids=torch.randint(3, 900, (rows.rows, rows.completion_tokens)),
        completion_mask=torch.ones(rows.rows, rows.completion_tokens, dtype=torch.bool),
        sampler_logprobs=torch.zeros(rows.rows, rows.completion_tokens),
        advantages=torch.zeros(rows.rows),
        shares=torch.zeros(rows.rows, 1),
        is_scored=torch.ones(rows.rows, 1, dtype=torch.bool),
    )


def saved_bytes(policy: Policy, batch: MicroBatch, checkpointing: Checkpointing = "none") -> int:
    """What autograd keeps of the policy's pass, parameters and the head's slopes not counted, every storage once."""
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    params = SamplingParams(end_token_ids=(2,), max_new_tokens=batch.completion_ids.shape[1])
    with (
        dropout_off(policy.model),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        checkpointed(policy.causal_lm, checkpointing),
    ):
        policy_pass(policy, batch, params)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize(
    ("kind", "trainable", "width"),
    [
        ("llama", LORA, 4),
        ("llama", LORA, 2),
        ("llama", {**LORA, "modules": ["q_proj", "down_proj"]}, 4),
        ("llama", FULL, 2),
        ("llama", MIXED, 2),
        ("llama", LAST_BLOCK, 4),
        ("qwen3", LORA, 2),
        ("qwen3", FULL, 4),
        ("mistral", LORA, 4),
        ("gpt2", LORA, 4),
        ("gpt2", FULL, 2),
    ],
)
def test_what_the_backward_pass_needs_is_what_autograd_keeps(
    kind: str, trainable: Mapping[str, Any], width: int
) -> None:
    config = config_of(kind)
    terms = terms_of(shape_of(config.to_dict(), source=kind), width=width, trainable=trainable)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if width == 4 else torch.bfloat16)
    kept = saved_bytes(Policy(model, terms.config.trainable, seed=0), full_rows(terms.rows))
    head = UpdateTerms(terms).states() // 2
    # the first block's input needs no gradient with LoRA, and keys are shared in ways of their own: a few percent
    assert UpdateTerms(terms).saved() + head == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize(("kind", "trainable", "width"), [("llama", LORA, 2), ("gpt2", FULL, 4), ("mistral", LORA, 4)])
def test_blocks_that_are_computed_again_keep_what_the_plan_says(
    kind: str, trainable: Mapping[str, Any], width: int, checkpointing: Checkpointing
) -> None:
    config = config_of(kind)
    shape = shape_of(config.to_dict(), source=kind)
    terms = terms_of(shape, width=width, trainable=trainable, update={"checkpointing": checkpointing})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if width == 4 else torch.bfloat16)
    kept = saved_bytes(Policy(model, terms.config.trainable, seed=0), full_rows(terms.rows), checkpointing)
    assert UpdateTerms(terms).saved() + UpdateTerms(terms).states() // 2 == pytest.approx(kept, rel=0.1)


def test_what_4_bits_a_number_save_worked_by_hand() -> None:
    """Llama 7B's blocks have 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) = 6,476,005,376 numbers in linear layers, each
    in 4 + 8 / 64 + 32 / 16384 = 4.126953125 bits in place of 16."""
    card, shape = hardware_named("a100-40g"), shape_of(LLAMA_7B, source="7B")
    peaks = [
        plan(recipe(quantization=each, dtype="bfloat16"), card, shape=shape).phases[0].held["policy"]
        for each in ("none", "nf4")
    ]
    assert peaks[0] - peaks[1] == 2 * 6_476_005_376 - int(6_476_005_376 * 4.126953125 / 8)


def test_moments_that_wait_on_the_host_are_on_the_card_for_the_optimizers_step_alone() -> None:
    shape, card = shape_of(LLAMA_7B, source="7B"), hardware_named("h200")
    full = {"type": "full"}
    here, away = (
        plan(
            recipe(trainable=full, dtype="bfloat16", optim={"learning_rate": 1e-5, "offload": each}), card, shape=shape
        )
        for each in ("none", "states")
    )
    moments = 8 * shape.parameters
    sampling = {name: next(p for p in found.phases if p.name == "sampling") for name, found in
                (("here", here), ("away", away))}  # fmt: skip
    assert sampling["here"].peak_bytes - sampling["away"].peak_bytes == moments
    assert sampling["away"].host_bytes == moments
    update = next(phase for phase in away.phases if phase.name == "update")
    assert update.transient_bytes >= moments


def test_where_smaller_micro_batches_are_not_enough_blocks_are_computed_again() -> None:
    """One completion of 8,190 tokens: nothing is left to cut, and most of it is what the pass keeps."""
    config = recipe(dtype="bfloat16", rollout={"group_size": 8, "max_new_tokens": 8_190, "max_rows": 8})
    card = Hardware(name="x", device_bytes=70 * GIB, is_cpu=False, has_bfloat16=True)
    found = plan(config, card, shape=shape_of(LLAMA_7B, source="7B"))
    assert not found.fits
    first = found.changes[0]
    assert (first.fits, first.keeps_gradient) == (True, True)
    assert first.overrides[0].startswith(("update.checkpointing=", "update.offload="))


def test_micro_batches_are_planned_as_they_are_built() -> None:
    """Steps of all kinds: groups that are cut, that fit alone, that go side by side."""
    draw = random.Random(0)
    for _ in range(60):
        k, prompts, prompt_tokens, length = (draw.randint(*ends) for ends in ((2, 9), (1, 5), (1, 40), (1, 30)))
        budget = draw.randint(1, prompts * (prompt_tokens + k * length) + 20)
        config = recipe(
            rollout={"group_size": k, "max_new_tokens": length},
            update={"micro_batch_tokens": budget},
            prompts={"type": "tasks", "names": ["fairness"], "per_step": prompts},
        )
        groups = [
            make_group(
                [{"a": float(n)} for n in range(k)], lengths=[length] * k, prompt_length=prompt_tokens, seed=number
            )
            for number in range(prompts)
        ]
        built = make_batch(groups, budget=budget, max_new_tokens=length).micro_batches
        largest = max(built, key=lambda micro: micro.padded_tokens)
        planned = largest_micro_batch(config, prompt_tokens)
        assert planned.padded_tokens == largest.padded_tokens
        assert (planned.prompts, planned.rows) == (len(largest.prompt_ids), len(largest.completion_ids))
        assert count_micro_batches(config, prompt_tokens) == len(built)


def test_what_a_lora_run_holds_worked_by_hand() -> None:
    """Llama 7B, rank 16 on all seven linears of 32 blocks: (4 * 8192 + 3 * 15104) * 16 * 32 = 39,976,960 numbers."""
    found = plan(
        recipe(trainable={"type": "lora", "rank": 16}, dtype="bfloat16"),
        hardware_named("a100-80g"),
        shape=shape_of(LLAMA_7B, source="7B"),
    )
    phases = {phase.name: phase for phase in found.phases}
    weights = 6_738_415_616
    assert found.shape.parameters == weights
    assert phases["update"].held == {
        "policy": 2 * weights + 4 * 39_976_960,
        "gradients and moments": 3 * 4 * 39_976_960,
        # of the engine's own, the merged ones: 7 of 32 blocks
        "engine": 2 * 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008),
    }
    assert phases["load"].host_bytes == 2 * weights


def test_training_all_weights_holds_them_four_times_and_a_reference() -> None:
    """Weights, gradient, two moments and the reference, 4 bytes each; the engine's copy has 2."""
    found = plan(
        recipe(trainable={"type": "full"}, dtype="bfloat16"),
        hardware_named("h200"),
        shape=shape_of(LLAMA_7B, source="7B"),
    )
    (update,) = [phase for phase in found.phases if phase.name == "update"]
    assert sum(update.held.values()) == (5 * 4 + 2) * found.shape.parameters


def test_the_micro_batches_that_fit_are_the_largest_that_any_budget_cuts() -> None:
    """Budgets are tried one after another. The recipe's does not fit; what is told is what micro-batches have."""
    config, card = recipe(dtype="bfloat16"), hardware_named("a100-40g")
    shape = shape_of(LLAMA_7B, source="7B")
    limit = next(limit for limit in plan(config, card, shape=shape).limits)
    fitting = [
        found.micro_batch_tokens
        for tokens in range(512 + 256, 8192, 200)
        if (found := plan(changed(config, update__micro_batch_tokens=tokens), card, shape=shape)).fits
    ]
    assert (limit.key, limit.largest) == ("update.micro_batch_tokens", max(fitting))
    then = plan(changed(config, update__micro_batch_tokens=limit.largest), card, shape=shape)
    assert (then.fits, then.micro_batch_tokens, then.packing) == (True, limit.largest, limit.packing)


def test_where_half_a_step_fits_a_budget_of_one_token_less_than_the_step_is_not_called_fitting() -> None:
    """4 prompts of 64 tokens with 64 completions of 128: 33,024 tokens at once, 16,512 in two; 33,023 are two too."""
    config = recipe(
        dtype="bfloat16",
        prompts={"type": "tasks", "names": ["fairness"], "per_step": 4},
        rollout={"group_size": 64, "max_new_tokens": 128},
        update={"micro_batch_tokens": 33_024},
    )
    shape = shape_of(LLAMA_7B, source="7B")
    sizes = [
        plan(changed(config, update__micro_batch_tokens=tokens), hardware_named("cuda:1000"), prompt_tokens=64,
             shape=shape).peak_bytes
        for tokens in (33_024, 33_023)
    ]  # fmt: skip
    card = Hardware(name="x", device_bytes=sum(sizes) // 2, is_cpu=False, has_bfloat16=True)
    limit = plan(config, card, prompt_tokens=64, shape=shape).limits[0]
    assert (limit.now, limit.largest, limit.packing) == (33_024, 16_512, "128 x 2")


def test_a_budget_that_fits_is_told_how_far_it_can_be_raised() -> None:
    config, shape = recipe(dtype="bfloat16"), shape_of(LLAMA_7B, source="7B")
    limit = plan(config, hardware_named("cuda:1000"), shape=shape).limits[0]
    assert (limit.largest, limit.bounded_by) == (8 * (512 + 8 * 256), "the step")
    config = changed(config, update__micro_batch_tokens=4_000)  # cut in micro-batches of 3,072
    for gib in range(40, 100, 10):
        found = plan(config, hardware_named(f"cuda:{gib}"), shape=shape)
        largest = found.limits[0].largest
        assert found.fits == (largest is not None and largest >= 4_000), gib


def test_completions_are_no_longer_than_the_models_context_leaves() -> None:
    shape = shape_of({**LLAMA_7B, "max_position_embeddings": 4096}, source="7B")
    limits = plan(recipe(dtype="bfloat16"), hardware_named("cuda:1000"), prompt_tokens=500, shape=shape).limits
    longest = next(limit for limit in limits if limit.key == "rollout.max_new_tokens")
    assert (longest.largest, longest.bounded_by) == (4096 - 500, "the context")


def test_a_length_that_needs_smaller_micro_batches_is_told_with_their_budget() -> None:
    """The recipe's own micro-batches do not fit, whatever K, length and prompts are: they are cut smaller first."""
    config, card, shape = recipe(dtype="bfloat16"), hardware_named("a100-40g"), shape_of(LLAMA_7B, source="7B")
    found = plan(config, card, shape=shape)
    assert not found.fits
    limit = next(limit for limit in found.limits if limit.key == "rollout.max_new_tokens")
    assert limit.largest is not None
    assert limit.micro_batch_tokens is not None
    longest = changed(
        config, rollout__max_new_tokens=limit.largest, update__micro_batch_tokens=limit.micro_batch_tokens
    )
    assert plan(longest, card, shape=shape).fits
    assert not plan(changed(longest, rollout__max_new_tokens=limit.largest + 1), card, shape=shape).fits


def test_changes_are_put_together_where_none_alone_does() -> None:
    """All weights of a 7B model on an H200: moments in 8 bits alone are not enough, nor is computing blocks again."""
    config = recipe(trainable={"type": "full"}, dtype="bfloat16")
    shape, card = shape_of(LLAMA_7B, source="7B"), hardware_named("h200")
    found = plan(config, card, shape=shape)
    assert not found.fits
    several = [change for change in found.changes if change.fits and len(change.overrides) > 1]
    assert several
    for change in several:  # none of them for nothing
        assert not any(other.fits and set(other.overrides) < set(change.overrides) for other in found.changes)


def test_where_it_does_not_fit_the_first_change_fits_and_keeps_the_gradient() -> None:
    config, card = recipe(dtype="bfloat16"), hardware_named("a100-40g")
    found = plan(config, card, shape=shape_of(LLAMA_7B, source="7B"))
    assert not found.fits
    first = found.changes[0]
    assert first.fits
    assert first.keeps_gradient
    key, _, tokens = first.overrides[0].partition("=")
    assert key == "update.micro_batch_tokens"
    again = plan(changed(config, update__micro_batch_tokens=int(tokens)), card, shape=found.shape)
    assert (again.fits, again.peak_bytes) == (True, first.peak_bytes)


def test_all_weights_that_can_never_fit_are_told_to_be_adapters() -> None:
    found = plan(
        recipe(trainable={"type": "full"}, dtype="bfloat16"),
        hardware_named("a100-40g"),
        shape=shape_of(LLAMA_7B, source="7B"),
    )
    assert found.changes[0].fits
    assert "trainable={type: lora}" in found.changes[0].overrides
    assert all("trainable={type: lora}" in change.overrides for change in found.changes if change.fits)
    assert [limit.largest for limit in found.limits] == [None] * 4


def test_smaller_micro_batches_take_less_and_more_rows_more() -> None:
    shape, hardware = (
        shape_of(LLAMA_7B, source="7B"),
        Hardware(name="x", device_bytes=80 * GIB, is_cpu=False, has_bfloat16=True),
    )
    peaks = [
        plan(recipe(update={"micro_batch_tokens": tokens}), hardware, shape=shape).peak_bytes
        for tokens in (800, 1600, 3200, 6400)  # 1, 4, 8 and 16 completions of 256 tokens, with their prompts
    ]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[2] < peaks[3]


def test_hardware_is_a_card_or_a_host_with_so_much_memory() -> None:
    assert hardware_named("A100_40G").device_bytes == int(39.4 * GIB)
    assert hardware_named("rtx 4090").name == "rtx4090"
    assert hardware_named("cpu:24GiB").device_bytes == 24 * GIB
    other = hardware_named("cuda:48")
    assert (other.device_bytes, other.is_cpu, other.has_bfloat16) == (48 * GIB, False, True)
    for name in ("a100", "cpu", "cpu:x", "cuda"):
        with pytest.raises(ConfigError, match=r"expected cpu:GIB.*a100-40g"):
            hardware_named(name)


def test_a_model_of_unknown_blocks_is_refused_by_its_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "hidden_size": 64}')
    with pytest.raises(ModelError, match=r"'mamba'.*Known: llama"):
        read_shape(str(tmp_path), tmp_path)


def test_a_config_without_a_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    with pytest.raises(ModelError, match="num_attention_heads"):
        read_shape(str(tmp_path), tmp_path)


def test_modules_that_match_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"q_proj, k_proj"):
        plan(
            recipe(trainable={"type": "lora", "modules": ["query"]}),
            hardware_named("cpu:8"),
            shape=shape_of(LLAMA_7B, source="7B"),
        )
