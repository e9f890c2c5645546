"""The trainer's side of the tests of real vLLM: the 135M model with a disturbed adapter, and prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import make_prompt
from real_vllm_builders import BLOCK, fresh_policy
from transformers import PreTrainedTokenizerBase

from grpo.prompts import EncodedPrompt
from grpo.runtime.models import load_tokenizer
from grpo.runtime.policy import Policy

QUESTIONS = [
    "The capital of France is",
    "Count: 1 2 3 4 1 2 3 4 1 2",
    "Once upon a time there was a little",
    "List: apples, pears,",
]
STORY = (
    "Once upon a time there was a little mill by a river, and in it an old miller with three daughters. The first "
    "could sing, the second could count, and the third could do neither, but she listened to everybody who came by: "
    "carters, soldiers, a bishop who had lost his way, even the cat. When the old man died there was nothing to share "
    "but the wheel, a sack of rye and a debt. The singer went to town and the counter married the baker. The youngest "
    "stayed behind, for she had heard from the carters what flour cost in winter, and from the bishop where the mill "
    "had once had a second stone. So one morning she took a spade, walked down to the bank, and began to dig. Under "
    "the roots of the oldest willow she found a"
)


@pytest.fixture(scope="session")
def tokenizer(smollm_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(smollm_dir), base_dir=smollm_dir)


@pytest.fixture(scope="session")
def policy(smollm_dir: Path) -> Policy:
    """No test changes it."""
    return fresh_policy(smollm_dir, seed=1)


@pytest.fixture(scope="session")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[EncodedPrompt]:
    return [
        EncodedPrompt(prompt=make_prompt(f"q{number}"), token_ids=tuple(tokenizer.encode(text)))
        for number, text in enumerate(QUESTIONS)
    ]


@pytest.fixture(scope="session")
def prompts_32(tokenizer: PreTrainedTokenizerBase) -> list[EncodedPrompt]:
    """32 beginnings of the story."""
    ids = tokenizer.encode(STORY)
    return [EncodedPrompt(prompt=make_prompt(f"s{number}"), token_ids=tuple(ids[: 4 + number])) for number in range(32)]


@pytest.fixture(scope="session")
def open_prompt(tokenizer: PreTrainedTokenizerBase) -> EncodedPrompt:
    """As long as `long_prompt`, for the same reason; many tokens may follow it."""
    ids = tokenizer.encode(STORY)
    assert len(ids) > BLOCK
    return EncodedPrompt(prompt=make_prompt("open"), token_ids=tuple(ids[-BLOCK - 1 :]))


@pytest.fixture(scope="session")
def too_many_prompts(tokenizer: PreTrainedTokenizerBase) -> list[EncodedPrompt]:
    """No two begin alike, and vLLM computes no more than 4,096 prompt tokens in a step by itself: they do not fit."""
    ids = tokenizer.encode(STORY)
    turned = [tuple(ids[start:] + ids[:start]) for start in range(36)]
    assert sum(map(len, turned)) > 4096
    return [EncodedPrompt(prompt=make_prompt(f"t{number}"), token_ids=one) for number, one in enumerate(turned)]


@pytest.fixture(scope="session")
def long_prompt(tokenizer: PreTrainedTokenizerBase) -> EncodedPrompt:
    """One token longer than a block, so that the block is served from the cache."""
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 12)
    return EncodedPrompt(prompt=make_prompt("long"), token_ids=tuple(ids[: BLOCK + 1]))
