"""What the tests of real vLLM share: policies with weights of their own, samples in order, and the agreement of
sampler and trainer over temperatures and top-p."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from builders import make_policy
from sampler_agreement import MAX_EXCUSED_FRAC, Agreement, check_agreement, compared

from grpo.prompts import EncodedPrompt
from grpo.rollout.base import RolloutEngine, SamplingParams
from grpo.runtime.policy import Policy
from grpo.types import RolloutGroup

END = 2
"""End token of the 135M model."""
PARAMS = SamplingParams(end_token_ids=(END,), max_new_tokens=8)
BLOCK = 128
"""Tokens that vLLM's prefix cache keeps together on a CPU: shorter prompts are never cached."""
BIAS = (("vllm_bias:Bias", '{"by": 4.0, "token": 29}'),)
LAWS: dict[str, dict[str, Any]] = {
    "no processor": {},
    "minimum": {"min_new_tokens": 4},
    "presence and frequency": {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    "presence and frequency over the prompt": {
        "presence_penalty": 1.5,
        "frequency_penalty": 0.4,
        "penalties_over": "prompt",
    },
    "presence and frequency over both": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "penalties_over": "both"},
    "repetition": {"repetition_penalty": 1.3, "repetition_over": "both"},
    "repetition of the prompt": {"repetition_penalty": 1.3, "repetition_over": "prompt"},
    "repetition of the completion": {"repetition_penalty": 1.3, "repetition_over": "completion"},
    "banned": {"banned": ((28,), (216, 33))},
    "no repeat": {"no_repeat_ngram": 2},
    "own": {"custom": BIAS},
    "all": {
        "top_k": 50,
        "min_new_tokens": 3,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.2,
        "no_repeat_ngram": 3,
        "custom": BIAS,
    },
    "min-p": {"min_p": 0.05},
}
"""Each processor over everything that it may look at; and the filters that are ours instead of vLLM's."""


def check_every_temperature_and_top_p(
    engine: RolloutEngine, policy: Policy, prompts: Sequence[EncodedPrompt], law: Mapping[str, Any]
) -> Agreement:
    """What was found for temperatures 0.7, 1 and 1.3 with top-p 1 and 0.9 together; else as `check_agreement`."""
    found = []
    for temperature in (0.7, 1.0, 1.3):
        for top_p in (1.0, 0.9):
            params = replace(PARAMS, temperature=temperature, top_p=top_p, **law)
            groups = sample(engine, prompts, params, k=2)
            found.append(check_agreement(policy, groups, params, max_excused_frac=1.0 if top_p < 1 else 0.0))
    total = Agreement(
        num_tokens=sum(each.num_tokens for each in found),
        num_excused=sum(each.num_excused for each in found),
        worst_gap=max(each.worst_gap for each in found),
    )
    assert total.num_tokens > 1000
    assert total.num_excused <= MAX_EXCUSED_FRAC * total.num_tokens, total
    return total


def sample(
    engine: RolloutEngine, prompts: Sequence[EncodedPrompt], params: SamplingParams, *, k: int = 4, seed: int = 0
) -> list[RolloutGroup]:
    """In the order of the prompts."""
    groups = {group.prompt.id: group for group in engine.sample(prompts, k, params=params, seed=seed)}
    return [groups[prompt.prompt.id] for prompt in prompts]


def check_same_as_alone(engine: RolloutEngine, prompts: Sequence[EncodedPrompt]) -> None:
    """The first, a middle and the last of the prompts have the tokens that they have by themselves."""
    params = replace(PARAMS, max_new_tokens=2)
    together = sample(engine, prompts, params, k=2)
    for number in (0, len(prompts) // 2, len(prompts) - 1):
        (alone,) = sample(engine, [prompts[number]], params, k=2)
        assert [c.token_ids for c in together[number].completions] == [c.token_ids for c in alone.completions]


def largest_gap(policy: Policy, groups: Sequence[RolloutGroup], params: SamplingParams = PARAMS) -> float:
    """Of |sampler - trainer|, in nats, over all tokens; the trainer's as the update computes them."""
    sampler, trainer, _ = compared(policy, groups, params)
    return float((trainer - sampler).abs().max())


def fresh_policy(folder: Path, *, seed: int, **options: Any) -> Policy:
    """A policy whose trainable part is disturbed, so that its log-probabilities are its own."""
    policy = make_policy(folder, **options)
    disturb(policy, seed=seed)
    return policy


def disturb(policy: Policy, *, seed: int) -> None:
    """Noise on the trainable part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_A" not in name:
                scale = 0.02 if "lora_B" in name else 0.02 * float(parameter.std(correction=0))
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
