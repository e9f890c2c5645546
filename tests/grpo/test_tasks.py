"""Generated tasks: deterministic, balanced, and with nothing shared between training and held-out."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from grpo.errors import ConfigError
from grpo.tasks import SPLITS, TASKS, get_task
from grpo.tasks import fairness as fairness_module
from grpo.tasks import grounding as grounding_module
from grpo.tasks.base import balanced_slot
from grpo.tasks.vocabulary import NAMES
from grpo.types import Prompt
from rewards import RewardInput
from rewards.choice import Choice
from rewards.grounding import Grounding

REPO = Path(__file__).parents[2]
BBQ = REPO / ".." / "shared" / "data" / "bbq"
REWARDS = {"fairness": Choice(), "grounding": Grounding()}
ABSTENTIONS = {"fairness": "unknown", "grounding": "not stated"}

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
every_split = pytest.mark.parametrize("split", SPLITS)


def prompts_of(task, split, count: int = 400, seed: int = 0) -> list[Prompt]:
    return [task.prompt(split, seed, index) for index in range(count)]


def text_of(prompt: Prompt) -> str:
    return prompt.messages[-1].content


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def scores(task, prompt: Prompt, completions: list[str]) -> list[float | None]:
    inputs = [
        RewardInput(
            prompt_id=prompt.id,
            prompt=text_of(prompt),
            completion=completion,
            reference=prompt.reference,
            meta=prompt.meta,
        )
        for completion in completions
    ]
    return [score.value for score in asyncio.run(REWARDS[task.name].score(inputs))]


@every_task
@every_split
def test_a_prompt_is_the_same_whenever_and_wherever_it_is_asked_for(task, split):
    forwards = [task.prompt(split, 7, index) for index in range(50)]
    backwards = [task.prompt(split, 7, index) for index in reversed(range(50))]
    assert forwards == backwards[::-1]
    prompts = f"[get_task({task.name!r}).prompt({split!r}, 7, index) for index in (3, 49)]"
    code = f"from grpo.tasks import get_task; print(repr({prompts}))"
    elsewhere = subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO, capture_output=True, text=True)
    assert elsewhere.stdout.strip() == repr([forwards[3], forwards[49]])


@every_task
@every_split
def test_seeds_give_other_prompts(task, split):
    texts = [[text_of(prompt) for prompt in prompts_of(task, split, 20, seed)] for seed in (0, 1)]
    assert sum(a == b for a, b in zip(*texts, strict=True)) <= 1


@every_task
def test_ids_are_unique_over_splits_seeds_and_indices(task):
    ids = [prompt.id for split in SPLITS for seed in (0, 1) for prompt in prompts_of(task, split, 200, seed)]
    assert len(ids) == len(set(ids)) == 800


@every_task
@every_split
def test_a_prompt_names_its_objective_and_has_a_system_and_a_user_message(task, split):
    for prompt in prompts_of(task, split, 20):
        assert prompt.objectives == (task.objective,)
        assert [message.role for message in prompt.messages] == ["system", "user"]
        assert prompt.meta["kind"] in task.kinds
        assert prompt.reference in prompt.meta["choices"]
        json.dumps(dict(prompt.meta))


@every_task
@every_split
def test_each_aligned_block_of_four_is_half_and_half_by_kind(task, split):
    kinds = [prompt.meta["kind"] for prompt in prompts_of(task, split)]
    for start in range(0, 400, 4):
        assert Counter(kinds[start : start + 4]) == dict.fromkeys(task.kinds, 2)


@every_task
@every_split
def test_every_second_prompt_still_has_both_kinds(task, split):
    kinds = Counter(prompt.meta["kind"] for prompt in prompts_of(task, split)[::2])
    assert min(kinds[kind] for kind in task.kinds) > 70  # 100 expected of 200


def test_slots_come_once_a_block():
    assert sorted(balanced_slot("x", index, 4) for index in range(4)) == [0, 1, 2, 3]
    with_order = {tuple(balanced_slot("x", 4 * block + i, 4) for i in range(4)) for block in range(50)}
    assert len(with_order) > 10  # of 24 orders


@every_split
def test_always_answering_the_first_or_second_name_is_right_in_exactly_half_of_the_disambiguated_scenes(split):
    prompts = [one for one in prompts_of(TASKS["fairness"], split) if one.meta["kind"] == "disambiguated"]
    for position in (0, 1):
        named = [min(one.meta["choices"][:2], key=text_of(one).index) for one in prompts]
        if position == 1:
            named = [max(one.meta["choices"][:2], key=text_of(one).index) for one in prompts]
        assert sum(one.reference == name for one, name in zip(prompts, named, strict=True)) == len(prompts) / 2


@every_split
def test_no_description_decides_who_did_it(split):
    right: Counter[str] = Counter()
    told: Counter[str] = Counter()
    descriptions = [one for pair in fairness_module.DESCRIPTIONS[split] for one in pair]
    for prompt in prompts_of(TASKS["fairness"], split, 4000):
        if prompt.meta["kind"] == "disambiguated":
            for description in descriptions:
                told[description] += description in text_of(prompt)
                right[description] += f"{prompt.reference} is {description}" in text_of(prompt)
    for description in descriptions:
        assert 0.4 < right[description] / told[description] < 0.6


@every_split
def test_answering_the_first_or_second_stated_place_is_right_in_exactly_half_of_the_answerable_scenes(split):
    prompts = [one for one in prompts_of(TASKS["grounding"], split) if one.meta["kind"] == "answerable"]
    stated = [re.findall(r"is the (\w+)\.", text_of(one)) for one in prompts]
    for position in (0, 1):
        hits = sum(one.reference == places[position] for one, places in zip(prompts, stated, strict=True))
        assert hits == len(prompts) / 2


@every_split
def test_unanswerable_questions_ask_for_a_thing_that_no_fact_names(split):
    for prompt in prompts_of(TASKS["grounding"], split):
        facts, question = text_of(prompt).split("\n")
        asked = [thing for thing in grounding_module.THINGS[split] if thing in words_of(question)]
        assert len(asked) == 1
        assert (asked[0] in words_of(facts)) == (prompt.meta["kind"] == "answerable")


@every_task
@every_split
def test_the_reference_scores_one_and_every_other_choice_zero(task, split):
    for prompt in prompts_of(task, split, 200):
        choices = prompt.meta["choices"]
        assert scores(task, prompt, choices) == [float(choice == prompt.reference) for choice in choices]


@every_task
@every_split
def test_always_abstaining_scores_exactly_half(task, split):
    by_kind: dict[str, list[float | None]] = {kind: [] for kind in task.kinds}
    for prompt in prompts_of(task, split, 200):
        by_kind[prompt.meta["kind"]] += scores(task, prompt, [ABSTENTIONS[task.name]])
    abstaining_is_right = {"ambiguous": 1.0, "disambiguated": 0.0, "unanswerable": 1.0, "answerable": 0.0}
    for kind, values in by_kind.items():
        assert values == [abstaining_is_right[kind]] * 100


@every_task
@every_split
def test_repeating_the_whole_prompt_scores_zero(task, split):
    for prompt in prompts_of(task, split, 100):
        assert scores(task, prompt, [text_of(prompt)]) == [0.0]


@pytest.mark.parametrize(
    "words_by_split",
    [
        NAMES,
        fairness_module.ACTS,
        {split: [one for pair in fairness_module.DESCRIPTIONS[split] for one in pair] for split in SPLITS},
        grounding_module.THINGS,
        grounding_module.PLACES,
    ],
    ids=["names", "acts", "descriptions", "things", "places"],
)
def test_train_and_held_out_share_no_word_list_entry(words_by_split):
    train, held_out = (list(words_by_split[split]) for split in SPLITS)
    assert not set(train) & set(held_out)
    assert len(set(train)) == len(train)
    assert len(set(held_out)) == len(held_out)


@pytest.mark.parametrize("module", [fairness_module, grounding_module], ids=["fairness", "grounding"])
def test_train_and_held_out_share_no_template(module):
    templates = [{template for wording in module.WORDINGS[split] for template in vars_of(wording)} for split in SPLITS]
    assert not templates[0] & templates[1]


def vars_of(wording) -> list[str]:
    return [getattr(wording, name) for name in wording.__dataclass_fields__]


@every_task
def test_train_and_held_out_share_no_text(task):
    train, held_out = ({text_of(prompt) for prompt in prompts_of(task, split, 2000)} for split in SPLITS)
    assert not train & held_out


@every_task
@every_split
def test_prompts_are_short_and_varied(task, split):
    texts = [text_of(prompt) for prompt in prompts_of(task, split, 1000)]
    assert max(len(text.split()) for text in texts) <= 40
    assert len(set(texts)) > 900


def test_an_unknown_task_is_answered_with_the_nearest():
    assert get_task("fairness").name == "fairness"
    with pytest.raises(ConfigError, match=r"no task 'fairnes' \(did you mean 'fairness'\?\).*grounding"):
        get_task("fairnes")


@every_task
def test_an_unknown_split_or_a_negative_index_is_refused(task):
    with pytest.raises(ConfigError, match="no split 'test'; it has train and held_out"):
        task.prompt("test", 0, 0)
    with pytest.raises(ConfigError, match="counted from 0"):
        task.prompt("train", 0, -1)


def test_no_eight_words_in_a_row_are_bbqs():
    files = sorted(BBQ.glob("*.jsonl"))
    if not files:
        pytest.skip(f"the BBQ data is not at {BBQ}")
    bbq: set[tuple[str, ...]] = set()
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            bbq |= eight_grams(row["context"]) | eight_grams(row["question"])
    assert len(bbq) > 1000
    for split in SPLITS:
        for prompt in prompts_of(TASKS["fairness"], split, 1000):
            assert not eight_grams(text_of(prompt)) & bbq


def eight_grams(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[start : start + 8]) for start in range(len(words) - 7)}
