"""A run that was ended anywhere goes on as if it had not been, bit for bit; in one process, on the tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from grpo.checkpoint import list_checkpoints
from grpo.config import RunConfig
from grpo.errors import CheckpointError, ConfigError, TooFewVerdicts
from grpo.phases import Announce, Phase, silent
from grpo.recipe_loader import load_run_config, parse_recipe
from grpo.runtime.interruptions import interruptions
from grpo.trainer import RunResult, Trainer

ROWS = [{"id": f"p{n}", "prompt": f"Add {n} and 1.", "objectives": [("short", "long")[n % 2]]} for n in range(5)]
REWARD = '''
"""Ten letters are best; no verdict at all while the file `silent` exists."""

import random
from pathlib import Path

import numpy as np
import torch


def drawn(inputs):
    return [random.random() + np.random.random() + torch.rand(()).item() for _ in inputs]


def letters(inputs, silent):
    with Path(silent).with_name("asked").open("a") as file:
        file.write(inputs[0].prompt_id + "\\n")
    return [None if Path(silent).exists() else abs(len(one.completion) - 10) / -10 for one in inputs]
'''


@pytest.fixture(autouse=True)
def same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # a reward's folder is added to it
    monkeypatch.delitem(sys.modules, "resume_test_rewards", raising=False)


@pytest.fixture
def make_config(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Two objectives with a beta that moves and one that does not; epochs that end within steps."""
    (tmp_path / "resume_test_rewards.py").write_text(REWARD)
    write_rows(tmp_path / "train.jsonl", ROWS)
    write_rows(tmp_path / "test.jsonl", ROWS)

    def make(name: str, **changes: Any) -> RunConfig:
        short = {"name": "length", "params": {"target_tokens": 2, "limit_tokens": 8}}
        long = {"name": "resume_test_rewards:letters", "params": {"silent": str(tmp_path / "silent")}}
        prompts = {"type": "file", "path": "train.jsonl", "held_out_path": "test.jsonl", "per_step": 3}
        recipe = {
            "model": str(tiny_model_dir),
            "steps": 5,
            "output_dir": name,
            "device": "cpu",
            "prompts": prompts,
            "objectives": {
                "short": {"rewards": [short], "beta": {"type": "band", "low": 0.01, "high": 0.1}},
                "long": {"rewards": [long], "beta": {"type": "fixed", "value": 0.05}},
            },
            "rollout": {"group_size": 4, "max_new_tokens": 8},
            "optim": {"learning_rate": 1e-2},
            "trainable": {"type": "lora", "rank": 2},
            "eval": {"before": False, "after": False, "num_prompts": 2},
            "checkpoint": {"every": 2},
        }
        return parse_recipe({**recipe, **changes}, base_dir=tmp_path, source="recipe.yaml")

    return make


EVALUATED = {"num_prompts": 2}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Watcher:
    """An observer that keeps the notes, and does something after a step or at a note."""

    def __init__(
        self, *, after: Mapping[int, Callable[[], object]] | None = None, at: str = "", do: Callable[[], object] = list
    ) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self._after, self._at, self._do = dict(after or {}), at, do

    def start(self, title_rows: list[tuple[str, str]]) -> None:
        pass

    def step(self, row: Mapping[str, Any], *, total_steps: int, seconds_left: float | None) -> None:
        self._after.get(row["step"], list)()

    def note(self, text: str) -> None:
        self.notes.append(text)
        if self._at and self._at in text:
            self._do()

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class Crash(Exception):
    """Stands for a kill: nothing of ours catches it."""


def crash() -> None:
    raise Crash


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def run(
    config: RunConfig, watcher: Watcher | None = None, *, resume: bool = False, announce: Announce = silent
) -> RunResult:
    return Trainer(config, observer=watcher, announce=announce).run(resume=resume)


def crashed_after(step: int, config: RunConfig, *, resume: bool = False) -> None:
    with pytest.raises(Crash):
        run(config, Watcher(after={step: crash}), resume=resume)


def crashed_at(
    phase: Phase, config: RunConfig, watcher: Watcher | None = None, *, resume: bool = True, time: int = 1
) -> None:
    """Killed at the n-th beginning of a phase."""
    seen: list[Phase] = []

    def announce(now: Phase) -> None:
        seen.append(now)
        if seen.count(phase) == time:
            raise Crash

    with pytest.raises(Crash):
        run(config, watcher, resume=resume, announce=announce)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def what_was_learned(run_dir: Path) -> dict[str, Any]:
    """All that a run computed, without times and memory."""
    last, evaluation = list_checkpoints(run_dir)[-1].folder, run_dir / "eval.json"
    metrics = [
        {name: value for name, value in row.items() if not name.startswith(("time/", "memory/"))}
        for row in lines_of(run_dir / "metrics.jsonl")
    ]
    return {
        "state": json.loads((last / "state.json").read_text()),
        "metrics": metrics,
        "completions": lines_of(run_dir / "completions.jsonl"),
        "evaluation": json.loads(evaluation.read_text()) if evaluation.exists() else None,
    }


def tensors_of(run_dir: Path) -> dict[str, torch.Tensor]:
    last = list_checkpoints(run_dir)[-1].folder
    return {
        f"{name}/{key}": tensor
        for name in ("optimizer.safetensors", "policy/adapter_model.safetensors", "random.safetensors")
        for key, tensor in load_file(last / name).items()
    }


# --- the same run


def shorter(make: Callable[..., RunConfig]) -> None:
    run(make("resumed", steps=3, eval=EVALUATED))


def signalled(make: Callable[..., RunConfig]) -> None:
    result = run(make("resumed", eval=EVALUATED), Watcher(after={3: terminate}))
    assert (result.was_interrupted, result.checkpoint.step) == (True, 3)


def killed(make: Callable[..., RunConfig]) -> None:
    crashed_after(3, make("resumed", eval=EVALUATED))  # its last checkpoint is of step 2


@pytest.mark.parametrize("end", [shorter, signalled, killed])
def test_a_run_that_was_ended_and_resumed_is_the_uninterrupted_run_bit_for_bit(
    end: Callable[[Callable[..., RunConfig]], None], make_config: Callable[..., RunConfig]
) -> None:
    whole = run(make_config("whole", eval=EVALUATED)).run_dir
    end(make_config)
    resumed = run(make_config("resumed", eval=EVALUATED), resume=True).run_dir
    ours, theirs = tensors_of(resumed), tensors_of(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert what_was_learned(resumed) == what_was_learned(whole)
    assert len({row["beta/short"] for row in lines_of(whole / "metrics.jsonl")}) > 1  # a beta that was carried over


PHASES: tuple[Phase, ...] = get_args(Phase)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_run_that_is_killed_in_every_phase_one_after_the_other_is_the_uninterrupted_run_bit_for_bit(
    every: int, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    whole = run(make_config("whole", checkpoint={"every": every})).run_dir
    asked_at_once = num_asked(tmp_path)
    config = make_config("resumed", checkpoint={"every": every})
    for number, phase in enumerate(PHASES):
        crashed_at(phase, config, resume=number > 0)
        for name in ("metrics.jsonl", "completions.jsonl"):
            with (config.output_dir / name).open("a") as file:
                file.write('{"step": 1, "torn')
    watcher = Watcher()
    run(config, watcher, resume=True)
    ours, theirs = tensors_of(config.output_dir), tensors_of(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert what_was_learned(config.output_dir) == what_was_learned(whole)
    rows, other_rows = (lines_of(folder / "metrics.jsonl") for folder in (config.output_dir, whole))
    assert [row.keys() for row in rows] == [row.keys() for row in other_rows]  # the times' keys too
    # of the reward of `long`, nothing twice but what was in flight at the kill while judging: two groups of a step
    assert 0 <= num_asked(tmp_path) - 2 * asked_at_once <= 2


def test_a_run_is_saved_by_what_its_journal_holds_though_neither_engine_nor_reward_would_answer_alike(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config("run", steps=2, checkpoint={"every": 5})
    crashed_at("optimizer", config, resume=False, time=2)
    first = lines_of(config.output_dir / "completions.jsonl")
    (tmp_path / "silent").touch()  # whoever is asked now has no verdict, and the run would stop
    run(config, resume=True)
    rows = lines_of(config.output_dir / "completions.jsonl")
    assert [row for row in rows if row["step"] == 1] == first
    assert all(verdict["value"] is not None for row in rows for verdict in row["verdicts"].values())


def test_of_a_step_that_was_killed_while_it_was_scored_only_what_is_missing_is_asked_for(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    prompts = {"type": "file", "path": "train.jsonl", "held_out_path": "test.jsonl", "per_step": 5}
    config = make_config("run", steps=1, prompts=prompts)
    whole = run(make_config("whole", steps=1, prompts=prompts)).run_dir
    crashed_at("journal", config, resume=False)
    before = num_asked(tmp_path)
    (journal,) = (config.output_dir / "journal").iterdir()
    *kept, last = journal.read_bytes().splitlines(keepends=True)
    assert b'"kind": "scores"' in last
    journal.write_bytes(b"".join(kept) + last[:40])  # as if it had been killed a moment earlier
    run(config, resume=True)
    assert num_asked(tmp_path) - before == (b'"reward": "letters"' in last or b"resume_test_rewards" in last)
    assert what_was_learned(config.output_dir) == what_was_learned(whole)


def test_of_a_step_that_was_killed_while_it_was_sampled_the_groups_that_are_there_stay(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    whole = run(make_config("whole", steps=1)).run_dir
    config = make_config("run", steps=1)
    crashed_at("judging", config, resume=False)
    (journal,) = (config.output_dir / "journal").iterdir()
    first = journal.read_bytes().splitlines(keepends=True)[0]
    assert b'"kind": "group"' in first
    journal.write_bytes(first)
    run(config, resume=True)
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else [first]
    assert lines[0] == first
    ours, theirs = tensors_of(config.output_dir), tensors_of(whole)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert what_was_learned(config.output_dir) == what_was_learned(whole)


def test_a_damaged_newest_checkpoint_is_named_and_the_run_goes_on_from_the_one_before_without_asking_anybody_again(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    whole = run(make_config("whole", steps=4, checkpoint={"every": 1})).run_dir
    config = make_config("run", steps=3, checkpoint={"every": 1})
    run(config)
    damaged = list_checkpoints(config.output_dir)[-1].folder
    (damaged / "optimizer.safetensors").write_bytes(b"")
    before, watcher = num_asked(tmp_path), Watcher()
    run(make_config("run", steps=3, checkpoint={"every": 1}), watcher, resume=True)
    assert num_asked(tmp_path) == before
    assert any(str(damaged) in note and "optimizer.safetensors is damaged" in note for note in watcher.notes)
    run(make_config("run", steps=4, checkpoint={"every": 1}), resume=True)
    ours, theirs = tensors_of(config.output_dir), tensors_of(whole)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_journal_stays_as_long_as_a_checkpoint_could_need_it(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("run", steps=5, checkpoint={"every": 1, "keep": 2})
    run(config)
    assert [checkpoint.step for checkpoint in list_checkpoints(config.output_dir)] == [4, 5]
    assert [path.name for path in (config.output_dir / "journal").iterdir()] == ["step-5.rank-0.jsonl"]


def test_a_damaged_line_of_the_journal_is_told_and_its_group_is_sampled_again(
    make_config: Callable[..., RunConfig],
) -> None:
    whole = run(make_config("whole", steps=1)).run_dir
    config = make_config("run", steps=1)
    crashed_at("backward", config, resume=False)
    (journal,) = (config.output_dir / "journal").iterdir()
    content = bytearray(journal.read_bytes())
    content[200] ^= 1
    journal.write_bytes(bytes(content))
    watcher = Watcher()
    run(config, watcher, resume=True)
    assert any(f"{journal}, line 1 is damaged" in warning for warning in watcher.warnings)
    assert what_was_learned(config.output_dir) == what_was_learned(whole)


def test_other_prompts_than_when_the_run_was_saved_are_told(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run(make_config("run", steps=1))
    write_rows(tmp_path / "train.jsonl", [{**row, "id": f"new-{row['id']}"} for row in ROWS])
    watcher = Watcher()
    run(make_config("run", steps=2), watcher, resume=True)
    assert any("step 2 has other prompts" in note for note in watcher.notes)


def test_a_reward_that_draws_from_the_global_generators_draws_the_same_after_a_kill(
    make_config: Callable[..., RunConfig],
) -> None:
    changes: dict[str, Any] = {"objectives": {"short": drawn(), "long": drawn()}, "steps": 3}
    prompts = {"type": "file", "path": "train.jsonl", "held_out_path": "test.jsonl", "per_step": 1}  # one group at once
    whole = run(make_config("whole", prompts=prompts, **changes)).run_dir
    config = make_config("run", prompts=prompts, **changes)
    crashed_at("rollout", config, resume=False, time=2)
    run(config, resume=True)
    assert what_was_learned(config.output_dir) == what_was_learned(whole)
    ours, theirs = tensors_of(config.output_dir), tensors_of(whole)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.slow
def test_a_strict_run_is_the_default_one_on_a_cpu_and_cannot_be_resumed_as_such(
    make_config: Callable[..., RunConfig],
) -> None:
    prompts = {"group_size": 4, "max_new_tokens": 8, "top_p": 0.9, "top_k": 50}
    strict = run(make_config("strict", steps=2, determinism="strict", rollout=prompts)).run_dir
    whole = run(make_config("whole", steps=2, rollout=prompts)).run_dir
    assert not torch.are_deterministic_algorithms_enabled()
    assert what_was_learned(strict) == what_was_learned(whole)
    ours, theirs = tensors_of(strict), tensors_of(whole)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    with pytest.raises(ConfigError, match="determinism was 'strict', now 'default'"):
        run(make_config("strict", steps=3, rollout=prompts), resume=True)


def drawn() -> dict[str, Any]:
    return {"rewards": [{"name": "resume_test_rewards:drawn"}], "beta": {"type": "fixed", "value": 0.05}}


def num_asked(folder: Path) -> int:
    """How often the reward of `long` was asked about a group."""
    return len((folder / "asked").read_text().splitlines())


def test_a_linear_schedule_goes_on_too_and_a_changed_number_of_steps_is_told(
    make_config: Callable[..., RunConfig],
) -> None:
    linear = {"learning_rate": 1e-2, "schedule": "linear"}
    whole = make_config("whole", steps=3, optim=linear)
    run(whole)
    crashed_after(2, make_config("resumed", steps=3, optim=linear))
    watcher = Watcher()
    run(make_config("resumed", steps=3, optim=linear), watcher, resume=True)
    ours, theirs = tensors_of(whole.output_dir.with_name("resumed")), tensors_of(whole.output_dir)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert "learning rate" not in "".join(watcher.notes)
    run(make_config("resumed", steps=4, optim=linear), watcher, resume=True)
    assert any(note.startswith("steps was 3, now 4: the learning rate") for note in watcher.notes)


# --- the number of steps


def test_an_extension_that_was_cut_short_goes_on_to_the_extended_number(make_config: Callable[..., RunConfig]) -> None:
    run_dir = run(make_config("run", steps=1)).run_dir
    crashed_after(2, make_config("run", steps=3, checkpoint={"every": 1}), resume=True)
    saved = load_run_config(run_dir)
    assert (saved.steps, saved.checkpoint.every) == (3, 1)
    run(saved, resume=True)
    assert [row["step"] for row in lines_of(run_dir / "metrics.jsonl")] == [1, 2, 3]


def test_fewer_steps_than_are_done_are_refused_and_as_many_show_the_results_again(
    make_config: Callable[..., RunConfig],
) -> None:
    first = run(make_config("run", steps=2, eval=EVALUATED))
    learned, config = what_was_learned(first.run_dir), (first.run_dir / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="has 2 steps; give steps=M above 2, not 1"):
        run(make_config("run", steps=1, eval=EVALUATED), resume=True)
    assert (first.run_dir / "config.yaml").read_bytes() == config
    again = run(make_config("run", steps=2, eval=EVALUATED), resume=True)
    assert (again.evaluation, again.was_interrupted) == (first.evaluation, False)
    assert what_was_learned(first.run_dir) == learned


def test_a_run_without_a_checkpoint_begins_with_its_first_step(make_config: Callable[..., RunConfig]) -> None:
    crashed_after(1, make_config("run", steps=2))
    run_dir = run(make_config("run", steps=2), resume=True).run_dir
    assert [row["step"] for row in lines_of(run_dir / "metrics.jsonl")] == [1, 2]
    assert [line["step"] for line in lines_of(run_dir / "completions.jsonl")] == [1] * 12 + [2] * 12


def test_a_run_is_saved_after_the_steps_in_which_an_epoch_ends(make_config: Callable[..., RunConfig]) -> None:
    # five prompts an epoch, three a step: the fifth is in step 2
    config = make_config("run", steps=3, checkpoint={"every_epochs": 1, "keep": 9})
    run_dir = run(config).run_dir
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [2, 3]
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match="has done 3 steps, but its checkpoints are gone"):
        run(config, resume=True)


def test_a_run_whose_checkpoints_were_taken_away_is_not_begun_anew(make_config: Callable[..., RunConfig]) -> None:
    run_dir = run(make_config("run", steps=2, checkpoint={"every": 1})).run_dir
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match="has done 2 steps, but its checkpoints are gone"):
        run(make_config("run", steps=3, checkpoint={"every": 1}), resume=True)
    assert len(lines_of(run_dir / "metrics.jsonl")) == 2


# --- evaluation


def test_answers_before_training_are_found_by_id_and_not_by_place(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    before = run(make_config("run", steps=1, eval={**EVALUATED, "after": False})).evaluation["answers"]["before"]
    write_rows(tmp_path / "test.jsonl", ROWS[:4][::-1])
    evaluation = run(make_config("run", steps=2, eval=EVALUATED), resume=True).evaluation
    prompts = {row["prompt"]: row["id"] for row in ROWS}
    said = {entry["id"]: entry["completion"] for entry in before}
    assert [entry["id"] for entry in before] == ["p0", "p1", "p2", "p3"]
    assert [entry["id"] for entry in evaluation["answers"]["after"]] == ["p3", "p2", "p1", "p0"]
    assert {prompts[e["prompt"]]: e["before"] for e in evaluation["examples"]}.items() <= said.items()
    for objective in ("short", "long"):
        means = [evaluation[when][objective]["mean"] for when in ("before", "after")]
        assert evaluation["difference"][objective]["mean"] == pytest.approx(means[1] - means[0])


def test_other_held_out_prompts_leave_out_the_difference_and_say_so(make_config: Callable[..., RunConfig]) -> None:
    run(make_config("run", steps=1, eval=EVALUATED))
    watcher = Watcher()
    evaluation = run(make_config("run", steps=2, eval={"num_prompts": 3}), watcher, resume=True).evaluation
    assert [len(evaluation["answers"][when]) for when in ("before", "after")] == [4, 5]
    assert evaluation.keys() == {"before", "after", "answers"}
    assert any("4 held-out prompts" in note and "no difference" in note for note in watcher.notes)


def test_while_a_run_is_extended_nothing_shows_the_results_of_the_shorter_one(
    make_config: Callable[..., RunConfig],
) -> None:
    first = run(make_config("run", steps=1, eval=EVALUATED))
    assert first.evaluation.keys() == {"before", "after", "difference", "examples", "answers"}
    crashed_after(2, make_config("run", steps=3, eval=EVALUATED), resume=True)
    evaluation = json.loads((first.run_dir / "eval.json").read_text())
    assert evaluation == {
        "before": first.evaluation["before"],
        "answers": {"before": first.evaluation["answers"]["before"]},
    }


# --- stopping


def test_a_run_that_cannot_go_on_saves_what_it_has_done_and_resumes_from_there(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    whole = run(make_config("whole", steps=4, eval=EVALUATED)).run_dir
    config = make_config("run", steps=4, eval=EVALUATED)
    with pytest.raises(TooFewVerdicts) as caught:
        run(config, Watcher(after={3: (tmp_path / "silent").touch}))
    assert caught.value.__notes__ == [f"Saved after step 3; go on with: grpo train {config.output_dir} --resume"]
    assert [checkpoint.step for checkpoint in list_checkpoints(config.output_dir)] == [2, 3]
    (tmp_path / "silent").unlink()
    run(config, resume=True)
    assert what_was_learned(config.output_dir) == what_was_learned(whole)


def test_a_signal_during_the_last_evaluation_interrupts_nothing(make_config: Callable[..., RunConfig]) -> None:
    watcher = Watcher(at="held-out prompts after", do=terminate)
    result = run(make_config("run", steps=1, eval=EVALUATED), watcher)
    assert not result.was_interrupted
    assert "after" in result.evaluation


def test_a_signal_in_the_last_step_interrupts_only_where_an_evaluation_is_left(
    make_config: Callable[..., RunConfig],
) -> None:
    results = [
        run(make_config(name, steps=1, eval={**EVALUATED, "after": after}), Watcher(after={1: terminate}))
        for name, after in (("evaluated", True), ("not", False))
    ]
    assert [result.was_interrupted for result in results] == [True, False]
    resumed = run(make_config("evaluated", steps=1, eval=EVALUATED), resume=True)
    assert "difference" in resumed.evaluation


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_at_once_while_a_step_blocks(number: signal.Signals, capfd: pytest.CaptureFixture) -> None:
    seen: list[str] = []
    blocked = threading.Event()

    def send() -> None:
        os.kill(os.getpid(), number)
        for _ in range(100):
            seen.append(capfd.readouterr().err)
            if seen[-1] or blocked.wait(0.05):
                break
        blocked.set()

    with interruptions() as interrupted:
        sender = threading.Timer(0.05, send)
        sender.start()
        assert blocked.wait(60)
        sender.join()
        assert interrupted.is_set()
    assert "".join(seen).count("finishing the current step or evaluation, then saving; press Ctrl-C again") == 1


def test_a_second_ctrl_c_is_not_waited_for_and_a_second_sigterm_changes_nothing() -> None:
    with interruptions() as interrupted:
        terminate()
        terminate()
        assert interrupted.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# --- one at a time


def test_a_directory_in_which_a_run_is_under_way_is_refused_until_that_run_ends(
    make_config: Callable[..., RunConfig],
) -> None:
    config = make_config("run", steps=2)
    refused: list[str] = []

    def resume_too() -> None:
        with pytest.raises(ConfigError, match="another process is running in") as caught:
            run(config, resume=True)
        refused.append(str(caught.value))

    run(config, Watcher(after={1: resume_too}))
    run(make_config("run", steps=3), Watcher(after={3: resume_too}), resume=True)
    assert len(refused) == 2
    assert len(lines_of(config.output_dir / "metrics.jsonl")) == 3
