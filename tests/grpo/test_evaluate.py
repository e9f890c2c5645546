"""Held-out answers become figures: worked out by hand on a few answers."""

from __future__ import annotations

from typing import Any

import pytest

from grpo.evaluate import Answer, compare, examples, figures, summarise
from grpo.types import Message, Prompt


def answer(name: str, scores: dict[str, float | None], *, kind: str | None = None, says: str = "x") -> Answer:
    prompt = Prompt(
        id=name,
        messages=(Message(role="system", content="Be brief."), Message(role="user", content=f"Who is {name}?")),
        objectives=tuple(scores),
        reference=f"the {name}",
        meta={} if kind is None else {"kind": kind},
    )
    return Answer(prompt=prompt, completion=says, scores=scores)


def answers(*values: float | None, says: str = "x", kinds: tuple[str, ...] | None = None) -> list[Answer]:
    """One objective "a", prompts p0, p1, ..."""
    return [
        answer(f"p{n}", {"a": value}, says=says, kind=kinds[n] if kinds else None) for n, value in enumerate(values)
    ]


# --- one side


def test_a_mean_is_taken_over_verdicts_and_missing_ones_are_counted_beside_it() -> None:
    found = summarise(answers(1.0, None, 0.0, 0.5, None))["a"]
    assert found["mean"] == pytest.approx(0.5)  # (1 + 0 + 0.5) / 3, not / 5
    assert (found["n"], found["unscored"]) == (3, 2)
    assert 0.0 <= found["low"] < 0.5 < found["high"] <= 1.0


def test_an_objective_without_any_verdict_is_absent_and_not_0() -> None:
    assert set(summarise([answer("p", {"a": None, "b": 0.25}), answer("q", {"a": None})])) == {"b"}
    assert summarise([]) == {}


def test_each_objective_counts_its_own_prompts() -> None:
    found = summarise([answer("p", {"a": 1.0}), answer("q", {"b": 0.0}), answer("r", {"a": 0.0, "b": 1.0})])
    assert [(found[name]["n"], found[name]["unscored"], found[name]["mean"]) for name in ("a", "b")] == [
        (2, 0, 0.5),
        (2, 0, 0.5),
    ]


def test_a_policy_that_always_says_unknown_is_seen_in_its_kinds() -> None:
    kinds = ("ambiguous", "disambiguated") * 4
    found = summarise(answers(*(1.0 if kind == "ambiguous" else 0.0 for kind in kinds), kinds=kinds))["a"]
    assert found["mean"] == 0.5
    assert found["kinds"] == {"ambiguous": 1.0, "disambiguated": 0.0}
    assert found["kind_intervals"] == {
        "ambiguous": {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 4},
        "disambiguated": {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 4},
    }


def test_a_kinds_interval_is_that_of_its_own_verdicts() -> None:
    found = summarise(answers(1.0, 0.0, None, 1.0, 0.25, kinds=("x", "x", "x", "x", "y")))["a"]
    x, y = found["kind_intervals"]["x"], found["kind_intervals"]["y"]
    assert (x["mean"], x["n"]) == (pytest.approx(2 / 3), 3)  # the missing verdict is left out
    assert (x["low"], x["high"]) == (0.0, 1.0)  # three draws of 1, 0, 1: all 0 in 1 of 27, all 1 in 8 of 27
    assert y == {"mean": 0.25, "low": 0.25, "high": 0.25, "n": 1}
    assert found["kinds"] == {"x": pytest.approx(2 / 3), "y": 0.25}


def test_prompts_without_a_kind_are_one_kind() -> None:
    assert summarise(answers(1.0, 0.0))["a"]["kinds"] == {"all": 0.5}


# --- during a run


def test_an_evaluation_in_a_run_counts_what_changed_since_the_one_before_over_prompts_that_both_have() -> None:
    earlier = {one.prompt.id: one for one in answers(0.0, 0.25, None, 1.0)}
    now = [answer("p0", {"a": 1.0}, says="y"), answer("p1", {"a": 0.25}, says="y"), *answers(0.0, 0.0, 1.0, 1.0)[2:]]
    # p0: another answer and score; p1: another answer, as good; p2: scored for the first time; p3: as it was
    found = figures([*now, answer("new", {"a": None})], earlier)
    assert found["eval/a/mean"] == pytest.approx((1.0 + 0.25 + 1.0 + 1.0) / 4)
    assert found["eval/a/unscored_frac"] == pytest.approx(1 / 5)
    assert (found["eval/a/answers_changed"], found["eval/a/scores_changed"]) == (2, 1)


def test_the_first_evaluation_in_a_run_has_nothing_to_compare_with_and_one_without_a_verdict_has_no_mean() -> None:
    found = figures([answer("p", {"a": 1.0, "b": None})], {})
    assert found == {
        "eval/a/unscored_frac": 0.0,
        "eval/a/mean": 1.0,
        "eval/a/low": 1.0,
        "eval/a/high": 1.0,
        "eval/b/unscored_frac": 1.0,
    }


# --- both sides


def test_the_difference_pairs_the_prompts_that_have_both_verdicts() -> None:
    before, after = answers(0.0, 0.5, None, 1.0), answers(1.0, 0.5, 1.0, None)
    found = compare(before, after)["a"]
    assert found["mean"] == pytest.approx(0.5)  # (1 - 0, 0.5 - 0.5) / 2; the other two lack one side
    assert (found["low"], found["high"]) == (0.0, 1.0)


def test_a_gain_that_all_prompts_share_has_no_spread_however_different_the_prompts() -> None:
    found = compare(answers(0.0, 0.25, 0.5), answers(0.5, 0.75, 1.0))["a"]
    assert found == {"mean": 0.5, "low": 0.5, "high": 0.5}  # paired: prompts' difficulty is no uncertainty


def test_an_objective_without_a_pair_has_no_difference() -> None:
    assert compare(answers(None, 1.0), answers(1.0, None)) == {}


def test_answers_to_different_numbers_of_prompts_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare(answers(1.0, 0.0), answers(1.0))


# --- examples


def shown(rows: list[dict[str, Any]]) -> list[str]:
    return [row["prompt"] for row in rows]


def test_an_example_tells_the_users_question_the_reference_and_both_answers() -> None:
    (row,) = examples(answers(0.0, says="old"), answers(1.0, says="new"))
    assert row == {"prompt": "Who is p0?", "reference": "the p0", "kind": "all", "before": "old", "after": "new"}


def test_examples_take_each_kind_once_first_and_what_changed_before_what_did_not() -> None:
    kinds = ("x", "x", "x", "y")
    before = answers(0.0, 0.0, 0.0, 0.0, kinds=kinds)
    after = answers(0.0, 1.0, 1.0, 0.0, kinds=kinds)
    after[1] = answer("p1", {"a": 1.0}, kind="x", says="changed")
    after[2] = answer("p2", {"a": 1.0}, kind="x", says="changed too")
    # of kind x the first that changed, then kind y though it did not change, then the other change
    assert shown(examples(before, after)) == ["Who is p1?", "Who is p3?", "Who is p2?"]
    assert shown(examples(before, after, count=1)) == ["Who is p1?"]
    assert len(examples(before, after, count=10)) == 4
