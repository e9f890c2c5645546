"""Real vLLM and every part of the sampling law: 20,000 one-token samples follow the exact processed distribution, and
the trainer gives every token the sampler's log-probability.

A small random model, for sampling from the real one takes minutes a law. Seeds are fixed; the level of the
distributions is 1% for all of a model together (Bonferroni).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import encoded
from exact_law import exact_law, p_value
from real_vllm_builders import LAWS, PARAMS, check_every_temperature_and_top_p, fresh_policy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from grpo.config import VllmEngineConfig
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import RolloutEngine
from grpo.rollout.vllm_engine import VllmEngine
from grpo.runtime.policy import Policy

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

NUM_SAMPLES = 20_000
FIRST_TOKEN_LAWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cooler": {"temperature": 0.7},
    "hotter, top-p": {"temperature": 1.3, "top_p": 0.9},
    "occurrence": {
        "temperature": 0.8,
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "penalties_over": "both",
    },
    "repetition, bans": {"repetition_penalty": 2.0, "banned": ((5,), (17,)), "min_new_tokens": 1},
    "top-k, top-p, min-p": {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "min_p": 0.005},
}
QUICK_FIRST_TOKEN_LAWS = ("occurrence", "top-k, top-p, min-p")
REAL_FIRST_TOKEN_LAWS = ("plain", "occurrence")
LEVEL = 0.01 / len(FIRST_TOKEN_LAWS)


@pytest.fixture(scope="module")
def small_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of a size that vLLM has a kernel for, and logits that are spread out."""
    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = AutoConfig.from_pretrained(folder)
    config.head_dim = 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(small_dir: Path) -> Iterator[tuple[VllmEngine, Policy]]:
    policy = fresh_policy(small_dir, seed=1)
    config = VllmEngineConfig(type="vllm", max_model_len=256, kv_cache_gib=0.1)
    tokenizer = AutoTokenizer.from_pretrained(small_dir)
    engine = VllmEngine(policy, tokenizer, config, model=small_dir, params=PARAMS, max_rows=1000)
    yield engine, policy
    engine.close()


@pytest.fixture(scope="module")
def real(policy: Policy, tokenizer: PreTrainedTokenizerBase, smollm_dir: Path) -> Iterator[tuple[VllmEngine, Policy]]:
    config = VllmEngineConfig(type="vllm", max_model_len=512, kv_cache_gib=0.5)
    engine = VllmEngine(policy, tokenizer, config, model=smollm_dir, params=PARAMS, max_rows=128)
    yield engine, policy
    engine.close()


@pytest.mark.parametrize("law", LAWS)
def test_sampler_and_trainer_agree_on_every_token(
    small: tuple[VllmEngine, Policy], law: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("agreement", check_every_temperature_and_top_p(*small, encoded(16), LAWS[law]))


def check(engine: RolloutEngine, policy: Policy, prompt: EncodedPrompt, law: dict[str, Any]) -> float:
    """The p-value. Raises AssertionError where the samples do not follow the law, or would follow another one too."""
    params = replace(PARAMS, max_new_tokens=1, **law)
    (group,) = engine.sample([prompt], NUM_SAMPLES, params=params, seed=0)
    expected = exact_law(policy, prompt.token_ids, params)
    seen = torch.bincount(torch.tensor([c.token_ids[0] for c in group.completions]), minlength=len(expected))
    assert int((NUM_SAMPLES * expected > 5).sum()) > 20
    assert int(seen[expected == 0].sum()) == 0
    p = p_value(seen, expected)
    assert p > LEVEL
    hotter = replace(params, temperature=1.1 * params.temperature)
    assert p_value(seen, exact_law(policy, prompt.token_ids, hotter)) < LEVEL
    return p


@pytest.mark.parametrize(
    "law",
    [law if law in QUICK_FIRST_TOKEN_LAWS else pytest.param(law, marks=pytest.mark.slow) for law in FIRST_TOKEN_LAWS],
)
def test_first_tokens_follow_the_exact_processed_distribution(
    small: tuple[VllmEngine, Policy], law: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("p_value", check(*small, encoded(3)[2], FIRST_TOKEN_LAWS[law]))


@pytest.mark.slow
@pytest.mark.parametrize("law", REAL_FIRST_TOKEN_LAWS)
def test_first_tokens_of_the_real_model_follow_the_exact_processed_distribution(
    real: tuple[VllmEngine, Policy],
    open_prompt: EncodedPrompt,
    law: str,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("p_value", check(*real, open_prompt, FIRST_TOKEN_LAWS[law]))
