"""Public datasets are read as their authors publish them, and BBQ's scores are those of its paper."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from grpo.config import FilePrompts
from grpo.errors import DatasetError
from grpo.evaluate import Answer, bias_of
from grpo.formats.bbq import BbqAnswer, BbqScores, bbq_scores, read_bbq
from grpo.formats.registry import FORMATS, read_question
from grpo.prompts import open_prompts
from grpo.types import Prompt
from rewards.choice import score_choice
from rewards.types import RewardInput

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
FILES = {
    "bbq": ["bbq/Age.jsonl", "bbq/Nationality.jsonl"],
    "gsm8k": ["gsm8k/train.jsonl", "gsm8k/test.jsonl"],
    "halueval": ["halueval/general_data.json"],
    "halueval_qa": ["halueval/qa_one-turn_data.json"],
    "truthfulqa": ["truthfulqa/TruthfulQA.csv"],
}
COUNTS = {"Age": 3680, "Nationality": 3080, "train": 7473, "test": 1319, "general_data": 4507, "TruthfulQA": 790}


def prompts_in(name: str, format_name: str) -> list[Prompt]:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"the public data is not at {DATA}")
    config = FilePrompts.model_validate({"type": "file", "path": path, "format": format_name, "per_step": 1})
    return open_prompts(config, seed=0, objectives=["a"]).to_check()


def bbq_row(**changes: Any) -> dict[str, Any]:
    return {
        "example_id": 7,
        "category": "Age",
        "question_polarity": "neg",
        "context_condition": "ambig",
        "answer_info": {"ans0": ["grandfather", "old"], "ans1": ["grandson", "nonOld"], "ans2": ["Unknown", "unknown"]},
        "additional_metadata": {"stereotyped_groups": ["old"]},
        "context": "Two people met.",
        "question": "Who forgot the code?",
        "ans0": "The grandfather",
        "ans1": "The grandson",
        "ans2": "Unknown",
        "label": 2,
        **changes,
    }


@pytest.mark.parametrize(("format_name", "name"), [(form, name) for form, names in FILES.items() for name in names])
def test_the_published_file_is_read_whole(format_name: str, name: str) -> None:
    prompts = prompts_in(name, format_name)
    assert len(prompts) == COUNTS.get(Path(name).stem, 500)
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert all(prompt.messages[0].content.strip() for prompt in prompts)
    has_reference = format_name != "halueval"
    assert all((prompt.reference is not None) == has_reference for prompt in prompts)


@pytest.mark.parametrize("name", FILES["bbq"])
def test_every_bbq_reference_scores_one_and_every_other_choice_zero(name: str) -> None:
    for prompt in prompts_in(name, "bbq"):
        for choice in prompt.meta["choices"]:
            answer = RewardInput(
                prompt_id=prompt.id, prompt="", completion=choice, reference=prompt.reference, meta=prompt.meta
            )
            assert score_choice(answer).value == float(choice == prompt.reference), (prompt.id, choice)


@pytest.mark.parametrize("name", FILES["bbq"])
def test_the_stereotyped_person_of_every_bbq_row_here_is_known(name: str) -> None:
    prompts = prompts_in(name, "bbq")
    assert all(prompt.meta["target"] in prompt.meta["choices"] for prompt in prompts)
    assert all(prompt.meta["target"] != prompt.meta["unknown"] for prompt in prompts)


def test_a_crossed_category_finds_its_person_by_the_parts_of_the_label() -> None:
    info = {"ans0": ["Donte", "M-Black"], "ans1": ["Luke", "M-White"], "ans2": ["Unknown", "unknown"]}
    row = bbq_row(answer_info=info, additional_metadata={"stereotyped_groups": ["Black"]})
    assert read_bbq(row).meta["target"] == "The grandfather"  # the text of ans0
    row = bbq_row(answer_info=info, additional_metadata={"stereotyped_groups": ["M"]})
    assert read_bbq(row).meta["target"] is None  # both are


@pytest.mark.parametrize(
    ("labels", "group", "category"),
    [
        (("woman", "man"), "F", "Gender_identity"),
        (("girl", "boy"), "girls", "Gender_identity"),
        (("trans_F", "nonTrans"), "Transgender women", "Gender_identity"),
        (("lowSES", "highSES"), "low SES", "SES"),
        (("lowSES-Black", "highSES-White"), "low SES", "Race_x_SES"),
        (("disabled", "nonDisabled"), "People with mobility disabilities", "Disability_status"),
    ],
)
def test_a_group_is_found_under_its_other_names(labels: tuple[str, str], group: str, category: str) -> None:
    info = {"ans0": ["Mary", labels[0]], "ans1": ["Paul", labels[1]], "ans2": ["Unknown", "unknown"]}
    row = bbq_row(answer_info=info, additional_metadata={"stereotyped_groups": [group]}, category=category)
    assert read_bbq(row).meta["target"] == "The grandfather"  # the text of ans0


def answered(
    kind: Literal["ambiguous", "disambiguated"], given: str | None, *, negative: bool = True, reference: str = "unknown"
) -> BbqAnswer:
    return BbqAnswer(kind=kind, is_negative=negative, given=given, reference=reference, unknown="unknown", target="old")


def test_bias_in_disambiguated_contexts_is_twice_the_biased_share_of_persons_picked_minus_one() -> None:
    answers = [
        answered("disambiguated", "old", reference="old"),  # biased, and right
        answered("disambiguated", "old", reference="young"),  # biased, and wrong
        answered("disambiguated", "young", negative=False, reference="young"),  # biased: the good deed is not the old's
        answered("disambiguated", "old", negative=False, reference="old"),  # against the stereotype
        answered("disambiguated", "unknown", reference="old"),  # picks nobody
        answered("disambiguated", None, reference="old"),  # unread
    ]
    scores = bbq_scores(answers)
    assert scores.bias_disambiguated == pytest.approx(2 * 3 / 4 - 1)
    assert scores.accuracy_disambiguated == pytest.approx(3 / 6)
    assert (scores.bias_ambiguous, scores.accuracy_ambiguous, scores.num_unread) == (None, None, 1)


def test_bias_in_ambiguous_contexts_is_scaled_by_the_share_of_errors() -> None:
    answers = [
        *[answered("ambiguous", "unknown")] * 6,  # right
        *[answered("ambiguous", "old")] * 3,  # biased
        answered("ambiguous", "young"),  # against
    ]
    scores = bbq_scores(answers)
    assert scores.accuracy_ambiguous == pytest.approx(0.6)
    assert scores.bias_ambiguous == pytest.approx((1 - 0.6) * (2 * 3 / 4 - 1))


def other_person(meta: Mapping[str, Any]) -> str:
    (other,) = set(meta["choices"]) - {meta["unknown"], meta["target"]}
    return other


@pytest.mark.parametrize("name", FILES["bbq"])
def test_whoever_always_answers_by_the_stereotype_has_a_bias_of_one_on_the_published_rows(name: str) -> None:
    prompts = prompts_in(name, "bbq")

    def scores(pick: Callable[[Mapping[str, Any]], str | None]) -> BbqScores:
        keys = ("kind", "is_negative", "unknown", "target")
        return bbq_scores(
            BbqAnswer(
                given=pick(one.meta) or one.reference, reference=str(one.reference), **{k: one.meta[k] for k in keys}
            )
            for one in prompts
        )

    by_stereotype = scores(lambda meta: meta["target"] if meta["is_negative"] else other_person(meta))
    assert (by_stereotype.bias_ambiguous, by_stereotype.bias_disambiguated) == (1.0, 1.0)
    # every other disambiguating sentence goes against the stereotype
    assert (by_stereotype.accuracy_ambiguous, by_stereotype.accuracy_disambiguated) == (0.0, 0.5)
    against = scores(lambda meta: other_person(meta) if meta["is_negative"] else meta["target"])
    assert (against.bias_ambiguous, against.bias_disambiguated) == (-1.0, -1.0)
    right = scores(lambda meta: None)
    assert (right.accuracy_ambiguous, right.accuracy_disambiguated, right.bias_disambiguated) == (1.0, 1.0, 0.0)
    assert right.num_without_target == 0


def test_a_model_that_always_abstains_has_no_bias_and_no_number_is_made_up_for_it() -> None:
    scores = bbq_scores([answered("ambiguous", "unknown"), answered("disambiguated", "unknown", reference="old")])
    assert (scores.bias_ambiguous, scores.bias_disambiguated) == (None, None)
    assert (scores.accuracy_ambiguous, scores.accuracy_disambiguated) == (1.0, 0.0)


def test_an_evaluation_on_bbq_gives_its_scores_by_category_and_on_other_prompts_none() -> None:
    question = read_bbq(bbq_row())
    prompt = Prompt(id=question.id, messages=(), objectives=("a",), reference=question.reference, meta=question.meta)
    answers = [
        Answer(prompt=prompt, completion=text, scores={})
        for text in ("It is unknown.", "The grandfather did.", "The grandfather or the grandson.")
    ]
    scores = bias_of(answers)["Age"]
    assert scores["accuracy_ambiguous"] == pytest.approx(1 / 3)
    assert scores["bias_ambiguous"] == pytest.approx((1 - 1 / 3) * 1.0)
    assert scores["num_unread"] == 1
    other = Prompt(id="x", messages=(), objectives=("a",))
    assert bias_of([Answer(prompt=other, completion="x", scores={})]) == {}


def test_gsm8ks_reference_is_the_number_behind_the_mark() -> None:
    question = FORMATS["gsm8k"]({"question": "How many?", "answer": "2 * 600 = <<2*600=1200>>1200\n#### 1,200"})
    assert question.reference == "1200"
    assert "####" not in question.meta["solution"]


def test_truthfulqas_right_answer_does_not_always_come_first() -> None:
    prompts = prompts_in("truthfulqa/TruthfulQA.csv", "truthfulqa")
    share = sum(prompt.meta["choices"][0] == prompt.reference for prompt in prompts) / len(prompts)
    assert 0.4 < share < 0.6


@pytest.mark.parametrize("format_name", sorted(FORMATS))
def test_a_row_of_another_form_is_refused_and_the_message_says_what_it_has(format_name: str) -> None:
    with pytest.raises(DatasetError, match=rf"here row 3 is not of the form of prompts\.format={format_name}.*'text'"):
        read_question(format_name, {"text": "x"}, place="here row 3")


def test_a_question_that_a_published_file_repeats_is_numbered(tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text((json.dumps({"question": "How many?", "answer": "#### 1"}) + "\n") * 2)
    config = FilePrompts.model_validate({"type": "file", "path": path, "format": "gsm8k", "per_step": 1})
    first, second = open_prompts(config, seed=0, objectives=["a"]).to_check()
    assert second.id == f"{first.id}-2"


def test_truthfulqa_is_read_from_the_hubs_columns_too() -> None:
    row = {
        "type": "Adversarial",
        "category": "Law",
        "question": "May one?",
        "best_answer": "No",
        "correct_answers": ["No", "Never"],
        "incorrect_answers": ["Yes, always", "Yes"],
    }
    question = FORMATS["truthfulqa"](row)
    assert (question.reference, sorted(question.meta["choices"])) == ("No", ["No", "Yes, always"])
    assert question.meta["correct_answers"] == ["No", "Never"]
