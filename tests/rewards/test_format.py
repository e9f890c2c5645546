"""A completion has the asked-for shape or not; a pattern that never comes back costs one verdict."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import RewardConfigError, RewardContext, RewardInput, RewardSpec, Score, build_reward
from rewards.format import Format, tags_problem


def scores(reward: Format, *completions: str) -> list[Score]:
    async def run() -> list[Score]:
        try:
            return await reward.score([RewardInput(prompt_id="p", prompt="", completion=text) for text in completions])
        finally:
            await reward.aclose()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("params", "completion", "value"),
    [
        ({"max_words": 2}, "one two", 1.0),
        ({"max_words": 2}, "one two three", 0.0),
        ({"one_line": True}, "one\n", 1.0),
        ({"one_line": True}, "one\ntwo", 0.0),
        ({"pattern": r"\d+"}, " 42 ", 1.0),
        ({"pattern": r"\d+"}, "42 apples", 0.0),
        ({"pattern": r"(?s)<think>.*</think>.+"}, "<think>a\nb</think> c", 1.0),
        ({"pattern": r"\d+", "max_words": 1}, "forty", 0.0),
        ({"pattern": r".*"}, "", 0.0),
    ],
)
def test_words_lines_and_patterns(params, completion, value):
    assert scores(Format(**params), completion)[0].value == value


@pytest.mark.parametrize(
    ("completion", "problem"),
    [
        ("<think>a</think><answer>b</answer>", ""),
        ("<think>\na\n</think>\n\n<answer>\nb\n</answer>\n", ""),
        ("<answer>b</answer><think>a</think>", "text before <think>"),
        ("<think>a<answer>b</answer></think>", "<answer> is out of order"),
        ("<think>a</think>b", "<answer>...</answer> is not there exactly once"),
        ("<think>a</think><answer>b", "<answer>...</answer> is not there exactly once"),
        ("<think>a</think><answer>b</answer><answer>c</answer>", "<answer>...</answer> is not there exactly once"),
        ("<think>a<think>b</think></think><answer>c</answer>", "<think>...</think> is not there exactly once"),
        ("</think>a<think><answer>b</answer>", "nothing inside <think>...</think>"),
        ("<think> </think><answer>b</answer>", "nothing inside <think>...</think>"),
        ("< think>a</think><answer>b</answer>", "<think>...</think> is not there exactly once"),
        ("well <think>a</think><answer>b</answer>", "text before <think>"),
        ("<think>a</think> so <answer>b</answer>", "text before <answer>"),
        ("<think>a</think><answer>b</answer>.", "text after </answer>"),
    ],
)
def test_tags_stand_once_and_in_order(completion, problem):
    answer = scores(Format(tags=["think", "answer"], text_around_tags=False), completion)[0]
    assert answer.value == float(not problem)
    assert answer.reason == (problem or "has the asked-for format")


def test_text_around_the_tags_is_allowed_unless_it_is_not():
    assert scores(Format(tags=["think"]), "<think>a</think> b")[0].value == 1.0
    assert scores(Format(tags=["think"], text_around_tags=False), "<think>a</think> b")[0].value == 0.0


@given(st.lists(st.sampled_from(["<a>", "</a>", "<b>", "</b>", "x", " "]), max_size=8).map("".join))
def test_the_tags_are_those_that_a_pattern_finds(text):
    import re

    inside = r"((?:(?!</?[ab]>).)*\S(?:(?!</?[ab]>).)*)"
    pattern = rf"(?:(?!</?[ab]>).)*<a>{inside}</a>(?:(?!</?[ab]>).)*<b>{inside}</b>(?:(?!</?[ab]>).)*"
    matched = re.fullmatch(pattern, text)
    is_nonempty = matched is not None and bool(matched[1].strip()) and bool(matched[2].strip())
    assert (tags_problem(text, ["a", "b"]) == "") == is_nonempty


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ('{"name": "Ann", "age": 3}', "has the asked-for format"),
        ('```json\n{"name": "Ann"}\n```', "has the asked-for format"),
        ('```\n{"name": "Ann"}\n```', "has the asked-for format"),
        ('Here: {"name": "Ann"}', "not JSON"),
        ('{"name": "Ann"', "not JSON"),
        ('{"name": "Ann", "age": NaN}', "not JSON: NaN"),
        ('{"age": 3}', "at $: 'name' is a required property"),
        ('{"name": "Ann", "age": -1}', "at $.age: -1 is less than the minimum of 0"),
        ('{"name": "Ann", "shoe": 1}', "Additional properties"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_json_meets_the_schema(completion, reason):
    answer = scores(Format(json_schema=PERSON), completion)[0]
    assert reason in answer.reason
    assert answer.value == float(reason == "has the asked-for format")


def test_an_empty_schema_asks_for_any_json():
    assert [one.value for one in scores(Format(json_schema={}), "3", "[]", "three")] == [1.0, 1.0, 0.0]


def test_a_schema_is_never_fetched():
    answer = scores(Format(json_schema={"$ref": "https://example.com/schema.json"}), "3")[0]
    assert answer.value is None
    assert "example.com" in answer.reason


@pytest.mark.parametrize(
    "params", [{"pattern": "(a+)+"}, {"json_schema": {"pattern": '^("?a+)+$'}}], ids=["pattern", "schema"]
)
def test_a_pattern_without_end_costs_one_verdict(params):
    endless = '"' + "a" * 60 + 'b"' if "json_schema" in params else "a" * 60 + "b"
    quick = '"ab"' if "json_schema" in params else "b"
    values = [one.value for one in scores(Format(**params, timeout_s=2.0), quick, endless, quick)]
    assert values == [0.0, None, 0.0]
    assert scores(Format(**params, timeout_s=0.5, limit_score=0.0), endless)[0].value == 0.0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "nothing is asked for"),
        ({"pattern": "("}, "not a regular expression"),
        ({"tags": ["<think>"]}, "tags.0"),
        ({"tags": ["a", "a"]}, "named twice"),
        ({"json_schema": {"type": "text"}}, "not a JSON Schema"),
        ({"patern": "a"}, "did you mean 'pattern'"),
    ],
)
def test_parameters_that_cannot_be_meant_are_refused(params, message, tmp_path):
    with pytest.raises(RewardConfigError, match=message):
        build_reward(RewardSpec(name="format", params=params), RewardContext(base_dir=tmp_path))
