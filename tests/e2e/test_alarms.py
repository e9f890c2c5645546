"""Alarms in whole runs: told to the person, or the end of the run with a checkpoint, and counted on after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_builders import ROWS, Notebook, Runs, make_objective, metrics_of

from grpo.checkpoint import list_checkpoints
from grpo.errors import TooAlarming

NO_SIGNAL = {name: make_objective(flat=[str(row["id"]) for row in ROWS]) for name in ("short", "long")}
"""Every completion scores alike, so that no gradient comes of any."""


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    made = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    made.prepare()
    return made


def test_a_run_that_learns_nothing_is_stopped_where_the_recipe_says_so_with_a_checkpoint(runs: Runs) -> None:
    with pytest.raises(TooAlarming, match=r"no gradient, step 3: .* for 3 steps"):
        runs.run("stopped", steps=8, objectives=NO_SIGNAL, alarms="stop", optim={"learning_rate": 1e-3})
    (checkpoint,) = list_checkpoints(runs.folder / "stopped")
    assert checkpoint.step == 3
    assert len(metrics_of(runs.folder / "stopped")) == 3


def test_else_it_is_warned_once_and_a_resumed_run_goes_on_counting(runs: Runs) -> None:
    first, second = Notebook(), Notebook()
    runs.run("warned", steps=2, objectives=NO_SIGNAL, observer=first, optim={"learning_rate": 1e-3})
    assert first.warnings == []
    changes = {"objectives": NO_SIGNAL, "optim": {"learning_rate": 1e-3}}
    runs.run("warned", steps=6, resume=True, observer=second, **changes)
    assert [warning.split(":")[0] for warning in second.warnings] == [
        "no gradient, step 3",
        "no KL, step 5",
        "no signal, step 5",
    ]


def test_a_learning_rate_of_the_other_kind_and_an_evaluation_that_did_not_move_are_told(runs: Runs) -> None:
    notebook = Notebook()
    evaluation = {"before": True, "after": True, "num_prompts": 2}
    runs.run("still", steps=1, observer=notebook, optim={"learning_rate": 1e-9}, eval=evaluation)
    assert [warning.split(":")[0] for warning in notebook.warnings] == ["learning rate", "evaluation unmoved"]


def test_where_the_recipe_says_stop_a_learning_rate_of_the_other_kind_ends_the_run_before_anything_is_written(
    runs: Runs,
) -> None:
    recipe = runs.write_recipe("unbegun", alarms="stop", optim={"learning_rate": 1e-9})
    code, _, stderr = runs.command("train", str(recipe))
    assert code == 1
    assert stderr.startswith("error: learning rate: optim.learning_rate = 1e-09 is low for LoRA")
    assert "No step was taken" in stderr
    assert not (runs.folder / "unbegun").exists()
    code, _, stderr = runs.command("train", str(recipe), "optim.learning_rate=1e-3", "steps=1")
    assert code == 0, stderr


def test_where_the_recipe_says_stop_an_evaluation_that_did_not_move_ends_a_run_that_is_whole(runs: Runs) -> None:
    evaluation = {"before": True, "after": True, "num_prompts": 2}
    changes = {"alarms": "stop", "steps": 2, "optim": {"learning_rate": 1e-5}, "eval": evaluation}
    code, _, stderr = runs.command("train", str(runs.write_recipe("still", **changes)))
    run_dir = runs.folder / "still"
    assert code == 1
    assert stderr.startswith("error: evaluation unmoved: all 4 held-out answers are word for word")
    assert "All 2 steps, checkpoint and eval.json are saved" in stderr
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [2]
    assert {"before", "after", "difference"} <= json.loads((run_dir / "eval.json").read_text()).keys()
    code, _, stderr = runs.command("train", str(run_dir), "--resume")  # nothing is left to do
    assert code == 0, stderr


def test_completions_without_an_end_without_a_verdict_or_of_one_token_are_told_by_objective(runs: Runs) -> None:
    told, brief = Notebook(), Notebook()
    silent = {"short": make_objective(missing=["p0", "p4"]), "long": make_objective()}  # two of its four prompts
    prompts = {"type": "file", "path": "train.jsonl", "per_step": 8}
    changes = {"prompts": prompts, "optim": {"learning_rate": 1e-3}, "scoring": {"min_valid_fraction": 0.0}}
    runs.run("long_winded", steps=5, observer=told, objectives=silent, **changes)
    assert [warning.split(":")[0] for warning in told.warnings if "long" not in warning] == [
        "unscored completions of short, step 3",
        "truncated completions of short, step 5",  # the tiny model hardly ever draws its one end token
    ]
    rollout = {"group_size": 4, "max_new_tokens": 8, "end_tokens": list(range(320))}  # every token there is
    runs.run("brief", steps=3, observer=brief, rollout=rollout, **changes)
    assert [warning.split(":")[0] for warning in brief.warnings if "one-token" in warning] == [
        "one-token completions of short, step 3",
        "one-token completions of long, step 3",
    ]
