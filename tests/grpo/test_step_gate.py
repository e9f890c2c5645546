"""A step with too few verdicts is never trained on: the run stops, waits for the judge, or lets the step pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_builders import Notebook, Runs, completions_of, make_objective, metrics_of, tensors_of

from grpo.errors import TooFewVerdicts

FLAKY = '''
"""A judge that is down for its first calls."""

calls = []


def letters(inputs, down_for=0):
    calls.append(len(inputs))
    if len(calls) <= down_for:
        raise ConnectionError("the judge is down")
    return [abs(len(one.completion) - 10) / -10 for one in inputs]
'''


@pytest.fixture
def flaky_runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    place = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    place.prepare()
    (place.folder / "run_broken.py").write_text(FLAKY)
    return place


ALL = {"min_valid_fraction": 1.0}


def down(down_for: int) -> dict[str, dict[str, object]]:
    reward = {"name": "run_broken:letters", "params": {"down_for": down_for}}
    short = {"rewards": [reward], "beta": {"type": "fixed", "value": 0.05}}
    return {"short": short, "long": make_objective()}


def test_by_default_a_step_without_verdicts_stops_the_run_and_is_saved(flaky_runs: Runs) -> None:
    with pytest.raises(TooFewVerdicts, match=r"step 1: objective short: 8 of 8 .* the judge is down"):
        flaky_runs.run("stops", steps=2, objectives=down(99))
    assert (flaky_runs.folder / "stops" / "checkpoints" / "step-0").is_dir()


def test_a_judge_that_comes_back_is_waited_for_and_the_run_is_as_if_it_had_never_been_down(flaky_runs: Runs) -> None:
    notes = Notebook()
    scoring = {**ALL, "below": "wait", "wait_s": 0.0, "wait_rounds": 5}
    waited = flaky_runs.run("waited", steps=2, objectives=down(3), scoring=scoring, observer=notes)
    assert sum("asking again" in note for note in notes.notes) == 2  # two groups failed, then one
    flaky_runs.forget_modules()
    always_up = flaky_runs.run("always_up", steps=2, objectives=down(0))
    assert [line["verdicts"] for line in completions_of(waited)] == [
        line["verdicts"] for line in completions_of(always_up)
    ]
    ours, theirs = tensors_of(waited), tensors_of(always_up)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_waiting_ends_and_the_run_stops(flaky_runs: Runs) -> None:
    scoring = {"below": "wait", "wait_s": 0.0, "wait_rounds": 2}
    with pytest.raises(TooFewVerdicts, match="step 1"):
        flaky_runs.run("gives_up", steps=2, objectives=down(99), scoring=scoring)


def test_a_skipped_step_changes_nothing_and_is_counted_and_said(flaky_runs: Runs) -> None:
    notes = Notebook()
    run_dir = flaky_runs.run("skipped", steps=1, objectives=down(1), scoring={**ALL, "below": "skip"}, observer=notes)
    (row,) = metrics_of(run_dir)
    assert (row["update/skipped"], row["grad_norm"], row["reward/short/unscored_frac"]) == (1, None, 0.5)
    assert "kl/short" not in row
    assert any("step 1 took no update: objective short" in warning for warning in notes.warnings)
    moved = {name for name, tensor in tensors_of(run_dir).items() if "lora_B" in name and tensor.abs().sum() > 0}
    assert moved == set()


def test_the_step_after_a_skipped_one_learns(flaky_runs: Runs) -> None:
    run_dir = flaky_runs.run("goes_on", steps=2, objectives=down(1), scoring={**ALL, "below": "skip"})
    assert [row["update/skipped"] for row in metrics_of(run_dir)] == [1, 0]


def test_steps_are_not_skipped_without_end(flaky_runs: Runs) -> None:
    scoring = {"below": "skip", "max_skipped": 2}
    with pytest.raises(TooFewVerdicts, match=r"step 3: .* The 2 steps before it took no update either"):
        flaky_runs.run("endless", steps=9, objectives=down(99), scoring=scoring)
    assert [row["update/skipped"] for row in metrics_of(flaky_runs.folder / "endless")] == [1, 1]


def test_an_objective_may_ask_for_more_verdicts_than_the_others(flaky_runs: Runs) -> None:
    objectives = down(1)
    objectives["short"]["min_valid_fraction"] = 0.4
    (row,) = metrics_of(flaky_runs.run("lenient", steps=1, objectives=objectives, scoring=ALL))
    assert (row["update/skipped"], row["reward/short/unscored_frac"]) == (0, 0.5)
    flaky_runs.forget_modules()
    objectives["short"]["min_valid_fraction"] = 0.6
    with pytest.raises(TooFewVerdicts, match=r"min_valid_fraction = 0\.6"):
        flaky_runs.run("strict", steps=1, objectives=objectives, scoring={"min_valid_fraction": 0.0})
