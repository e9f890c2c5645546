"""What holds for every rule: one finite score or a reason for each row, whatever the text, in whatever order."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards import AnyReward, RewardContext, RewardInput, RewardSpec, build_reward, close_reward, score_group

RULES = {
    "abstention_penalty": {},
    "choice": {"letters": True},
    "exact_match": {},
    "format": {"pattern": r"(?s).*\d.*", "tags": ["answer"]},
    "grounding": {"max_words": 20},
    "length": {"target_tokens": 2, "limit_tokens": 8},
    "math_answer": {},
    "regions": {},
}
META = {"choices": ["Anna", "7", "unknown"]}
REFERENCES = {"regions": "[0, 0, 1, 1]", "length": None, "format": None}

PIECES = [
    "Anna",
    "7",
    "unknown",
    "not stated",
    "<answer>",
    "</answer>",
    "</think>",
    r"\boxed{",
    "}",
    "[0,0,1,1]",
    "[",
    "{",
]
PIECES += [
    "A",
    "(B)",
    "####",
    "$",
    "\n",
    " ",
    ".",
    "\ud800",
    "\x00",
    "é",
    "１",
    "-",
    "/",
    "0",
    "%",
    "^",
    "\\frac{1}{0}",
]
texts = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, AnyReward]]:
    context = RewardContext(base_dir=tmp_path_factory.mktemp("recipe"))
    built = {name: build_reward(RewardSpec(name=name, params=params), context) for name, params in RULES.items()}
    yield built
    for reward in built.values():
        asyncio.run(close_reward(reward))


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(completions=st.lists(texts, min_size=1, max_size=4), random=st.randoms())
def test_scores_are_in_range_reasoned_and_follow_their_rows(rules, name, completions, random):
    rows = [
        RewardInput(
            prompt_id="p",
            prompt="Who?",
            completion=text,
            reference=REFERENCES.get(name, "7"),
            num_tokens=len(text),
            meta=META,
        )
        for text in completions
    ]
    order = random.sample(range(len(rows)), len(rows))

    async def both():
        return await score_group(rules[name], rows), await score_group(rules[name], [rows[index] for index in order])

    scores, shuffled = asyncio.run(both())
    assert shuffled == [scores[index] for index in order]
    low, high = (-1.0, 0.0) if name in ("length", "abstention_penalty") else (0.0, 1.0)
    for score in scores:
        assert score.value is not None, score.reason  # the references are good and no text here is endless
        assert math.isfinite(score.value)
        assert low <= score.value <= high
