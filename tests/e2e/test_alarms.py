"""Alarms in whole runs: told to the person, or the end of the run with a checkpoint, and counted on after a resume."""

from __future__ import annotations

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
        runs.run("stopped", steps=8, objectives=NO_SIGNAL, alarms="stop")
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
