"""The policy: what learns, what stays, what its reference computes, and what its folder holds."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import full_training, make_batch, make_group, make_policy, make_updater
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from grpo.batching import TrainBatch
from grpo.config import LoraTrainable, TrainableConfig
from grpo.errors import CheckpointError, ConfigError, ModelError
from grpo.rollout.transformers_engine import TransformersEngine
from grpo.runtime.models import load_model
from grpo.runtime.policy import Policy, dropout_off, language_model_head

IDS = torch.tensor([[5, 9, 17, 3, 40]])
SMALL = {"vocab_size": 200, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA_LIKE = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2, "pad_token_id": 0}


def one_group_batch() -> TrainBatch:
    group = make_group([{"a": 1.0}, {"a": 0.0}, {"a": 0.5}], lengths=[3, 5, 4], seed=1)
    return make_batch([group])


def trained(policy: Policy, *, steps: int = 2) -> Policy:
    updater = make_updater(policy)
    for _ in range(steps):
        updater.step(one_group_batch())
    return policy


def logprobs_of(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(IDS).logits.float().log_softmax(-1)


def gpt2(**config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=200, n_positions=64, n_embd=16, n_layer=2, n_head=2, **config))


def llama(**config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE, **config))


# --- what learns


@pytest.mark.parametrize("trainable", [LoraTrainable(rank=2), full_training()], ids=["lora", "full"])
def test_what_learns_is_float32_beside_frozen_bfloat16_weights(
    tiny_model_dir: Path, trainable: TrainableConfig
) -> None:
    policy = make_policy(tiny_model_dir, trainable=trainable, dtype=torch.bfloat16)
    assert policy.compute_dtype == torch.bfloat16
    assert {p.dtype for p in policy.trainable_parameters().values()} == {torch.float32}
    frozen = {p.dtype for p in policy.model.parameters() if not p.requires_grad}
    assert frozen == ({torch.bfloat16} if isinstance(policy.model, PeftModel) else set())


def test_the_language_model_head_is_refused_an_adapter(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"matches the language-model head.*Leave the head out"):
        make_policy(tiny_model_dir, trainable=LoraTrainable(modules=("q_proj", "lm_head")))


def test_token_embeddings_are_refused_an_adapter(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"matches the token embeddings.*Leave them out"):
        make_policy(tiny_model_dir, trainable=LoraTrainable(modules=("embed_tokens", "q_proj")))


def test_a_module_that_is_not_there_is_refused_by_name(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"\['query_proj'\] do not fit this model.*nearest are \S*q_proj"):
        make_policy(tiny_model_dir, trainable=LoraTrainable(modules=("query_proj",)))


def test_the_adapter_depends_on_its_seed_alone_and_leaves_global_randomness_as_it_was(tiny_model_dir: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make_policy(tiny_model_dir, seed=3).trainable_parameters()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same, other = (make_policy(tiny_model_dir, seed=seed).trainable_parameters() for seed in (3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.gpu
def test_making_an_adapter_leaves_the_randomness_of_every_gpu_as_it_was(tiny_model_dir: Path) -> None:
    before = torch.cuda.get_rng_state_all()
    make_policy(tiny_model_dir, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(torch.cuda.get_rng_state_all(), before, strict=True))


# --- the reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [LoraTrainable(rank=2), full_training()], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("family", "rates"),
    [
        (gpt2, {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        (llama, {"attention_dropout": 0.5}),
    ],
    ids=["gpt2", "llama"],
)
def test_the_kl_is_exactly_0_before_the_first_step_with_dropout_in_the_model(
    family: Any, rates: dict[str, float], trainable: TrainableConfig, dtype: torch.dtype
) -> None:
    updater = make_updater(Policy(family(**rates).to(dtype), trainable, seed=0))
    first = updater.step(one_group_batch())
    assert (first.means["kl/a"], first.means["kl/a/penalty"], first.kl_max["a"]) == (0.0, 0.0, 0.0)
    second = updater.step(one_group_batch())  # full: one step moved everything; LoRA: B moved
    assert second.means["kl/a"] > 0.0


def test_the_reference_of_a_full_training_is_without_dropout_outside_of_a_step_too() -> None:
    policy = Policy(llama(attention_dropout=0.5), full_training(), seed=0)
    assert policy.model.training
    with policy.reference() as reference:
        assert not reference.training
        assert torch.equal(reference(IDS).logits, reference(IDS).logits)


def test_rates_of_dropout_under_other_names_are_off_too() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.layerdrop, layer.attn_pdrop, layer.scaling = 0.5, 0.25, 0.125
    with dropout_off(layer):
        assert (layer.layerdrop, layer.attn_pdrop, layer.scaling) == (0.0, 0.0, 0.125)
    assert (layer.layerdrop, layer.attn_pdrop) == (0.5, 0.25)


# --- the folder


@pytest.mark.parametrize("trainable", [LoraTrainable(rank=2), full_training()], ids=["lora", "full"])
def test_a_saved_policy_is_taken_back_as_it_was(
    tiny_model_dir: Path, tmp_path: Path, trainable: TrainableConfig
) -> None:
    policy = trained(make_policy(tiny_model_dir, trainable=trainable))
    policy.save(tmp_path)
    fresh = make_policy(tiny_model_dir, trainable=trainable, seed=9)
    assert not torch.equal(logprobs_of(fresh.model), logprobs_of(policy.model))
    fresh.load(tmp_path)
    assert torch.equal(logprobs_of(fresh.model), logprobs_of(policy.model))


def test_a_folder_of_another_rank_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    make_policy(tiny_model_dir, trainable=LoraTrainable(rank=2)).save(tmp_path)
    with pytest.raises(CheckpointError, match="does not hold this model's parameters"):
        make_policy(tiny_model_dir, trainable=LoraTrainable(rank=3)).load(tmp_path)


@pytest.mark.parametrize(
    ("trainable", "loader"),
    [(LoraTrainable(rank=2), AutoPeftModelForCausalLM), (full_training(), AutoModelForCausalLM)],
    ids=["lora", "full"],
)
def test_the_saved_folder_is_used_alone_tokenizer_included(
    tiny_model_dir: Path, tmp_path: Path, trainable: TrainableConfig, loader: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = load_model(str(tiny_model_dir), dtype=torch.float32, base_dir=tiny_model_dir)
    policy = trained(Policy(model, trainable, seed=0, tokenizer=tokenizer))
    capsys.readouterr()
    policy.save(tmp_path)
    assert capsys.readouterr().err == ""  # no progress bar in a run's log
    assert torch.equal(logprobs_of(loader.from_pretrained(tmp_path)), logprobs_of(policy.model))
    saved = AutoTokenizer.from_pretrained(tmp_path)
    chat: list[dict[str, str]] = [{"role": "user", "content": "What is 1 and 2?"}]
    assert saved.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert saved.encode("the quick brown fox") == tokenizer.encode("the quick brown fox")


def test_saving_an_adapter_asks_nobody_for_the_base_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    policy = make_policy(base)
    shutil.rmtree(base)  # peft would look for its config on the hub, and warn: warnings are errors
    policy.save(tmp_path / "policy")
    assert (tmp_path / "policy" / "adapter_model.safetensors").is_file()


# --- merged weights and the engine's copy


@pytest.mark.parametrize("family", [gpt2, llama])
def test_merged_weights_are_those_of_pefts_own_merge(family: Any) -> None:
    policy = trained(Policy(family(), LoraTrainable(rank=2, modules="all-linear"), seed=0))
    merged = dict(policy.merged_weights())
    assert isinstance(policy.model, PeftModel)
    whole: Any = copy.deepcopy(policy.model).merge_and_unload()
    expected = dict(whole.named_parameters())
    assert len(merged) == (8 if family is gpt2 else 14)  # 2 layers x 4 (c_attn, 2 c_proj, c_fc) or 7 projections
    for name, weight in merged.items():
        assert torch.allclose(weight, expected[name], rtol=0, atol=1e-7)
    plain = dict(family().named_parameters())  # what is not named did not change
    assert all(torch.equal(plain[name], value) for name, value in expected.items() if name not in merged)
    assert not any(torch.equal(plain[name], weight) for name, weight in merged.items())


class KeepsATable(LlamaForCausalLM):
    """An architecture that keeps a plain tensor, which no copy of parameters and buffers carries over."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.table = torch.arange(4)


def test_an_engine_of_a_model_with_values_outside_its_weights_is_refused_by_name(tiny_model_dir: Path) -> None:
    policy = Policy(KeepsATable(LlamaConfig(**LLAMA_LIKE)), LoraTrainable(rank=2), seed=0)
    with pytest.raises(ModelError, match=r"KeepsATable keeps model\.table neither as a parameter nor as a buffer"):
        TransformersEngine(policy, AutoTokenizer.from_pretrained(tiny_model_dir))


# --- the head


@pytest.mark.parametrize(
    ("build", "scale", "softcap"),
    [
        (lambda: llama(), 1.0, None),
        (lambda: CohereForCausalLM(CohereConfig(**LLAMA_LIKE, logit_scale=0.25)), 0.25, None),
        (lambda: GraniteForCausalLM(GraniteConfig(**LLAMA_LIKE, logits_scaling=8.0)), 0.125, None),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**LLAMA_LIKE, head_dim=8, final_logit_softcapping=0.5)), 1.0, 0.5),
    ],
    ids=["llama", "cohere", "granite", "gemma2"],
)
def test_the_head_with_its_scalings_gives_the_models_own_logits(build: Any, scale: float, softcap: float) -> None:
    torch.manual_seed(0)
    model = build().eval()
    head = language_model_head(model)
    assert (head.logit_scale, head.softcap) == (scale, softcap)
    with torch.no_grad():
        hidden = model.base_model(IDS).last_hidden_state
        logits = (hidden @ head.weight.T) * head.logit_scale
        logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
        assert torch.allclose(logits, model(IDS).logits, atol=1e-6)
