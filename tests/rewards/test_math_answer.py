"""Mathematically equal is 1, anything else 0; a bad reference or a comparison without end is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards import RewardContext, RewardInput, RewardSpec, Score, build_reward, check_reward_ready
from rewards.answer_text import answer_text
from rewards.math_answer import MathAnswer

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May, 72 for $1 each.\n#### 72"


@pytest.fixture(scope="module")
def rewards_by_extraction() -> Iterator[dict[str, MathAnswer]]:
    rewards = {extract: MathAnswer(extract=extract) for extract in ("auto", "boxed", "last_number")}
    yield rewards
    for reward in rewards.values():
        asyncio.run(reward.aclose())


def score_of(reward: MathAnswer, completion: str, reference: str | None) -> Score:
    return asyncio.run(
        reward.score([RewardInput(prompt_id="p", prompt="", completion=completion, reference=reference)])
    )[0]


@pytest.mark.parametrize(
    ("reference", "completion", "value"),
    [
        (GSM8K, "#### 72", 1.0),
        (GSM8K, "She sold 72.", 1.0),
        (GSM8K, "She sold 24 in May, so 71.", 0.0),
        ("#### 1,234", "It is $1,234.00.", 1.0),
        ("#### 6", r"<<4+2=6.00>> $4.00 + $2.00 = $6.00" + "\n#### 6", 1.0),  # dollars of money, not of LaTeX
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        (r"\frac{1}{2}", r"The answer is $\frac12$.", 1.0),
        (r"$\frac{1}{2}$", "1/2", 1.0),
        (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{2}{4}}", 1.0),
        (r"\sqrt{2}", r"\boxed{\sqrt 2}", 1.0),
        (r"\sqrt{2}", r"\boxed{1.41}", 0.0),
        ("x+1", r"\boxed{1+x}", 1.0),
        ("x+1", r"\boxed{1+y}", 0.0),
        ("x + 1", "1 + x", 1.0),
        ("x + 1", "1", 0.0),  # the reference is a formula, not a sentence that ends in 1
        ("2^{10}", "1024", 1.0),
        ("2^{10}", "2", 0.0),
        (r"\sin(2x) + 3", r"\boxed{3}", 0.0),
        ("sin(2x) + 3", "3", 0.0),
        ("5 apples", "5", 1.0),
        ("5", r"\boxed{5 \text{ apples}}", 1.0),
        ("5", r"\boxed{x = 5}", 1.0),
        ("5", "7 - 2 = 5", 1.0),
        ("18", r"\boxed{\$18}", 1.0),
        ("$18", "18", 1.0),
        ("0.05", r"\boxed{5\%}", 1.0),
        ("1234", r"\boxed{1,234}", 1.0),
        ("1 234 567", "1234567", 1.0),
        ("1234567", "1 234 567", 1.0),
        ("1,2,3", r"\boxed{3, 2, 1}", 1.0),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", 1.0),
        (r"[1,2)", r"\boxed{[1,2]}", 0.0),
        (r"\text{east}", r"\boxed{\text{east}}", 1.0),
        ("-3", "It is -3.", 1.0),
        ("3", "It is -3.", 0.0),
        ("3", r"First \boxed{4}, then \boxed{3}", 1.0),
        ("4", r"First \boxed{4}, then \boxed{3}", 0.0),
        ("3", r"\boxed{3}, and not 4", 1.0),
        ("3", "<think>It may be 4.</think> 3", 1.0),
        ("3", "<think>It is 3", 0.0),
        ("3", "no idea", 0.0),
        ("3", r"\boxed{", 0.0),
        ("3", "", 0.0),
        ("????", "3", None),
        ("####", "3", None),
        ("", "3", None),
        (None, "3", None),
    ],
)
def test_the_answer_wherever_it_stands(rewards_by_extraction, reference, completion, value):
    answer = score_of(rewards_by_extraction["auto"], completion, reference)
    assert answer.value == value
    assert answer.reason


@pytest.mark.parametrize(
    ("extract", "completion", "value", "reason"),
    [
        ("boxed", r"\boxed{7}", 1.0, "right"),
        ("boxed", r"\boxed{\text{about }\frac{14}{2}}", 0.0, "wrong"),
        ("boxed", "7", 0.0, r"no \boxed"),
        ("last_number", "6, no: 7.", 1.0, "right"),
        ("last_number", "x is 3+4 = +7", 1.0, "right"),
        ("last_number", "10-7", 1.0, "right"),  # the minus is an operator
        ("last_number", "7 or 8", 0.0, "8 for 7"),
        ("last_number", "seven", 0.0, "no number"),
    ],
)
def test_the_answer_where_the_recipe_says(rewards_by_extraction, extract, completion, value, reason):
    answer = score_of(rewards_by_extraction[extract], completion, "7")
    assert answer.value == value
    assert reason in answer.reason


@pytest.mark.parametrize(
    ("completion", "value"),
    [("<answer>7</answer>", 1.0), ("<answer>8</answer> <answer> 7 </answer>", 1.0), ("7", 0.0), ("<answer>7", 0.0)],
)
def test_only_what_stands_in_the_tag_is_read(completion, value):
    reward = MathAnswer(answer_tag="answer")
    assert score_of(reward, completion, "7").value == value
    asyncio.run(reward.aclose())


def test_a_comparison_without_end_costs_one_verdict():
    async def run(reward: MathAnswer, *completions: str) -> list[Score]:
        inputs = [RewardInput(prompt_id="p", prompt="", completion=text, reference="7") for text in completions]
        try:
            return await reward.score(inputs)
        finally:
            await reward.aclose()

    endless = r"\boxed{\sum_{n=1}^{10^{10^{10}}} 10^{10^{10^{n}}}}"
    scores = asyncio.run(run(MathAnswer(timeout_s=2.0), "7", endless, "8"))
    assert [score.value for score in scores] == [1.0, None, 0.0]
    assert scores[1].reason.startswith(("timeout", "memory"))
    assert asyncio.run(run(MathAnswer(timeout_s=2.0, limit_score=0.0), endless))[0].value == 0.0


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(-(10**9), 10**9), st.integers(1, 999))
def test_a_fraction_equals_itself_in_every_spelling_and_not_its_successor(rewards_by_extraction, top, bottom):
    reward = rewards_by_extraction["auto"]
    completions = [
        rf"\boxed{{\frac{{{top}}}{{{bottom}}}}}",
        rf"${top}/{bottom}$",
        rf"\boxed{{\frac{{{top + 1}}}{{{bottom}}}}}",
    ]
    inputs = [
        RewardInput(prompt_id="p", prompt="", completion=text, reference=f"{top}/{bottom}") for text in completions
    ]
    assert [score.value for score in asyncio.run(reward.score(inputs))] == [1.0, 1.0, 0.0]


def test_it_is_found_by_name_and_says_that_it_is_ready(tmp_path):
    reward = build_reward(RewardSpec(name="math_answer", params={"extract": "boxed"}), RewardContext(base_dir=tmp_path))
    assert isinstance(reward, MathAnswer)

    async def check() -> None:
        await check_reward_ready(reward)
        await reward.aclose()

    asyncio.run(check())


@pytest.mark.parametrize(
    ("text", "tag", "answer"),
    [
        ("plain", None, "plain"),
        ("<think>a</think>b", None, "b"),
        ("<think>a", None, None),
        ("a</think>b</think>c", None, "c"),  # a chat template may write the first <think> itself
        ("<answer>a</answer></think>b", "answer", None),
        ("<answer>a</answer> b", "answer", "a"),
        ("<answer>a</answer><answer>b</answer>", "answer", "b"),
        ("</answer>a<answer>", "answer", None),
    ],
)
def test_where_the_answer_stands(text, tag, answer):
    assert answer_text(text, tag=tag) == answer
