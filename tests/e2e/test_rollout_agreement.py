"""Sampler and trainer agree on the real 135M model, in float32, under every part of the sampling law."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import make_policy
from sampler_agreement import check_agreement
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grpo.prompts import EncodedPrompt
from grpo.rollout.base import SamplingParams
from grpo.rollout.processors import Prefix
from grpo.rollout.transformers_engine import TransformersEngine
from grpo.runtime.policy import Policy
from grpo.runtime.seeding import derived_seed
from grpo.types import Message, Prompt

TEXTS = ("Name three rivers.", "Why is the sky blue? Answer briefly.", "Write a line about the sea.", "2 + 2 is")
PARAMS = SamplingParams(end_token_ids=(2,), max_new_tokens=12)
OVERS = ("completion", "prompt", "both")


class Echo:
    """A processor of one's own: the longer the completion, the likelier its last token comes again."""

    def __init__(self, *, by: float) -> None:
        self._by = by

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        added = torch.zeros_like(logits).scatter(1, prefix.recent(1).clamp(min=0), self._by)
        return logits + added * prefix.lengths[:, None]


CUSTOM = {"custom": ((f"{__name__}:Echo", '{"by": 0.4}'),)}
LAWS: dict[str, dict[str, Any]] = {
    "none": {},
    **{f"presence over {over}": {"presence_penalty": 0.8, "penalties_over": over} for over in OVERS},
    **{f"frequency over {over}": {"frequency_penalty": 0.6, "penalties_over": over} for over in OVERS},
    **{f"repetition over {over}": {"repetition_penalty": 1.3, "repetition_over": over} for over in OVERS},
    "min tokens": {"min_new_tokens": 5},
    "banned": {"banned": ((30,), (28, 198))},
    "no-repeat-ngram": {"no_repeat_ngram": 2},
    "custom": CUSTOM,
    "top-k": {"top_k": 20},
    "min-p": {"min_p": 0.03},
    "all together": {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "penalties_over": "both",
        "repetition_penalty": 1.2,
        "min_new_tokens": 3,
        "banned": ((30,),),
        "no_repeat_ngram": 3,
        "top_k": 200,
        "min_p": 0.002,
        **CUSTOM,
    },
}
DEFAULT = ("presence over both", "all together")


def _marks(number: int, name: str, temperature: float, top_p: float) -> list[pytest.MarkDecorator]:
    """CI has every law, and each temperature and top-p with some of them; the default run two of those."""
    if (temperature, top_p) != ([0.7, 1.0, 1.3][number % 3], [1.0, 0.9][number % 2]):
        return [pytest.mark.slow]
    return [] if name in DEFAULT else [pytest.mark.long]


SETTINGS = [
    pytest.param(
        temperature, top_p, name, id=f"{temperature}-{top_p}-{name}", marks=_marks(number, name, temperature, top_p)
    )
    for number, name in enumerate(LAWS)
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


@pytest.mark.parametrize(("temperature", "top_p", "name"), SETTINGS)
def test_the_trainer_gives_every_token_the_samplers_logprob(
    engine: TransformersEngine,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
    top_p: float,
    name: str,
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    params = replace(PARAMS, temperature=temperature, top_p=top_p, **LAWS[name])
    groups = list(engine.sample(prompts_of(tokenizer, TEXTS), 3, params=params, seed=1))
    found = check_agreement(policy, groups, params)
    record_testsuite_property(f"{temperature}-{top_p}-{name}", f"{found.worst_gap:.1e} nats, {found.num_excused}")
    assert found.num_tokens > 100


@pytest.mark.parametrize("law", [{"top_p": 0.9}, {"presence_penalty": 0.8}])
def test_the_check_fails_where_the_replay_is_switched_off(
    engine: TransformersEngine, policy: Policy, tokenizer: PreTrainedTokenizerBase, law: dict[str, Any]
) -> None:
    params = replace(PARAMS, **law)
    groups = list(engine.sample(prompts_of(tokenizer, TEXTS[:2]), 2, params=params, seed=1))
    with pytest.raises(AssertionError, match="tokens differ, by up to"):
        check_agreement(policy, groups, params, replayed=PARAMS)


def test_the_check_fails_where_the_temperature_is_not_passed(
    engine: TransformersEngine, policy: Policy, tokenizer: PreTrainedTokenizerBase
) -> None:
    groups = list(engine.sample(prompts_of(tokenizer, TEXTS[:2]), 2, params=replace(PARAMS, temperature=0.7), seed=1))
    with pytest.raises(AssertionError, match="tokens differ, by up to"):
        check_agreement(policy, groups, PARAMS)


ENDS = (2, 30, 28, 198)
"""Beside the model's own: full stop, comma and end of line, so that rows leave early."""
LONG_TEXT = "Here is what the harbour master wrote in the book that winter. " * 6


@pytest.mark.parametrize(
    ("num_texts", "k"),
    [
        pytest.param(4, 8, id="4 prompts x 8", marks=pytest.mark.long),
        pytest.param(32, 1, id="32 prompts", marks=pytest.mark.slow),
    ],
)
def test_a_completion_alone_is_that_of_a_batch_of_32_up_to_a_tie(
    engine: TransformersEngine, policy: Policy, tokenizer: PreTrainedTokenizerBase, num_texts: int, k: int
) -> None:
    """Prompts of other lengths beside it, rows that leave before it ends, and rows that stay when it has left.

    A tie: the draw lies within 1e-5 of the edge between the two tokens in the cumulative distribution.
    """
    params = replace(PARAMS, max_new_tokens=16, end_token_ids=ENDS)
    texts = [LONG_TEXT, *TEXTS[:3], *(f"{text} {'Please. ' * number}" for number in range(7) for text in TEXTS)]
    prompts = prompts_of(tokenizer, texts[:num_texts])
    together = {group.prompt.id: group for group in engine.sample(prompts, k, params=params, seed=3)}
    lengths = sorted(len(c.token_ids) for group in together.values() for c in group.completions)
    assert len(lengths) == 32
    assert lengths[8] < lengths[-1] == 16  # more than a quarter left before the last, which was at its full length
    assert len({len(prompt.token_ids) for prompt in prompts}) >= min(num_texts, 10)
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
