"""20,000 one-token samples follow the exact processed distribution, under every part of the sampling law.

The tiny model in the default run, the real one in the slow run. Seeds are fixed; the level is 1% for all tests of a
model together (Bonferroni).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import encoded, make_policy
from exact_law import exact_law, p_value
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
    law = exact_law(policy, prompt.token_ids, params)
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
    assert p_value(seen, exact_law(policy, prompt.token_ids, params)) > LEVEL
    assert p_value(seen, exact_law(policy, prompt.token_ids, replace(params, temperature=0.9))) < LEVEL
    assert int(seen[exact_law(policy, prompt.token_ids, replace(params, top_p=0.9)) == 0].sum()) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "top_p", "law"), [s for s in SETTINGS if s[2] in ("none", "repetition")])
def test_first_tokens_of_the_real_model_follow_the_exact_distribution(
    real: tuple[TransformersEngine, Policy], temperature: float, top_p: float, law: str
) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, end_token_ids=(END,), max_new_tokens=1)
    ids: Any = AutoTokenizer.from_pretrained(real[0]._tokenizer.name_or_path)("The river runs from the")["input_ids"]
    prompt = replace(encoded(1)[0], token_ids=tuple(ids))
    check(*real, prompt, replace(params, **LAWS[law]), batch=1000)
