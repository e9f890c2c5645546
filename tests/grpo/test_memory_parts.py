"""The plan's own selection of parts against the policy's, on every known family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.config import PartsTrainable, RunConfig
from grpo.errors import ConfigError
from grpo.recipe_loader import parse_recipe
from grpo.runtime.memory import plan
from grpo.runtime.memory_hardware import hardware_named
from grpo.runtime.memory_model import KNOWN, ModelShape, shape_of
from grpo.runtime.memory_parts import learning_parts
from grpo.runtime.policy import Policy

DIFFERENT = ("llama", "gemma3_text", "olmo2", "phi3", "gpt2")
"""Whose modules have names of their own, or other ones."""
LAYERS = {"gpt2": "transformer.h"}
NORM = {"gpt2": "transformer.ln_f"}
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}


def config_of(kind: str) -> Any:
    return AutoConfig.for_model(kind, **(GPT2 if kind == "gpt2" else SIZES))


def parts_of(kind: str) -> PartsTrainable:
    layers = LAYERS.get(kind, "model.layers")
    entries = [
        {"type": "full", "modules": [NORM.get(kind, "model.norm"), f"{layers}.2"]},
        {"type": "lora", "rank": 3, "modules": f"{layers}.1"},
        {"type": "full", "modules": f"{layers}.1"},  # what the adapters leave: its norms
    ]
    return PartsTrainable.model_validate({"type": "parts", "parts": entries})


def recipe(parts: PartsTrainable) -> RunConfig:
    values: dict[str, Any] = {
        "model": "model",
        "steps": 1,
        "output_dir": "run",
        "dtype": "float32",
        "prompts": {"type": "tasks", "names": ["fairness"], "per_step": 8},
        "objectives": {"a": {"rewards": [{"name": "choice"}], "beta": {"type": "fixed", "value": 0.02}}},
        "rollout": {"group_size": 8, "max_new_tokens": 256},
        "optim": {"learning_rate": 1e-4},
        "trainable": parts.model_dump(),
    }
    return parse_recipe(values, base_dir=Path("/nowhere"), source="the test")


def shape_named(kind: str) -> ModelShape:
    return shape_of(config_of(kind).to_dict(), source=kind)


@pytest.mark.parametrize(
    "kind", [kind if kind in DIFFERENT else pytest.param(kind, marks=pytest.mark.slow) for kind in KNOWN]
)
def test_the_plan_selects_what_the_policy_does(kind: str) -> None:
    policy = Policy(AutoModelForCausalLM.from_config(config_of(kind)), parts_of(kind), seed=0)
    own = policy.trainable_parameters()
    found = learning_parts(shape_named(kind), parts_of(kind).parts)
    assert found.full == sum(one.numel() for name, one in own.items() if ".lora_" not in name)
    assert found.adapters == sum(one.numel() for name, one in own.items() if ".lora_" in name)
    assert (found.layers, found.has_norms, found.has_head) == (2, True, False)


def entries(*modules: str, kind: str = "full") -> PartsTrainable:
    return PartsTrainable.model_validate({"type": "parts", "parts": [{"type": kind, "modules": list(modules)}]})


def test_a_tied_head_is_the_embedding_and_gradient_goes_through_all_blocks() -> None:
    found = learning_parts(shape_named("gemma"), entries("lm_head").parts)
    assert (found.full, found.has_head, found.layers) == (64 * 32, True, 3)


def test_what_learns_behind_the_blocks_needs_nothing_kept_in_them() -> None:
    found = learning_parts(shape_named("llama"), entries("model.norm").parts)
    assert (found.full, found.layers, found.linears) == (32, 0, ())


def test_a_pattern_that_fits_no_module_of_the_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'q_proj' matches no module of a llama.*'\*\*\.q_proj' matches 3 modules"):
        learning_parts(shape_named("llama"), entries("q_proj", kind="lora").parts)


def test_a_part_takes_less_than_full_training_and_more_the_more_of_it_learns() -> None:
    hardware = hardware_named("cpu:4")
    norm, layer, two = (
        plan(recipe(entries(*modules)), hardware, shape=shape_named("llama")).peak_bytes
        for modules in (("model.norm",), ("model.layers.2",), ("model.layers.1", "model.layers.2"))
    )
    assert norm < layer < two
    full = recipe(entries("model.norm")).model_dump() | {"trainable": {"type": "full"}}
    whole = plan(RunConfig.model_validate(full), hardware, shape=shape_named("llama")).peak_bytes
    assert two < whole
