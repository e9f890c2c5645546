"""Sampler and trainer agree on the real 135M model, in float32, under every part of the sampling law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import make_batch, make_policy
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grpo.prompts import EncodedPrompt
from grpo.rollout.base import SamplingParams
from grpo.rollout.replay import Replay, ReplayedPrompts
from grpo.rollout.transformers_engine import TransformersEngine
from grpo.runtime.policy import Policy
from grpo.runtime.seeding import derived_seed
from grpo.types import Message, Prompt, RolloutGroup, ScoredGroup, Verdict
from grpo.update.forward import policy_pass

TEXTS = ("Name three rivers.", "Why is the sky blue? Answer briefly.", "Write a line about the sea.", "2 + 2 is")
PARAMS = SamplingParams(end_token_ids=(2,), max_new_tokens=10)
PROCESSORS: dict[str, dict[str, Any]] = {
    "none": {},
    "presence": {"presence_penalty": 0.8},
    "frequency": {"frequency_penalty": 0.6, "penalties_over": "both"},
    "repetition": {"repetition_penalty": 1.3},
    "min tokens": {"min_new_tokens": 5},
    "banned": {"banned": ((30,), (28, 198))},
    "no-repeat-ngram": {"no_repeat_ngram": 2},
}


def _marks(number: int, temperature: float, top_p: float) -> list[pytest.MarkDecorator]:
    if (temperature, top_p) != ([0.7, 1.0, 1.3][number % 3], [1.0, 0.9][number % 2]):
        return [pytest.mark.slow]
    return [] if number % 3 == 1 else [pytest.mark.long]


SETTINGS = [
    pytest.param(
        temperature,
        top_p,
        name,
        id=f"{temperature}-{top_p}-{name}",
        # CI has every temperature, top-p and processor, not every combination; the default run every other of those
        marks=_marks(number, temperature, top_p),
    )
    for number, name in enumerate(PROCESSORS)
    for temperature in (0.7, 1.0, 1.3)
    for top_p in (1.0, 0.9)
]


@pytest.fixture(scope="module")
def tokenizer(smollm_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm_dir)


@pytest.fixture(scope="module")
def policy(smollm_dir: Path) -> Policy:
    """float32, and its adapter is no longer 0."""
    policy = make_policy(smollm_dir)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return policy


@pytest.fixture(scope="module")
def engine(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> TransformersEngine:
    engine = TransformersEngine(policy, tokenizer)
    assert engine.shares_prompts
    return engine


def prompts_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[EncodedPrompt]:
    prompts = []
    for number, text in enumerate(texts):
        chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        ids: Any = tokenizer(chat)["input_ids"]
        prompt = Prompt(id=str(number), messages=(Message(role="user", content=text),), objectives=("a",))
        prompts.append(EncodedPrompt(prompt=prompt, token_ids=tuple(ids)))
    return prompts


def compared(
    policy: Policy, groups: Sequence[RolloutGroup], params: SamplingParams, *, with_replay: bool = True
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """sampler [N], trainer [N] log-probabilities of every token, and how many tokens had to be forced."""
    scored = [
        ScoredGroup(
            rollout=group,
            verdicts=tuple({"a": Verdict(value=float(k), parts={})} for k in range(len(group.completions))),
        )
        for group in groups
    ]
    (micro,) = make_batch(scored, budget=1_000_000).micro_batches
    mask = micro.completion_mask
    rows, offsets = mask.nonzero(as_tuple=True)
    lengths = micro.prompt_mask.sum(dim=1)
    prompts = ReplayedPrompts(token_ids=micro.prompt_ids, lengths=lengths, of_row=micro.prompt_of_row)
    replay = Replay(params, micro.completion_ids, rows, offsets, prompts=prompts)
    if not with_replay:
        replay = Replay(SamplingParams(end_token_ids=params.end_token_ids), micro.completion_ids, rows, offsets)
    with torch.no_grad():
        trainer = policy_pass(policy, micro, params, replay=replay).logprobs[mask]
    sampler = {
        (*group.prompt_token_ids, *c.token_ids): c.sampler_logprobs for group in groups for c in group.completions
    }
    found: list[float] = []
    for row, group in enumerate(micro.prompt_of_row.tolist()):
        prompt = micro.prompt_ids[group, : int(lengths[group])].tolist()
        found += sampler[(*prompt, *micro.completion_ids[row][mask[row]].tolist())]
    return torch.tensor(found), trainer, replay.num_forced


@pytest.mark.parametrize(("temperature", "top_p", "name"), SETTINGS)
def test_the_trainer_gives_every_token_the_samplers_logprob(
    engine: TransformersEngine,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
    top_p: float,
    name: str,
) -> None:
    params = replace(PARAMS, temperature=temperature, top_p=top_p, **PROCESSORS[name])
    groups = list(engine.sample(prompts_of(tokenizer, TEXTS), 6, params=params, seed=1))
    sampler, trainer, num_forced = compared(policy, groups, params)
    assert len(sampler) > 100
    assert num_forced <= 0.005 * len(sampler)
    if num_forced == 0:
        torch.testing.assert_close(trainer, sampler, rtol=0, atol=1e-4)
    else:  # a token at the edge of top-p changes the mass of its position
        assert int(((trainer - sampler).abs() > 1e-4).sum()) <= num_forced


@pytest.mark.parametrize("law", [{"top_p": 0.9}, {"presence_penalty": 0.8}])
def test_the_check_fails_where_the_replay_is_switched_off(
    engine: TransformersEngine, policy: Policy, tokenizer: PreTrainedTokenizerBase, law: dict[str, Any]
) -> None:
    params = replace(PARAMS, **law)
    groups = list(engine.sample(prompts_of(tokenizer, TEXTS), 2, params=params, seed=1))
    sampler, trainer, _ = compared(policy, groups, params, with_replay=False)
    assert float((trainer - sampler).abs().max()) > 0.01


def test_the_check_fails_where_the_temperature_is_not_passed(
    engine: TransformersEngine, policy: Policy, tokenizer: PreTrainedTokenizerBase
) -> None:
    groups = list(engine.sample(prompts_of(tokenizer, TEXTS), 2, params=replace(PARAMS, temperature=0.7), seed=1))
    sampler, trainer, _ = compared(policy, groups, PARAMS)
    assert float((trainer - sampler).abs().max()) > 0.05


def test_a_completion_alone_is_that_of_a_batch_of_32_up_to_a_tie(
    engine: TransformersEngine, policy: Policy, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A tie: the draw lies within 1e-5 of the edge between the two tokens in the cumulative distribution."""
    params = replace(PARAMS, max_new_tokens=16)
    prompts = prompts_of(tokenizer, TEXTS)
    together = {group.prompt.id: group for group in engine.sample(prompts, 8, params=params, seed=3)}
    for prompt in prompts:
        (alone,) = engine.sample([prompt], 1, params=params, seed=3)
        one, other = alone.completions[0].token_ids, together[prompt.prompt.id].completions[0].token_ids
        if one == other:
            continue
        first = next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        with torch.no_grad():
            text = torch.tensor([[*prompt.token_ids, *one[:first]]])
            law = policy.causal_lm(text, use_cache=False).logits[0, -1].double().softmax(dim=-1)
        draw = np.random.default_rng(derived_seed(3, prompt.prompt.id, 0)).random(params.max_new_tokens)[first]
        edge = float(law.cumsum(dim=-1)[min(one[first], other[first])])
        assert abs(edge - draw) < 1e-5
