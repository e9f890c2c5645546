"""Evaluations during a run: on the lines of their steps, the same after a kill, and heard where nothing moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_builders import Notebook, Runs, lines_of, make_objective, metrics_of, tensors_of, what_was_computed, write_rows

from grpo.checkpoint import list_checkpoints
from grpo.errors import EngineError, TooAlarming
from grpo.phases import Phase
from grpo.trainer import Trainer

EVERY_TWO = {"before": False, "after": True, "every": 2, "num_prompts": 2}
ROWS = [{"id": f"p{n}", "prompt": f"Add {n} and 1.", "objectives": ["short"]} for n in range(16)]
IDS = [str(row["id"]) for row in ROWS]


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    made = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    made.prepare()
    return made


class Crash(Exception):
    """Stands for a kill."""


def evaluations_of(run_dir: Path) -> list[dict[str, Any]]:
    return lines_of(run_dir / "evaluations.jsonl")


def test_every_n_steps_the_held_out_means_stand_on_the_steps_line_and_nothing_else_changes(runs: Runs) -> None:
    evaluated = runs.run("evaluated", steps=4, eval=EVERY_TWO)
    plain = runs.run("plain", steps=4)
    rows, answers = metrics_of(evaluated), evaluations_of(evaluated)
    assert [row["step"] for row in rows if "eval/short/mean" in row] == [2, 4]
    for row in rows[1::2]:
        own = [line["scores"]["short"] for line in answers if line["step"] == row["step"] and "short" in line["scores"]]
        assert row["eval/short/mean"] == pytest.approx(sum(own) / 2)
        assert row["eval/short/low"] <= row["eval/short/mean"] <= row["eval/short/high"]
        assert row["time/eval_s"] > 0
    assert "eval/short/answers_changed" not in rows[1]  # there was none before it
    assert rows[3]["eval/short/answers_changed"] in (0, 1, 2)
    without = [{name: value for name, value in row.items() if not name.startswith("eval/")} for row in rows]
    assert without[0].keys() == metrics_of(plain)[0].keys()
    computed = {**what_was_computed(evaluated), "state": None}
    computed["metrics"] = [
        {name: value for name, value in row.items() if not name.startswith("eval/")} for row in computed["metrics"]
    ]
    assert computed == {**what_was_computed(plain), "state": None}
    ours, theirs = tensors_of(evaluated), tensors_of(plain)
    differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert [name for name in differing if not name.startswith("random")] == []  # which each step seeds anew


def test_the_evaluation_after_training_is_the_last_steps_where_there_was_one(runs: Runs) -> None:
    notebook = Notebook()
    run_dir = runs.run("run", steps=2, eval={**EVERY_TWO, "before": True}, observer=notebook)
    evaluation = json.loads((run_dir / "eval.json").read_text())
    row = metrics_of(run_dir)[1]
    assert evaluation["after"]["long"]["mean"] == row["eval/long/mean"]
    assert evaluation["difference"].keys() == {"short", "long"}
    assert [note for note in notebook.notes if "evaluating" in note] == [
        "evaluating on held-out prompts before training"
    ]
    changed = sum(one["before"] != one["after"] for one in evaluation["examples"])
    assert row["eval/short/answers_changed"] + row["eval/long/answers_changed"] >= changed  # against those before


def test_a_killed_run_writes_the_same_lines_and_answers_once_it_is_resumed(runs: Runs) -> None:
    changes: dict[str, Any] = {"steps": 4, "eval": {**EVERY_TWO, "before": True}}
    whole = runs.run("whole", **changes)
    rollouts = 0

    def announce(now: Phase) -> None:
        nonlocal rollouts
        rollouts += now == "rollout"
        if rollouts == 4:
            raise Crash

    with pytest.raises(Crash):
        Trainer(runs.config("killed", **changes), announce=announce).run()
    assert list_checkpoints(runs.folder / "killed") == []  # everything is run again from the first step
    killed = runs.run("killed", resume=True, **changes)
    assert what_was_computed(killed) == what_was_computed(whole)
    assert evaluations_of(killed) == evaluations_of(whole)
    assert (killed / "eval.json").read_text() == (whole / "eval.json").read_text()
    assert list((killed / "journal").iterdir()) == []


def test_a_run_that_went_on_from_a_checkpoint_compares_with_the_evaluation_before_it(runs: Runs) -> None:
    whole = runs.run_in_two_parts(steps=4, first=3, eval=EVERY_TWO)
    assert evaluations_of(runs.folder / "resumed") == evaluations_of(whole)


def test_a_failure_between_a_steps_update_and_its_line_saves_no_weights_under_the_step_before(runs: Runs) -> None:
    whole = runs.run("whole", steps=3)
    optimizer_steps = 0

    def announce(now: Phase) -> None:
        nonlocal optimizer_steps
        optimizer_steps += now == "optimizer"
        if now == "between" and optimizer_steps == 2:
            raise EngineError("the weight sync failed")

    with pytest.raises(EngineError) as failed:
        Trainer(runs.config("failed", steps=3), announce=announce).run()
    assert "The journal has the step; go on with" in failed.value.__notes__[0]
    assert list_checkpoints(runs.folder / "failed") == []
    resumed = runs.run("failed", resume=True, steps=3)
    ours, theirs = tensors_of(resumed), tensors_of(whole)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert what_was_computed(resumed)["metrics"] == what_was_computed(whole)["metrics"]


def watched(runs: Runs, name: str, *, train: list[str], held_out: list[str], **changes: Any) -> list[str]:
    """What a run is warned of. Args: train, held_out: ids of prompts whose completions all score alike."""
    write_rows(runs.folder / "train.jsonl", ROWS)
    notebook = Notebook()
    objective = {**make_objective(flat=train), "eval_rewards": make_objective(flat=held_out)["rewards"]}
    settings: dict[str, Any] = {
        "steps": 10,
        "eval": {"before": True, "after": False, "every": 5, "num_prompts": 16},
        "optim": {"learning_rate": 5e-3},
        "rollout": {"group_size": 4, "max_new_tokens": 8, "end_tokens": list(range(4, 60))},  # else all are truncated
    }
    runs.run(name, observer=notebook, objectives={"short": objective}, **{**settings, **changes})
    return [warning.split(":")[0] for warning in notebook.warnings]


def test_a_policy_whose_held_out_answers_stay_is_heard_at_the_third_evaluation(runs: Runs) -> None:
    assert watched(runs, "still", train=IDS, held_out=IDS) == [
        "no gradient, step 3",
        "no KL, step 5",
        "no signal, step 5",
        "evaluation unmoved, step 10",
    ]


def test_a_metric_that_moves_is_not_heard_and_one_that_stays_though_the_answers_change_ends_the_run(runs: Runs) -> None:
    assert watched(runs, "seeing", train=[], held_out=[], alarms="stop") == []
    means = [row["eval/short/mean"] for row in metrics_of(runs.folder / "seeing") if "eval/short/mean" in row]
    assert len(set(means)) == len(means) == 2
    with pytest.raises(TooAlarming, match=r"evaluation of short unmoved, step 10: .* at 3 evaluations in a row"):
        watched(runs, "blind", train=[], held_out=IDS, alarms="stop", steps=12)
    assert [checkpoint.step for checkpoint in list_checkpoints(runs.folder / "blind")] == [10]
