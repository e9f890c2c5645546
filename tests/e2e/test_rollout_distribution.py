"""20,000 one-token samples follow the exact processed distribution, under every part of the sampling law.

The tiny model in the default run, the real one in the slow run. Seeds are fixed; the level is 1% for all tests of a
model together (Bonferroni).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import encoded, make_policy
from torch import Tensor
from transformers import AutoTokenizer

from grpo.prompts import EncodedPrompt
from grpo.rollout.base import SamplingParams
from grpo.rollout.transformers_engine import TransformersEngine
from grpo.runtime.policy import Policy

NUM_SAMPLES = 20_000
LAWS: dict[str, dict[str, Any]] = {
    "none": {},
    "presence over the prompt": {"presence_penalty": 1.5, "penalties_over": "prompt"},
    "frequency over the prompt": {"frequency_penalty": 1.5, "penalties_over": "prompt"},
    "repetition": {"repetition_penalty": 2.0},
    "min tokens": {"min_new_tokens": 1, "max_new_tokens": 2},
    "banned": {"banned": ((5,), (17,))},
    "top-k": {"top_k": 12},
    "min-p": {"min_p": 0.02},
    "custom": {"custom": (("vllm_bias:Bias", '{"token": 7, "by": 2.0, "until": 1}'),)},
}
SETTINGS = [(temperature, top_p, law) for temperature in (0.7, 1.0, 1.3) for top_p in (1.0, 0.9) for law in LAWS]
SPREAD = [
    # every temperature, top-p and law is in the default run, not every combination of them
    pytest.param(
        *setting,
        marks=[] if setting[:2] == ((0.7, 1.0, 1.3)[n % 3], (1.0, 0.9)[n % 2]) else pytest.mark.slow,
    )
    for setting in SETTINGS
    for n in [list(LAWS).index(setting[2])]
]
LEVEL = 0.01 / len(SETTINGS)
END = 2


def exact_law(policy: Policy, prompt: EncodedPrompt, params: SamplingParams) -> Tensor:
    """[V] float64 probabilities of the first token, every part of the law written out for this one position."""
    with torch.no_grad():
        text = torch.tensor([prompt.token_ids])
        logits = policy.causal_lm(text, use_cache=False).logits[0, -1].double()
    for token in set(prompt.token_ids):
        if params.repetition_penalty != 1:
            value = float(logits[token])
            logits[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        count = prompt.token_ids.count(token)
        logits[token] -= params.presence_penalty + params.frequency_penalty * count
    for (token,) in params.banned:
        logits[token] = -torch.inf
    for _, arguments in params.custom:
        logits[json.loads(arguments)["token"]] += json.loads(arguments)["by"]
    if params.min_new_tokens > 0:
        logits[list(params.end_token_ids)] = -torch.inf
    descending, order = (logits / params.temperature).sort(descending=True)
    if params.top_k > 0:
        descending[params.top_k :] = -torch.inf
    law = descending.softmax(dim=-1)
    law[law.cumsum(dim=-1) - law >= params.top_p] = 0.0  # the mass before a token has reached top_p
    law[law < params.min_p * law[0]] = 0.0
    return torch.zeros_like(law).scatter(0, order, law / law.sum())


def p_value(seen: Tensor, law: Tensor) -> float:
    """Of a chi-square test; cells are pooled, rarest first, until each expects 5.

    Args:
        seen: [V] counts; law: [V] probabilities.
    """
    order = law.argsort()
    expected, counts = (law * seen.sum())[order], seen[order].double()
    chi, cells, pooled_expected, pooled_seen = 0.0, 0, 0.0, 0.0
    for one_expected, one_seen in zip(expected.tolist(), counts.tolist(), strict=True):
        pooled_expected, pooled_seen = pooled_expected + one_expected, pooled_seen + one_seen
        if pooled_expected >= 5:
            chi += (pooled_seen - pooled_expected) ** 2 / pooled_expected
            cells, pooled_expected, pooled_seen = cells + 1, 0.0, 0.0
    degrees = torch.tensor((cells - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(chi / 2, dtype=torch.float64)))


def first_tokens(engine: TransformersEngine, prompt: EncodedPrompt, params: SamplingParams, *, batch: int) -> Tensor:
    """[V] how often each token came first."""
    tokens: list[int] = []
    for seed in range(NUM_SAMPLES // batch):
        (group,) = engine.sample([prompt], batch, params=params, seed=seed)
        tokens += [completion.token_ids[0] for completion in group.completions]
    assert len(tokens) == NUM_SAMPLES
    return torch.bincount(torch.tensor(tokens), minlength=engine._model.config.vocab_size)


def check(
    engine: TransformersEngine, policy: Policy, prompt: EncodedPrompt, params: SamplingParams, batch: int
) -> None:
    law = exact_law(policy, prompt, params)
    seen = first_tokens(engine, prompt, params, batch=batch)
    assert int(seen[law == 0].sum()) == 0
    assert p_value(seen, law) > LEVEL


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Path) -> tuple[TransformersEngine, Policy]:
    """Its logits are spread out: a random model's own are all alike, and no filter would have anything to do."""
    policy = make_policy(tiny_model_dir)
    with torch.no_grad():
        policy.causal_lm.get_output_embeddings().weight.mul_(15.0)  # pyright: ignore[reportOptionalMemberAccess]
    return TransformersEngine(policy, AutoTokenizer.from_pretrained(tiny_model_dir)), policy


@pytest.fixture(scope="module")
def real(smollm_dir: Path) -> tuple[TransformersEngine, Policy]:
    policy = make_policy(smollm_dir)
    return TransformersEngine(policy, AutoTokenizer.from_pretrained(smollm_dir)), policy


@pytest.mark.parametrize(("temperature", "top_p", "law"), SPREAD)
def test_first_tokens_follow_the_exact_distribution(
    tiny: tuple[TransformersEngine, Policy], temperature: float, top_p: float, law: str
) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, end_token_ids=(END,), max_new_tokens=1)
    check(*tiny, encoded(3)[2], replace(params, **LAWS[law]), batch=5000)


def test_the_test_notices_another_temperature_and_another_top_p(tiny: tuple[TransformersEngine, Policy]) -> None:
    engine, policy = tiny
    prompt = encoded(3)[2]
    params = SamplingParams(temperature=1.0, end_token_ids=(END,), max_new_tokens=1)
    seen = first_tokens(engine, prompt, params, batch=5000)
    assert p_value(seen, exact_law(policy, prompt, params)) > LEVEL
    assert p_value(seen, exact_law(policy, prompt, replace(params, temperature=0.9))) < LEVEL
    assert int(seen[exact_law(policy, prompt, replace(params, top_p=0.9)) == 0].sum()) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "top_p", "law"), [s for s in SETTINGS if s[2] in ("none", "repetition")])
def test_first_tokens_of_the_real_model_follow_the_exact_distribution(
    real: tuple[TransformersEngine, Policy], temperature: float, top_p: float, law: str
) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, end_token_ids=(END,), max_new_tokens=1)
    ids: Any = AutoTokenizer.from_pretrained(real[0]._tokenizer.name_or_path)("The river runs from the")["input_ids"]
    prompt = replace(encoded(1)[0], token_ids=tuple(ids))
    check(*real, prompt, replace(params, **LAWS[law]), batch=1000)
