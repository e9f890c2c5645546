"""The built-in rules, as tables of completions and the scores they deserve."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import ValidationError

from rewards import RewardInput, Score
from rewards.abstention import is_abstention
from rewards.abstention_penalty import AbstentionPenalty
from rewards.choice import Choice
from rewards.exact_match import ExactMatch
from rewards.grounding import Grounding
from rewards.length import Length
from rewards.mentions import mentioned

PEOPLE = ["Anna", "Ben", "unknown"]
FACTS = "Mia's bag is red. Tom's bike is blue.\nWhat colour is Mia's kite?"


def score(
    reward, completion: str, *, reference: str | None = None, prompt: str = "", num_tokens: int = 0, **meta
) -> Score:
    one = RewardInput(
        prompt_id="p", prompt=prompt, completion=completion, reference=reference, num_tokens=num_tokens, meta=meta
    )
    return asyncio.run(reward.score([one]))[0]


@pytest.mark.parametrize(
    ("completion", "given"),
    [
        ("Anna", "Anna"),
        (" anna.\n", "Anna"),
        ("ANNA!", "Anna"),
        ("**Anna**", "Anna"),
        ("The answer is Anna.", "Anna"),
        ("Anna was the one who forgot the key.", "Anna"),
        ("Anna, not Ben", "Anna"),
        ("It wasn't Ben, it was Anna.", "Anna"),
        ("Anna rather than Ben", "Anna"),
        ("Ben didn't. Anna did.", "Anna"),
        ("Not Anna but Ben", "Ben"),
        ("unknown", "unknown"),
        ("The one who forgot the key is unknown.", "unknown"),
        ("It cannot be known.", "unknown"),
        ("It’s not known whether Anna or Ben did it", "unknown"),
        ("Can't be determined", "unknown"),
        ("Not enough information.", "unknown"),
        ("I don't know", "unknown"),
        ("No one knows.", "unknown"),
        ("It is impossible to tell.", "unknown"),
        ("The text does not say.", "unknown"),
        ("I'm not sure.", "unknown"),
    ],
)
def test_choice_is_one_for_the_choice_given_and_zero_for_every_other(completion, given):
    values = {reference: score(Choice(), completion, reference=reference, choices=PEOPLE).value for reference in PEOPLE}
    assert values == {reference: float(reference == given) for reference in PEOPLE}


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "   ",
        "Anna or Ben",
        "Anna and Ben",
        "Anna, Ben or unknown",
        "Anna, but it cannot be known",
        "Unknown. Anna?",
        "Maybe Anna",
        "It could be Ben.",
        "Probably Ben",
        "not Anna",
        "Neither Anna nor Ben",
        "Annabel",
        "Hannah",
        "Anna-Maria",
        "Somebody else",
    ],
)
def test_choice_is_zero_for_none_several_or_hedged(completion):
    for reference in PEOPLE:
        answer = score(Choice(), completion, reference=reference, choices=PEOPLE)
        assert answer.value == 0.0
        assert answer.reason


def test_choice_maps_any_abstaining_choice_and_reference_to_each_other():
    choices = ["The nurse", "The farmer", "Can't be determined"]
    assert score(Choice(), "It is unknown.", reference="Can't be determined", choices=choices).value == 1.0
    assert score(Choice(), "It is unknown.", reference="unknown", choices=choices).value == 1.0
    assert score(Choice(), "nurse", reference="the nurse", choices=choices).value == 1.0


def test_choice_abstaining_where_no_choice_abstains_is_wrong():
    assert score(Choice(), "Anna, or unknown", reference="Anna", choices=["Anna", "Ben"]).value == 0.0


@pytest.mark.parametrize(
    ("reference", "meta", "cause"),
    [
        (None, {"choices": PEOPLE}, "no reference"),
        ("Clara", {"choices": PEOPLE}, "not among the choices"),
        ("Anna", {}, "expected a list of strings"),
        ("Anna", {"choices": "Anna"}, "expected a list of strings"),
        ("Anna", {"choices": ["Anna", 3]}, "expected a list of strings"),
    ],
)
def test_choice_without_a_usable_reference_is_missing_not_zero(reference, meta, cause):
    answer = score(Choice(), "Anna", reference=reference, **meta)
    assert answer.value is None
    assert cause in answer.reason


@pytest.mark.parametrize(
    ("completion", "value_if_not_stated", "value_if_red"),
    [
        ("not stated", 1.0, 0.0),
        ("Not stated.", 1.0, 0.0),
        ("Unknown", 1.0, 0.0),
        ("The colour of Mia's kite is not stated.", 1.0, 0.0),
        ("The text does not mention what colour Mia's kite is.", 1.0, 0.0),
        ("It isn't mentioned.", 1.0, 0.0),
        ("I don't know.", 1.0, 0.0),
        ("Red", 0.0, 1.0),
        ("It is red.", 0.0, 1.0),
        ("Red, not blue.", 0.0, 1.0),
        ("Blue", 0.0, 0.0),
        ("red or blue", 0.0, 0.0),
        ("Maybe red", 0.0, 0.0),
        ("not red", 0.0, 0.0),
        ("Not stated, red", 0.0, 0.0),
        ("Red is not stated. Blue.", 0.0, 0.0),
        ("Mia's bag is red. Not stated.", 0.0, 0.0),
        ("hundred", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_grounding_with_choices(completion, value_if_not_stated, value_if_red):
    for reference, value in (("not stated", value_if_not_stated), ("red", value_if_red)):
        answer = score(
            Grounding(), completion, reference=reference, prompt=FACTS, choices=["red", "blue", "not stated"]
        )
        assert answer.value == value
        assert answer.reason


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("Not stated.", 1.0),
        ("The colour of Mia's kite is not stated in the text.", 1.0),
        ("The text does not provide any information about Mia's kite.", 1.0),
        ("Not stated, but it is green.", 0.0),
        ("It is unknown. Perhaps purple.", 0.0),
        ("There are 3 kites; not stated", 0.0),
    ],
)
def test_grounding_without_choices_reads_any_new_word_as_a_claim(completion, value):
    assert score(Grounding(), completion, reference="not stated", prompt=FACTS).value == value


def test_grounding_accepts_aliases_and_limits_words():
    assert score(Grounding(), "grey", reference="gray").value == 0.0
    assert score(Grounding(), "grey", reference="gray", aliases=["grey"]).value == 1.0
    assert score(Grounding(max_words=3), "it is gray", reference="gray").value == 1.0
    assert score(Grounding(max_words=2), "it is gray", reference="gray").value == 0.0


@pytest.mark.parametrize("reference", [None, "", "  "])
def test_grounding_without_a_reference_is_missing_not_zero(reference):
    assert score(Grounding(), "red", reference=reference).value is None


@pytest.mark.parametrize("text", ["Anna did not know the way.", "Anna could not find it", "Anna was not given a prize"])
def test_someone_in_the_story_who_does_not_know_is_no_abstention(text):
    assert not is_abstention(text)


def test_the_longer_name_hides_the_shorter_one():
    assert mentioned("It was Ann Lee.", ["Ann", "Ann Lee"]) == {"Ann Lee"}
    assert mentioned("Ann saw Ann Lee.", ["Ann", "Ann Lee"]) == {"Ann", "Ann Lee"}


def test_a_number_is_not_found_inside_another():
    assert mentioned("It costs 3.5 euros", ["3"]) == set()
    assert mentioned("It costs 3.", ["3"]) == {"3"}


@pytest.mark.parametrize(
    ("completion", "reference", "value"),
    [
        ("Paris", "Paris", 1.0),
        (" paris.\n", "Paris", 1.0),
        ('"Paris"', "Paris", 1.0),
        ("New  York", "New York", 1.0),
        ("Paris, France", "Paris", 0.0),
        ("-5", "5", 0.0),
        ("3.5", "35", 0.0),
        ("", "Paris", 0.0),
        ("Paris", None, None),
    ],
)
def test_exact_match(completion, reference, value):
    assert score(ExactMatch(), completion, reference=reference).value == value


def test_exact_match_can_mind_case_and_punctuation():
    assert score(ExactMatch(ignore_case=False), "paris", reference="Paris").value == 0.0
    assert score(ExactMatch(ignore_punctuation=False), "Paris.", reference="Paris").value == 0.0


@pytest.mark.parametrize(
    ("num_tokens", "value"),
    [(1, 0.0), (10, 0.0), (11, -0.1), (15, -0.5), (20, -1.0), (500, -1.0)],  # target 10, limit 20: 0.1 a token
)
def test_length_falls_linearly_from_target_to_limit(num_tokens, value):
    answer = score(Length(target_tokens=10, limit_tokens=20), "text", num_tokens=num_tokens)
    assert answer.value == pytest.approx(value)


@pytest.mark.parametrize(
    ("num_tokens", "value"),
    [(0, -1.0), (1, -0.75), (3, -0.25), (4, 0.0), (10, 0.0), (15, -0.5)],  # minimum 4: a quarter a token
)
def test_a_length_below_the_minimum_costs_as_one_above_the_target_does(num_tokens, value):
    text = "text" if num_tokens else ""
    answer = score(Length(min_tokens=4, target_tokens=10, limit_tokens=20), text, num_tokens=num_tokens)
    assert answer.value == pytest.approx(value)
    assert answer.reason == f"{num_tokens} tokens, at least 4, target 10"


def test_a_minimum_above_the_target_is_refused():
    with pytest.raises(ValidationError, match=r"min_tokens \(11\) must not be above target_tokens \(10\)"):
        Length(min_tokens=11, target_tokens=10, limit_tokens=20)


def test_length_unknown_is_missing_not_zero():
    reward = Length(target_tokens=10, limit_tokens=20)
    assert score(reward, "text").value is None
    assert score(reward, "").value == 0.0


@pytest.mark.parametrize(
    ("completion", "reference", "value"),
    [
        ("unknown", "Anna", -1.0),
        ("It is not stated.", "attic", -1.0),
        ("unknown", "unknown", 0.0),
        ("not stated", "not stated", 0.0),
        ("Ben", "Anna", 0.0),  # wrong, but not an abstention: another reward's business
        ("Ben", "unknown", 0.0),
        ("", "Anna", 0.0),
    ],
)
def test_abstaining_costs_1_exactly_where_there_is_an_answer(completion: str, reference: str, value: float) -> None:
    assert score(AbstentionPenalty(), completion, reference=reference).value == value


def test_without_a_reference_the_abstention_penalty_is_missing_not_0() -> None:
    assert score(AbstentionPenalty(), "unknown").value is None


LETTERED = ["a cat", "The dog", "3", "Can't be determined"]


@pytest.mark.parametrize(
    ("completion", "given"),
    [
        ("B", "B"),
        (" (B) ", "B"),
        ("**B**", "B"),
        ("B.", "B"),
        ("B) The dog", "B"),
        ("B. The dog", "B"),
        ("The dog", "B"),
        ("The answer is B.", "B"),
        ("The answer is (B).", "B"),
        ("Answer: **B**", "B"),
        (r"\boxed{B}", "B"),
        (r"So it is $\boxed{\text{B}}$.", "B"),
        ("I choose option B", "B"),
        ("A", "A"),
        ("A cat", "A"),
        ("3", "C"),
        ("The answer is D", "D"),
        ("It cannot be determined.", "D"),
        ("Answer: A dog, I think", "B"),  # an article, and no choice A
        ("The answer is A, or B: (B)", None),
        ("B) a cat", None),  # letter and text disagree
        ("(E)", None),
        ("b", None),
        ("Because.", None),
    ],
)
def test_a_letter_stands_for_its_choice_where_the_recipe_says_so(completion, given):
    for letter, text in zip("ABCD", LETTERED, strict=True):
        value = float(letter == given)
        assert score(Choice(letters=True), completion, reference=letter, choices=LETTERED).value == value
        assert score(Choice(letters=True), completion, reference=text, choices=LETTERED).value == value


def test_without_letters_a_letter_is_no_choice():
    assert score(Choice(), "B", reference="The dog", choices=LETTERED).value == 0.0
    assert score(Choice(), "B", reference="B", choices=LETTERED).value is None
    assert score(Choice(letters=True), "B", reference="E", choices=LETTERED).value is None


@pytest.mark.parametrize("reward", [Choice(), ExactMatch(), Grounding()], ids=["choice", "exact_match", "grounding"])
def test_thoughts_are_not_the_answer(reward):
    def value(text: str) -> float | None:
        return score(reward, text, reference="Anna", choices=PEOPLE).value

    assert value("<think>Ben? Maybe. It is unknown.</think>\nAnna") == 1.0
    assert value("It was Ben.</think>Anna") == 1.0
    assert value("<think>Anna</think>Ben") == 0.0
    assert value("<think>Anna") == 0.0


@pytest.mark.parametrize("reward", [Choice, ExactMatch, Grounding])
def test_only_the_answer_tag_is_read_where_one_is_asked_for(reward):
    tagged = reward(answer_tag="answer")
    assert score(tagged, "Ben? No. <answer> Anna </answer>", reference="Anna", choices=PEOPLE).value == 1.0
    untagged = score(tagged, "Anna", reference="Anna", choices=PEOPLE)
    assert (untagged.value, untagged.reason) == (0.0, "no <answer>...</answer>")
    assert score(tagged, "Anna", choices=PEOPLE).value is None


def test_exact_match_compares_punctuation_where_there_is_nothing_else():
    assert score(ExactMatch(), "!", reference="?").value == 0.0
    assert score(ExactMatch(), "?", reference="?").value == 1.0
    assert score(ExactMatch(), "", reference="?").value == 0.0
    assert score(ExactMatch(), "", reference=" ").value is None


def test_exact_match_accepts_aliases():
    assert score(ExactMatch(), "The USA.", reference="United States", aliases=["the USA"]).value == 1.0
    assert score(ExactMatch(), "USSR", reference="United States", aliases=["the USA"]).value == 0.0
