"""The engine samples from the stated law, from the policy's current weights, and says with what probability."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import END, encoded, make_batch, make_group, make_policy, make_updater
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from grpo.rollout.base import SamplingParams
from grpo.rollout.transformers_engine import TransformersEngine, generation_config
from grpo.runtime.policy import Policy
from grpo.types import Completion, RolloutGroup, ScoredGroup, Verdict
from grpo.update.forward import policy_pass

PARAMS = SamplingParams(end_token_ids=(END,), max_new_tokens=12)


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    """A policy whose adapter is no longer 0."""
    policy = make_policy(tiny_model_dir)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return policy


@pytest.fixture(scope="module")
def engine(policy: Policy, tiny_model_dir: Path) -> TransformersEngine:
    return TransformersEngine(policy, AutoTokenizer.from_pretrained(tiny_model_dir))


def sample(engine: TransformersEngine, params: SamplingParams, *, count: int = 3, k: int = 4, seed: int = 0) -> Any:
    groups = {group.prompt.id: group for group in engine.sample(encoded(count), k, params=params, seed=seed)}
    return [groups[f"p{number}"] for number in range(count)]


def trainer_logprobs(policy: Policy, groups: list[RolloutGroup], params: SamplingParams) -> list[list[float]]:
    scored = [
        ScoredGroup(
            rollout=group,
            verdicts=tuple({"a": Verdict(value=float(k), parts={})} for k in range(len(group.completions))),
        )
        for group in groups
    ]
    batch = make_batch(scored, budget=100_000)
    (micro,) = batch.micro_batches
    with torch.no_grad():
        logprobs = policy_pass(policy, micro, params).logprobs
    found = {}
    for row, group in enumerate(micro.prompt_of_row.tolist()):
        prompt, length = int(micro.prompt_mask[group].sum()), int(micro.completion_mask[row].sum())
        ids = (*micro.prompt_ids[group, :prompt].tolist(), *micro.completion_ids[row, :length].tolist())
        found[ids] = logprobs[row, :length].tolist()
    return [found[(*group.prompt_token_ids, *c.token_ids)] for group in groups for c in group.completions]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize(
    "law",
    [
        {},
        {"top_p": 0.9},
        {"top_k": 20},
        {"presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"min_new_tokens": 4},
        {"repetition_penalty": 1.4},
        {"presence_penalty": 0.7, "penalties_over": "prompt", "repetition_penalty": 1.4},
        {"no_repeat_ngram": 1, "banned": ((4,), (5,), (6, 7))},
        {"top_p": 0.8, "top_k": 50, "presence_penalty": 0.5, "min_new_tokens": 3},
    ],
)
def test_sampler_and_trainer_agree_on_every_token(
    engine: TransformersEngine, policy: Policy, temperature: float, law: dict[str, Any]
) -> None:
    params = replace(PARAMS, temperature=temperature, **law)
    groups = sample(engine, params)
    trainer = trainer_logprobs(policy, groups, params)
    completions = [c for group in groups for c in group.completions]
    for completion, logprobs in zip(completions, trainer, strict=True):
        assert logprobs == pytest.approx(completion.sampler_logprobs, abs=1e-4)


def test_the_agreement_test_would_notice_a_temperature_that_is_not_replayed(
    engine: TransformersEngine, policy: Policy
) -> None:
    groups = sample(engine, replace(PARAMS, temperature=0.7))
    trainer = trainer_logprobs(policy, groups, PARAMS)
    sampler = [list(c.sampler_logprobs) for group in groups for c in group.completions]
    gaps = [abs(a - b) for x, y in zip(trainer, sampler, strict=True) for a, b in zip(x, y, strict=True)]
    assert max(gaps) > 0.05


def test_greedy_decoding_equals_transformers_own_generate(
    engine: TransformersEngine, policy: Policy, tiny_model_dir: Path
) -> None:
    """Left padding, positions, the shared prompt and rows that leave early change no token."""
    groups = sample(engine, replace(PARAMS, temperature=0.0), k=2)
    merged: PreTrainedModel = policy.causal_lm
    for group in groups:
        ids = torch.tensor([group.prompt_token_ids])
        expected = merged.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=END, pad_token_id=END),
        )[0, ids.shape[1] :].tolist()
        assert [list(c.token_ids) for c in group.completions] == [expected, expected]


def test_temperature_and_top_p_reach_generate_without_a_warning(
    tiny_model_dir: Path, policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[GenerationConfig] = []
    engine = TransformersEngine(policy, AutoTokenizer.from_pretrained(tiny_model_dir))
    model = engine._model
    own_generate = model.generate

    def recording(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["generation_config"])
        return own_generate(*args, **kwargs)

    model.generate = recording
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(engine.sample(encoded(1), 2, params=replace(PARAMS, temperature=0.6, top_p=0.9, top_k=7), seed=0))
        list(engine.sample(encoded(1), 1, params=replace(PARAMS, temperature=0.0), seed=0))
    assert (seen[0].do_sample, seen[0].temperature, seen[0].top_p, seen[0].top_k) == (True, 0.6, 0.9, 7)
    assert seen[1].do_sample is False
    assert "may be ignored" not in caplog.text


def test_two_temperatures_give_different_entropy(engine: TransformersEngine) -> None:
    def mean_logprob(temperature: float) -> float:
        groups = sample(engine, replace(PARAMS, temperature=temperature), k=16)
        values = [p for group in groups for c in group.completions for p in c.sampler_logprobs]
        return sum(values) / len(values)

    assert mean_logprob(0.3) > mean_logprob(1.0) > mean_logprob(1.5)


def test_one_token_samples_follow_the_exact_processed_distribution(engine: TransformersEngine, policy: Policy) -> None:
    """Chi-square over 8,000 samples of the first token at temperature 0.8 and top-p 0.9; the bound is its 1e-4 tail."""
    params = replace(PARAMS, temperature=0.8, top_p=0.9, max_new_tokens=1)
    (prompt,) = encoded(1)
    with torch.no_grad():
        logits = policy.causal_lm(torch.tensor([prompt.token_ids])).logits[0, -1] / 0.8
    descending, order = logits.softmax(-1).sort(descending=True)
    kept = descending.cumsum(-1) - descending < 0.9  # the mass before a token is below top_p
    exact = {int(t): float(p) for t, p in zip(order[kept], descending[kept] / descending[kept].sum(), strict=True)}
    (group,) = engine.sample([prompt], 8000, params=params, seed=3)
    counts = Counter(c.token_ids[0] for c in group.completions)
    assert set(counts) <= set(exact)
    pooled_expected, pooled_seen, chi, cells = 0.0, 0, 0.0, 0
    for token, probability in sorted(exact.items(), key=lambda item: item[1]):
        pooled_expected, pooled_seen = pooled_expected + 8000 * probability, pooled_seen + counts[token]
        if pooled_expected >= 5:
            chi += (pooled_seen - pooled_expected) ** 2 / pooled_expected
            pooled_expected, pooled_seen, cells = 0.0, 0, cells + 1
    degrees = cells - 1
    # Wilson-Hilferty: chi-square's 1 - 1e-4 quantile
    bound = degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi < bound


def test_a_completion_does_not_depend_on_what_it_is_batched_with(engine: TransformersEngine) -> None:
    together = sample(engine, PARAMS, count=3, k=4, seed=9)
    for number, prompt in enumerate(encoded(3)):
        (alone,) = engine.sample([prompt], 2, params=PARAMS, seed=9)
        assert [c.token_ids for c in alone.completions] == [c.token_ids for c in together[number].completions[:2]]


def test_samples_of_a_group_differ_and_another_seed_gives_others(engine: TransformersEngine) -> None:
    first, again, other = (sample(engine, PARAMS, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert len({c.token_ids for c in first.completions}) > 1
    assert [c.token_ids for c in first.completions] != [c.token_ids for c in other.completions]


def test_a_completion_ends_with_the_first_of_several_end_tokens(engine: TransformersEngine) -> None:
    ends = (END, *range(100, 180))
    groups = sample(engine, replace(PARAMS, end_token_ids=ends), k=16)
    completions = [c for group in groups for c in group.completions]
    stopped = [c for c in completions if c.finish_reason == "stop"]
    assert len({c.token_ids[-1] for c in stopped}) > 1  # several of them did end something
    for c in completions:
        assert not set(c.token_ids[:-1]) & set(ends)
        assert (c.token_ids[-1] in ends) == (c.finish_reason == "stop")
        assert c.finish_reason == "stop" or len(c.token_ids) == 12
        assert len(c.sampler_logprobs) == len(c.token_ids)


def test_no_end_token_among_the_first_min_new_tokens(engine: TransformersEngine) -> None:
    ends = (END, *range(100, 180))
    free = sample(engine, replace(PARAMS, end_token_ids=ends), k=16)
    held = sample(engine, replace(PARAMS, end_token_ids=ends, min_new_tokens=5), k=16)
    assert min(len(c.token_ids) for group in free for c in group.completions) < 6
    assert min(len(c.token_ids) for group in held for c in group.completions) >= 6


def test_groups_leave_in_turns_when_rows_are_limited(tiny_model_dir: Path, policy: Policy) -> None:
    engine = TransformersEngine(policy, AutoTokenizer.from_pretrained(tiny_model_dir), max_rows=4)
    narrow = sample(engine, PARAMS, count=3, k=4, seed=5)
    wide = sample(TransformersEngine(policy, AutoTokenizer.from_pretrained(tiny_model_dir)), PARAMS, seed=5)
    assert [[c.token_ids for c in g.completions] for g in narrow] == [
        [c.token_ids for c in g.completions] for g in wide
    ]


def test_the_engine_samples_from_new_weights_only_after_load_weights(tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir)
    engine = TransformersEngine(policy, AutoTokenizer.from_pretrained(tiny_model_dir))
    groups = sample(engine, PARAMS)
    batch = make_batch([make_group([{"a": 1.0}, {"a": 0.0}], seed=1)])
    make_updater(policy, learning_rate=0.05).step(batch)
    assert sample(engine, PARAMS) == groups  # stale on purpose
    engine.load_weights(policy)
    fresh = sample(engine, PARAMS)
    trainer = trainer_logprobs(policy, fresh, PARAMS)
    sampler = [c.sampler_logprobs for group in fresh for c in group.completions]
    for expected, got in zip(trainer, sampler, strict=True):
        assert got == pytest.approx(expected, abs=1e-4)
    assert fresh != groups


def test_sampling_leaves_the_policy_untouched(tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir)
    state = {name: value.clone() for name, value in policy.model.state_dict().items()}
    engine = TransformersEngine(policy, AutoTokenizer.from_pretrained(tiny_model_dir))
    sample(engine, PARAMS)
    assert policy.model.training
    assert all(torch.equal(value, state[name]) for name, value in policy.model.state_dict().items())


def test_native_arguments_of_greedy_decoding_name_no_sampling() -> None:
    config = generation_config(replace(PARAMS, temperature=0.0))
    assert config.do_sample is False
    assert config.temperature is None or config.temperature == 1.0


def test_completions_decode_to_text_without_special_tokens(engine: TransformersEngine) -> None:
    completion: Completion
    for group in sample(engine, PARAMS, k=8):
        for completion in group.completions:
            assert "<|im_end|>" not in completion.text
