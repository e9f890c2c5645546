"""Packed = padded = one row at a time, for several architectures: what the loss is made of, and its gradient."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import make_batch, make_group, make_updater
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo.batching import MicroBatch
from grpo.config import FullTrainable, LoraTrainable
from grpo.rollout.base import SamplingParams
from grpo.runtime.policy import Policy
from grpo.types import ScoredGroup
from grpo.update.forward import policy_pass, reference_logprobs, try_prompt_sharing
from grpo.update.kl import kl_penalty

VOCABULARY = 240
PARAMS = SamplingParams(end_token_ids=(2,), max_new_tokens=16, temperature=0.7)
GROUPED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,  # random weights are small otherwise, and look at no position
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.4}
GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, **TOKENS}
WINDOW: dict[str, Any] = {**GROUPED, "sliding_window": 6, "query_pre_attn_scalar": 8}

SHARED: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "llama, grouped queries": (LlamaForCausalLM, LlamaConfig(**GROUPED)),
    "llama, as many keys as queries": (LlamaForCausalLM, LlamaConfig(**{**GROUPED, "num_key_value_heads": 4})),
    "llama, one key for all queries, tied head": (
        LlamaForCausalLM,
        LlamaConfig(**{**GROUPED, "num_key_value_heads": 1}, tie_word_embeddings=True),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**GROUPED)),
    "qwen3, tied head": (Qwen3ForCausalLM, Qwen3Config(**GROUPED, tie_word_embeddings=True)),
    "gemma3 without windows": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(**WINDOW, layer_types=["full_attention", "full_attention"]),
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
}
WHOLE_ROWS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**WINDOW, layer_types=["sliding_attention", "full_attention"])),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**WINDOW, attn_logit_softcapping=None)),
    "mistral with a window": (MistralForCausalLM, MistralConfig(**GROUPED, sliding_window=6)),
    "mamba": (
        MambaForCausalLM,
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, **TOKENS),
    ),
}
"""A window, or a state that is carried on."""
EITHER: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "bloom": (BloomForCausalLM, BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **TOKENS)),
}
"""Plain keys and values, but an attention of its own, by distances instead of positions."""


SLOW = {
    "llama, as many keys as queries",
    "llama, one key for all queries, tied head",
    "qwen3",
    "gemma2",
    "mistral with a window",
}
"""Near to another one that the default run has."""


def cases(names: Iterable[str], rows: Iterable[str]) -> list[Any]:
    """Every model with every shape of rows."""
    return [
        pytest.param(name, shape, marks=[pytest.mark.slow] * (name in SLOW), id=f"{name}: {shape}")
        for name in names
        for shape in rows
    ]


def scored(*lengths: int, prompt: int, seed: int) -> ScoredGroup:
    """A group whose completions have these lengths, 0 included; scores in no order."""
    scores: list[dict[str, float | None]] = [{"a": float((3 * k) % 5)} for k in range(len(lengths))]
    group = make_group(scores, lengths=[max(length, 1) for length in lengths], prompt_length=prompt, seed=seed)
    completions = tuple(
        completion if length else replace(completion, token_ids=(), sampler_logprobs=())
        for completion, length in zip(group.rollout.completions, lengths, strict=True)
    )
    return replace(group, rollout=replace(group.rollout, completions=completions))


ROWS = {
    "ragged groups, several in a micro-batch": [
        scored(3, 9, 12, prompt=4, seed=1),
        scored(1, 8, prompt=13, seed=2),
        scored(6, 6, 2, 5, prompt=9, seed=3),
    ],
    "one completion for each prompt": [scored(7, prompt=5, seed=4), scored(3, prompt=11, seed=5)],
    "empty completions": [scored(0, 6, 0, 4, prompt=8, seed=6), scored(0, 5, prompt=3, seed=7)],
    "an end token alone beside others": [scored(1, 10, 1, prompt=6, seed=8), scored(1, 4, prompt=9, seed=9)],
    "end tokens alone": [scored(1, 1, 1, prompt=6, seed=10), scored(1, prompt=2, seed=11)],
    "prompts of one token": [scored(4, 2, prompt=1, seed=12), scored(5, 1, prompt=1, seed=13)],
}


def micro_of(rows: str) -> MicroBatch:
    (micro,) = make_batch(ROWS[rows]).micro_batches
    return micro


def policy_of(name: str) -> Policy:
    """With an adapter that has moved, so that there is a KL; all weights of a model that takes no adapter."""
    build, config = {**SHARED, **WHOLE_ROWS, **EITHER}[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(config)
        is_recurrent = build is MambaForCausalLM  # peft has its own opinion about that model's linears
        policy = Policy(model, FullTrainable(type="full") if is_recurrent else LoraTrainable(rank=2, alpha=4), seed=0)
        with torch.no_grad():
            for parameter in policy.trainable_parameters().values():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


Figures = dict[str, Tensor]
"""Log-probabilities, entropies and KL of N loss tokens, row by row, and the gradient [D] of a mixture of all three."""


def figures_of(policy: Policy, logprobs: Tensor, entropy: Tensor, ref_logprobs: Tensor) -> Figures:
    """Args: all [N], under logits / temperature."""
    kl = kl_penalty(logprobs[None], ref_logprobs[None], estimator="k3")[0]
    weights = torch.linspace(-1.0, 1.0, len(logprobs))
    loss = (weights * logprobs).sum() + 0.5 * (weights.flip(0) * entropy).sum() + kl.sum()
    gradients = torch.autograd.grad(loss, list(policy.trainable_parameters().values()), allow_unused=True)
    flat = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "kl": kl.detach(), "gradient": flat}


@functools.cache
def still_policy(name: str) -> Policy:
    """One for all tests that take no step."""
    return policy_of(name)


def ours(policy: Policy, micro: MicroBatch, *, shares: bool | None) -> Figures:
    policy.shares_prompts = shares
    mask = micro.completion_mask
    reference = reference_logprobs(policy, micro, PARAMS)[mask]
    forward = policy_pass(policy, micro, PARAMS, entropy_has_gradient=True)
    return figures_of(policy, forward.logprobs[mask], forward.entropy[mask], reference)


def one_row_at_a_time(policy: Policy, micro: MicroBatch) -> Figures:
    """Whole logits of one unpadded row after the other, without a cache."""

    def laws(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
        found: list[tuple[Tensor, Tensor]] = []
        for row, prompt in enumerate(micro.prompt_of_row.tolist()):
            question = micro.prompt_ids[prompt][micro.prompt_mask[prompt].bool()]
            answer = micro.completion_ids[row][micro.completion_mask[row]]
            logits = model(torch.cat([question, answer])[None], use_cache=False).logits[0, len(question) - 1 : -1]
            law = (logits / PARAMS.temperature).log_softmax(dim=-1)  # [T, V]
            found.append((law.gather(1, answer[:, None])[:, 0], -(law.exp() * law).sum(dim=-1)))
        return found

    with policy.reference() as reference:
        ref_logprobs = torch.cat([logprobs for logprobs, _ in laws(reference)])
    logprobs, entropy = (torch.cat(values) for values in zip(*laws(policy.causal_lm), strict=True))
    return figures_of(policy, logprobs, entropy, ref_logprobs)


def assert_same(found: Figures, expected: Figures) -> None:
    for name in ("logprobs", "entropy", "kl"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4, msg=lambda text, n=name: n + text)
    gap = float((found["gradient"] - expected["gradient"]).norm() / expected["gradient"].norm())
    assert gap < 1e-4, f"the gradients differ by {gap:.1e} of their norm"


@pytest.mark.parametrize(("name", "rows"), cases(SHARED, ROWS))
def test_with_shared_prompts_logprobs_entropy_kl_and_gradient_are_those_of_rows_apart(name: str, rows: str) -> None:
    policy, micro = still_policy(name), micro_of(rows)
    expected = one_row_at_a_time(policy, micro)
    assert expected["kl"].max() > 1e-4
    assert_same(ours(policy, micro, shares=True), expected)
    assert_same(ours(policy, micro, shares=False), expected)


@pytest.mark.parametrize(("name", "rows"), cases([*WHOLE_ROWS, *EITHER], ROWS))
def test_whole_rows_of_a_model_with_windows_or_states_are_those_of_rows_apart(name: str, rows: str) -> None:
    """Padding lies at the end of a row: before a completion it would fill the window, or go on in the state."""
    policy, micro = still_policy(name), micro_of(rows)
    assert_same(ours(policy, micro, shares=False), one_row_at_a_time(policy, micro))


@pytest.mark.parametrize("name", [*SHARED, *WHOLE_ROWS])
def test_a_model_is_given_shared_prompts_or_what_it_is_given_instead_is_said_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy = policy_of(name)
    updater = make_updater(policy, params=PARAMS)
    batch = make_batch(ROWS["ragged groups, several in a micro-batch"])
    with caplog.at_level(logging.INFO, logger="grpo.update"):
        for step in range(2):
            updater.step(batch, step=step, steps=2)
    said = [record for record in caplog.records if "whole rows" in record.getMessage()]
    assert policy.shares_prompts == (name in SHARED)
    assert [record.levelname for record in said] == ([] if name in SHARED else ["WARNING"])
    assert all(type(policy.causal_lm).__name__ in record.getMessage() for record in said)


@pytest.mark.parametrize(("name", "rows"), cases(["llama, grouped queries", *EITHER], ROWS))
def test_what_is_decided_on_the_first_batch_is_right(name: str, rows: str) -> None:
    """Whatever its completions are: of one token, of one prompt each, alone."""
    policy, micro = still_policy(name), micro_of(rows)
    for seen in (micro, micro.rows(torch.tensor([0]))):
        policy.shares_prompts = None
        try_prompt_sharing(policy, seen)
        assert_same(ours(policy, seen, shares=policy.shares_prompts), one_row_at_a_time(policy, seen))
        if policy.shares_prompts is not None:
            other = micro_of("ragged groups, several in a micro-batch")
            assert_same(ours(policy, other, shares=policy.shares_prompts), one_row_at_a_time(policy, other))


def test_one_micro_batch_and_one_for_each_row_have_one_gradient() -> None:
    """Several groups in a row, a part of a group, and a row alone: the sums are the same."""
    policy = still_policy("qwen3, tied head")
    groups = ROWS["ragged groups, several in a micro-batch"]
    found: list[Tensor] = []
    for budget in (8192, 40, 1):
        total = torch.zeros(sum(p.numel() for p in policy.trainable_parameters().values()))
        for micro in make_batch(groups, budget=budget).micro_batches:
            policy.shares_prompts = True
            forward = policy_pass(policy, micro, PARAMS)
            loss = (forward.logprobs * micro.advantages[:, None])[micro.completion_mask].sum()
            parameters = list(policy.trainable_parameters().values())
            total += torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])
        found.append(total)
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) < 1e-5
