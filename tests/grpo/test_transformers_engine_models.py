"""Whatever the architecture, the engine's log-probabilities are those of a plain forward pass over the whole text."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import encoded
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grpo.config import FullTrainable
from grpo.rollout.base import SamplingParams
from grpo.rollout.transformers_engine import TransformersEngine
from grpo.runtime.policy import Policy
from grpo.types import RolloutGroup

VOCABULARY = 240
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "pad_token_id": 0,
}
GEMMA: dict[str, Any] = {**LLAMA, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.4}

SHARED: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**LLAMA)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2)),
    "gpt_neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig(**{name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}),
    ),
}
OWN_CACHE: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "mistral with a window": (MistralForCausalLM, MistralConfig(**LLAMA, sliding_window=6)),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**GEMMA)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**GEMMA)),
    "mamba": (
        MambaForCausalLM,
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.4),
    ),
    "bloom": (
        BloomForCausalLM,
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4),
    ),
}


def engine_for(name: str, tiny_model_dir: Path) -> tuple[TransformersEngine, PreTrainedModel]:
    build, config = {**SHARED, **OWN_CACHE}[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(config).eval()
    policy = Policy(model, FullTrainable(type="full"), seed=0)
    return TransformersEngine(policy, AutoTokenizer.from_pretrained(tiny_model_dir), max_rows=8), model


def plain_logprobs(model: PreTrainedModel, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> list[float]:
    text = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        law = model.eval()(text, use_cache=False).logits[0].float().log_softmax(dim=-1)
    return law[len(prompt) - 1 : -1].gather(1, text[0, len(prompt) :, None])[:, 0].tolist()


def check_agreement(model: PreTrainedModel, groups: list[RolloutGroup]) -> None:
    for group in groups:
        for completion in group.completions:
            plain = plain_logprobs(model, group.prompt_token_ids, completion.token_ids)
            assert plain == pytest.approx(completion.sampler_logprobs, abs=1e-4)


@pytest.mark.parametrize("name", [*SHARED, *OWN_CACHE])
def test_sampled_logprobs_are_those_of_a_plain_forward_pass(name: str, tiny_model_dir: Path) -> None:
    """Prompts of 4, 6 and 8 tokens and windows of 6: the window closes before, during and after the prompt."""
    engine, model = engine_for(name, tiny_model_dir)
    assert engine.shares_prompts == (name in SHARED)
    ends = tuple(range(200, VOCABULARY))  # rows end at different lengths
    groups = list(engine.sample(encoded(5), 4, params=SamplingParams(max_new_tokens=10, end_token_ids=ends), seed=1))
    assert len(groups) == 5
    assert len({len(c.token_ids) for group in groups for c in group.completions}) > 3
    check_agreement(model, groups)


def test_a_model_with_its_own_cache_says_so_in_one_line(tiny_model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="grpo.rollout"):
        engine_for("llama", tiny_model_dir)
        assert not caplog.records
        engine_for("gemma3", tiny_model_dir)
    (record,) = caplog.records
    assert "Gemma3ForCausalLM" in record.getMessage()
    assert "plain keys and values" in record.getMessage()
