"""Alarms: figures that have ruined runs are told, with the command that says more, and healthy runs hear nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from grpo.alarms import Alarm, Alarms, learning_rate_alarms, still_metric, unmoved, with_fixed_beta
from grpo.config import FullTrainable, LoraTrainable, ObjectiveConfig, OptimConfig
from grpo.diagnostics.checks import accumulation, agreement, gradient, learning, numbers, penalty, scope, signal

HEALTHY: dict[str, float] = {
    "grad_norm": 0.3,
    "kl/fair": 0.02,
    "kl/true": 0.01,
    "groups/zero_variance_frac": 0.25,
    "groups/fair/zero_variance_frac": 0.5,
    "groups/true/zero_variance_frac": 0.0,
    "sampler/ratio_p99": 1.248,  # the largest of 11 healthy steps in bfloat16, as the next
    "sampler/ratio_max": 1.537,
    "completion/fair/length_mean": 12.0,
    "completion/true/length_mean": 9.0,
    "completion/fair/truncated_frac": 0.1,
    "completion/true/truncated_frac": 0.0,
    "reward/fair/unscored_frac": 0.0,
    "reward/true/unscored_frac": 0.05,
}


def heard(
    alarms: Alarms, count: int, changes: Mapping[str, float | None] | None = None, *, first: int = 1
) -> list[tuple[int, str]]:
    """(step, name) of every alarm over so many rows."""
    rows = ({"step": step, **HEALTHY, **(changes or {})} for step in range(first, first + count))
    return [(int(row["step"] or 0), alarm.name) for row in rows for alarm in alarms.observe(row)]


ALARMING: list[tuple[dict[str, float], tuple[int, str]]] = [
    ({"grad_norm": 0.0}, (3, "no gradient")),
    ({"kl/fair": 0.0, "kl/true": 0.0}, (5, "no KL")),
    ({"groups/zero_variance_frac": 1.0}, (5, "no signal")),
    ({"groups/zero_variance_frac": 0.5, "groups/true/zero_variance_frac": 1.0}, (10, "no signal of true")),
    ({"sampler/ratio_p99": 2.5, "sampler/ratio_max": 300.0}, (1, "sampler ratio")),
    ({"sampler/ratio_max": 300.0}, (3, "sampler tail")),
    ({"kl/fair": 0.318}, (3, "KL of fair not held")),
    ({"completion/true/length_mean": 1.0}, (3, "one-token completions of true")),
    ({"completion/fair/truncated_frac": 0.95}, (5, "truncated completions of fair")),
    ({"reward/fair/unscored_frac": 0.3}, (3, "unscored completions of fair")),
]
"""Changes to a healthy row -> the step and name of the alarm that comes of them."""


def test_a_healthy_run_hears_nothing() -> None:
    assert heard(Alarms(["fair", "true"], fixed_betas=["fair", "true"]), 100) == []


def test_a_high_kl_is_told_of_a_fixed_beta_alone() -> None:
    betas = {
        "fixed": {"type": "fixed", "value": 0.02},
        "off": {"type": "fixed", "value": 0.0},
        "band": {"type": "band", "low": 0.02, "high": 0.06},
    }
    reward = {"name": "length", "params": {"target_tokens": 4}}
    made = {name: ObjectiveConfig.model_validate({"rewards": [reward], "beta": beta}) for name, beta in betas.items()}
    assert with_fixed_beta(made) == ["fixed"]
    assert heard(Alarms(["fair", "true"], fixed_betas=["true"]), 40, {"kl/fair": 0.9}) == []


@pytest.mark.parametrize(("changes", "expected"), ALARMING)
def test_each_condition_is_told_once_after_so_many_steps_in_a_row(
    changes: dict[str, float], expected: tuple[int, str]
) -> None:
    assert heard(Alarms(["fair", "true"], fixed_betas=["fair", "true"]), 40, changes) == [expected]


def test_one_objective_that_moves_is_no_flat_kl() -> None:
    assert heard(Alarms(["fair", "true"]), 40, {"kl/fair": 0.0}) == []


def test_objectives_that_are_all_without_signal_are_told_as_one() -> None:
    every = {f"groups/{name}zero_variance_frac": 1.0 for name in ("", "fair/", "true/")}
    assert heard(Alarms(["fair", "true"]), 40, every) == [(5, "no signal")]


def test_a_single_token_that_is_far_off_now_and_then_is_no_alarm() -> None:
    alarms = Alarms(["fair", "true"])
    for first in range(1, 40, 3):
        assert heard(alarms, 2, {"sampler/ratio_max": 300.0}, first=first) == []
        assert heard(alarms, 1, first=first + 2) == []


def test_a_step_between_begins_the_count_again_and_the_alarm_can_come_again() -> None:
    alarms = Alarms(["fair", "true"])
    assert heard(alarms, 2, {"grad_norm": 0.0}) == []
    assert heard(alarms, 1, first=3) == []
    assert heard(alarms, 4, {"grad_norm": 0.0}, first=4) == [(6, "no gradient")]
    assert heard(alarms, 1, first=8) == []
    assert heard(alarms, 3, {"grad_norm": 0.0}, first=9) == [(11, "no gradient")]


def test_a_skipped_step_neither_counts_nor_begins_again() -> None:
    alarms = Alarms(["fair", "true"])
    assert heard(alarms, 2, {"grad_norm": 0.0}) == []
    assert heard(alarms, 3, {"grad_norm": None, "update/skipped": 1}, first=3) == []
    assert heard(alarms, 1, {"grad_norm": 0.0}, first=6) == [(6, "no gradient")]


def test_a_step_without_prompts_of_an_objective_says_nothing_of_it() -> None:
    alarms = Alarms(["fair", "true"])
    assert heard(alarms, 2, {"reward/fair/unscored_frac": 0.9}) == []
    assert heard(alarms, 3, {"reward/fair/unscored_frac": None}, first=3) == []
    assert heard(alarms, 1, {"reward/fair/unscored_frac": 0.9}, first=6) == [(6, "unscored completions of fair")]


def evaluated(alarms: Alarms, every: int, steps: int, **figures: int) -> list[tuple[int, str]]:
    """(step, name) of every alarm where each evaluation says the same. Args: figures: with "__" for "/"."""
    shown = {name.replace("__", "/"): value for name, value in figures.items()}
    rows = ({"step": step, **HEALTHY, **({} if step % every else shown)} for step in range(1, steps + 1))
    return [(int(row["step"] or 0), alarm.name) for row in rows for alarm in alarms.observe(row)]


@pytest.mark.parametrize(
    ("every", "step"),
    [
        (1, 10),  # compared in every step: ten steps, since one alone may leave every greedy answer as it was
        (4, 12),
        (20, 40),  # with the evaluation before training the third that is alike
    ],
)
def test_evaluations_whose_answers_or_scores_stay_are_told_at_the_third_but_not_within_ten_steps(
    every: int, step: int
) -> None:
    still = {"eval__fair__answers_changed": 0, "eval__fair__scores_changed": 0, "eval__true__answers_changed": 0}
    assert evaluated(Alarms(["fair", "true"], eval_every=every), every, 90, **still) == [(step, "evaluation unmoved")]
    blind = {"eval__fair__answers_changed": 8, "eval__fair__scores_changed": 0, "eval__true__answers_changed": 0}
    told = [(step, "evaluation of fair unmoved")]
    assert evaluated(Alarms(["fair", "true"], eval_every=every), every, 90, **blind) == told


def test_evaluations_that_move_or_in_which_little_changed_are_not_told() -> None:
    moving = {"eval__fair__answers_changed": 20, "eval__fair__scores_changed": 1}
    assert evaluated(Alarms(["fair"], eval_every=5), 5, 90, **moving) == []
    few = {"eval__fair__answers_changed": 7, "eval__fair__scores_changed": 0}  # seven may be equal by chance
    assert evaluated(Alarms(["fair"], eval_every=5), 5, 90, **few) == []
    a_noisy_judge = {"eval__fair__answers_changed": 0, "eval__fair__scores_changed": 5}
    assert evaluated(Alarms(["fair"], eval_every=5), 5, 90, **a_noisy_judge) == [(10, "evaluation unmoved")]


def test_an_evaluation_that_moved_begins_the_count_again() -> None:
    alarms = Alarms(["fair"], eval_every=10)
    still = {"eval/fair/answers_changed": 0}
    assert heard(alarms, 1, still) == []
    assert heard(alarms, 1, {"eval/fair/answers_changed": 3}, first=2) == []
    assert heard(alarms, 1, still, first=3) == []
    assert heard(alarms, 9, first=4) == []  # rows without an evaluation say nothing
    assert heard(alarms, 1, still, first=13) == [(13, "evaluation unmoved")]


def test_an_alarm_says_what_was_seen_for_how_long_and_what_to_run() -> None:
    alarms = Alarms(["fair"])
    rows: list[dict[str, Any]] = [{"step": step, **HEALTHY, "kl/fair": 0.0} for step in range(1, 6)]
    (alarm,) = [alarm for row in rows for alarm in alarms.observe(row)]
    assert alarm.text.startswith("no KL, step 5: the KL of every objective has been 0.000 for 5 steps")
    assert alarm.text.endswith(". Check: grpo verify RECIPE (accumulation, it learns)")


def every_alarm() -> Iterator[Alarm]:
    """One of each kind."""
    for changes, (steps, _) in ALARMING:
        alarms = Alarms(["fair", "true"])
        yield from (
            alarm for step in range(1, steps + 1) for alarm in alarms.observe({"step": step, **HEALTHY, **changes})
        )
    alarms = Alarms(["fair", "true"], eval_every=5)
    for changed in (0, 0, 8, 8):
        row = {"step": 5, "eval/fair/answers_changed": changed, "eval/fair/scores_changed": 0}
        yield from alarms.observe(row)
    yield from learning_rate_alarms(LoraTrainable(), OptimConfig(learning_rate=1.0))
    before = [entry(number, "Anna") for number in range(8)]
    yield from unmoved({"answers": {"before": before, "after": before}})
    yield from unmoved({"answers": {"before": before, "after": [entry(number, "Omar") for number in range(8)]}})


def test_every_alarm_says_which_rows_of_which_check_to_look_at() -> None:
    verify = (accumulation, agreement, gradient, learning, numbers, penalty, scope, signal)
    rows = {"verify": {check.CHECK for check in verify}, "doctor": {"end tokens", "judges"}}
    for alarm in every_alarm():
        _, _, checks = alarm.text.partition(". Check: ")
        named = re.findall(r"grpo (verify|doctor) RECIPE \((.+?)\)", checks)
        assert ", ".join(f"grpo {command} RECIPE ({listed})" for command, listed in named) == checks != "", alarm
        assert all(set(listed.split(", ")) <= rows[command] for command, listed in named), alarm


@pytest.mark.parametrize(
    ("rate", "is_full", "told"),
    [
        (1e-6, False, "low for LoRA, and usual for full training"),
        (2e-4, False, None),
        (2e-2, False, "high for LoRA:"),
        (1e-6, True, None),
        (2e-4, True, "high for full training, and usual for LoRA"),
        (1e-9, True, "low for full training:"),
    ],
)
def test_a_learning_rate_for_the_other_kind_of_training_is_told(rate: float, is_full: bool, told: str | None) -> None:
    trainable = FullTrainable(type="full") if is_full else LoraTrainable()
    alarms = learning_rate_alarms(trainable, OptimConfig(learning_rate=rate))
    assert len(alarms) == (told is not None)
    assert all((told or "") in alarm.text for alarm in alarms)


def entry(number: int, completion: str, **scores: float) -> dict[str, Any]:
    return {"id": f"p{number}", "completion": completion, "scores": scores or {"fair": 0.0}}


def test_an_evaluation_whose_every_answer_stayed_is_told_and_one_changed_word_is_enough() -> None:
    before = [entry(number, "Anna") for number in range(8)]
    (alarm,) = unmoved({"answers": {"before": before, "after": before}})
    assert "all 8 held-out answers" in alarm.text
    assert unmoved({"answers": {"before": before, "after": [*before[:7], entry(7, "Omar")]}}) == []
    assert unmoved({"answers": {"before": before}}) == []


def test_scores_that_stay_though_the_answers_change_are_told_by_objective() -> None:
    before = [entry(number, "Anna", seg=0.25, fair=number / 8) for number in range(8)]
    after = [entry(number, "Omar", seg=0.25, fair=0.5) for number in range(8)]
    (alarm,) = unmoved({"answers": {"before": before, "after": after}})
    assert alarm.name == "evaluation of seg unmoved"
    assert "all 8 held-out scores" in alarm.text
    assert "(mean 0.250), though 8 answers are others" in alarm.text
    assert unmoved({"answers": {"before": before[:7], "after": after[:7]}}) == []  # seven may be chance


def test_a_metric_of_ones_own_loop_is_told_once_it_stood_still_to_the_last_digit() -> None:
    assert still_metric("dice", [0.3, 0.41, 0.41]) == []
    (alarm,) = still_metric("dice", [0.3, 0.41, 0.41, 0.41])
    assert alarm.text.startswith("dice unmoved: 0.4100 in 3 evaluations in a row")
    assert still_metric("dice", [0.41, 0.41, 0.41, 0.42]) == []
    assert still_metric("dice", []) == []
    assert len(still_metric("dice", [0.5] * 2, patience=2)) == 1
    with pytest.raises(ValueError, match="patience is 1"):
        still_metric("dice", [0.5], patience=1)
