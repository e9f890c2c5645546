"""A run in two processes is the run in one: the same weights, figures and files; and it ends as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import RankPair
from rank_runs import check_same, recipe_of
from run_builders import lines_of

from grpo.checkpoint import list_checkpoints
from grpo.errors import ConfigError, RunStopped
from grpo.phases import Phase
from grpo.recipe_loader import parse_recipe
from grpo.step_report import StepReport
from grpo.trainer import Trainer

pytestmark = pytest.mark.long

STRICT = {"min_valid_fraction": 1.0}
WARMUP = {"path": "warmup.jsonl", "steps": 2, "batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-3}


def train(recipe: dict[str, Any], folder: str, resume: bool = False) -> tuple[bool, list[str]]:
    """Whether the run was interrupted, and the files of its directory that this process has opened for writing."""
    written: set[str] = set()
    run_dir = os.path.join(folder, recipe["output_dir"])

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(run_dir) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            written.add(str(arguments[0]))

    sys.addaudithook(note)
    config = parse_recipe(recipe, base_dir=Path(folder), source="recipe.yaml")
    result = Trainer(config).run(resume=resume)
    return result.was_interrupted, sorted(written)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPair]:
    with RankPair(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


# --- the same run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"update": {"gradients": {"method": "pcgrad"}, "iterations": 2}},
        {"prompts": {"type": "file", "path": "data.jsonl", "held_out_path": "data.jsonl", "per_step": 1}},
        {"rollout": {"group_size": 4, "max_new_tokens": 8, "top_k": 20, "resample_rounds": 2}},
        {"warmup": WARMUP},
        {"steps": 4, "eval": {"num_prompts": 3, "every": 2}},
    ],
    ids=["sum", "pcgrad, two windows", "one rank has nothing", "dynamic sampling", "warm-up", "evaluated on the way"],
)
def test_a_run_of_two_ranks_is_the_run_of_one(
    changes: dict[str, Any], two: RankPair, tiny_model_dir: Path, tmp_path: Path
) -> None:
    together, alone = (recipe_of(tmp_path, tiny_model_dir, name, **changes) for name in ("together", "alone"))
    (interrupted, written), (also_interrupted, also_written) = two.run(train, together, str(tmp_path))
    assert (interrupted, also_interrupted) == (False, False)
    assert [name for name in also_written if not name.endswith(".rank-1.jsonl")] == []  # its part of the journal
    assert str(tmp_path / "together" / "metrics.jsonl") in written
    train(alone, str(tmp_path))
    check_same(tmp_path / "together", tmp_path / "alone")
    every = together["eval"].get("every")
    evaluated = [row["step"] for row in lines_of(tmp_path / "together" / "metrics.jsonl") if "eval/short/mean" in row]
    assert evaluated == [step for step in range(1, together["steps"] + 1) if every and step % every == 0]


def test_a_run_of_one_process_goes_on_in_two_and_back_again(
    two: RankPair, tiny_model_dir: Path, tmp_path: Path
) -> None:
    train(recipe_of(tmp_path, tiny_model_dir, "whole", steps=6), str(tmp_path))
    train(recipe_of(tmp_path, tiny_model_dir, "changing", steps=2), str(tmp_path))
    for answer in two.run(train, recipe_of(tmp_path, tiny_model_dir, "changing", steps=4), str(tmp_path), True):
        assert answer[0] is False
    train(recipe_of(tmp_path, tiny_model_dir, "changing", steps=6), str(tmp_path), True)
    check_same(tmp_path / "changing", tmp_path / "whole")


def train_until_killed(recipe: dict[str, Any], folder: str, phase: Phase) -> None:
    """Both ranks are killed in this phase of the second step."""
    seen: list[Phase] = []

    def announce(now: Phase) -> None:
        seen.append(now)
        if seen.count(phase) == 2:
            raise KeyboardInterrupt  # caught by nobody, and no rank waits for another any more

    config = parse_recipe(recipe, base_dir=Path(folder), source="recipe.yaml")
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, announce=announce).run()


def test_a_run_of_two_ranks_that_was_killed_goes_on_from_both_journals(
    two: RankPair, tiny_model_dir: Path, tmp_path: Path
) -> None:
    two.run(train, recipe_of(tmp_path, tiny_model_dir, "whole", steps=3), str(tmp_path))
    killed = recipe_of(tmp_path, tiny_model_dir, "killed", steps=3)
    for answer in two.run(train_until_killed, killed, str(tmp_path), "optimizer"):
        assert answer is None
    journal = {path.name: path.read_bytes() for path in (tmp_path / "killed" / "journal").glob("step-*")}
    assert sorted(journal) == [f"step-{step}.rank-{rank}.jsonl" for step in (1, 2) for rank in (0, 1)]
    for answer in two.run(train, killed, str(tmp_path), True):
        assert answer[0] is False
    whole, resumed = (tmp_path / name for name in ("whole", "killed"))
    check_same(resumed, whole)
    ours, theirs = (
        list_checkpoints(run)[-1].folder / "policy" / "adapter_model.safetensors" for run in (resumed, whole)
    )
    assert ours.read_bytes() == theirs.read_bytes()


# --- errors


def test_a_reward_that_fails_on_one_rank_ends_both_with_its_error(
    two: RankPair, tiny_model_dir: Path, tmp_path: Path
) -> None:
    for prompt_id in ("p0", "p2"):
        recipe = recipe_of(tmp_path, tiny_model_dir, prompt_id, reward={"fails_at": prompt_id}, scoring=STRICT)
        answers = two.run(train, recipe, str(tmp_path))
        assert [type(answer) for answer in answers] == [type(answers[0])] * 2
        assert f"no idea about {prompt_id}" in str(answers[0])
        assert str(answers[0]) == str(answers[1])


def test_bad_input_is_refused_on_both_before_anything_is_written(
    two: RankPair, tiny_model_dir: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, tiny_model_dir, "refused", model="./nowhere")
    answers = two.run(train, recipe, str(tmp_path))
    assert [str(answer) for answer in answers] == [str(answers[0])] * 2
    assert not (tmp_path / "refused").exists()
    (tmp_path / "refused").mkdir()
    for answer in two.run(train, recipe_of(tmp_path, tiny_model_dir, "refused"), str(tmp_path)):
        assert isinstance(answer, ConfigError)
        assert "exists already" in str(answer)


class Drifting(Trainer):
    """Its second rank's copy of the policy drifts away."""

    def step(self, step: int) -> StepReport:
        report = super().step(step)
        if not self.is_main:
            with torch.no_grad():
                next(iter(self.parts.policy.trainable_parameters().values())).add_(1e-6)
        return report


def train_and_drift(recipe: dict[str, Any], folder: str) -> None:
    Drifting(parse_recipe(recipe, base_dir=Path(folder), source="recipe.yaml")).run()


def test_ranks_that_drift_apart_stop_the_run_before_they_are_saved(
    two: RankPair, tiny_model_dir: Path, tmp_path: Path
) -> None:
    for answer in two.run(train_and_drift, recipe_of(tmp_path, tiny_model_dir, "drift"), str(tmp_path)):
        assert isinstance(answer, RunStopped)
        assert "copies of" in str(answer)
    assert list_checkpoints(tmp_path / "drift") == []


# --- the command


def launch(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """`accelerate launch --cpu --num_processes 2 -m grpo ...`, in a process group of its own as a shell would."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    return subprocess.Popen(
        [*launcher, "-m", "grpo", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def write_recipe(recipe: dict[str, Any], folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return str(path)


def test_accelerate_launch_starts_two_ranks_and_ctrl_c_ends_both_after_a_whole_step(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    evaluation = {"num_prompts": 3, "before": False, "after": False}
    reward = {"pause_s": 0.3, "seen": str(tmp_path / "seen")}
    changes = {"steps": 100, "eval": evaluation, "reward": reward, "checkpoint": {"every": 100}}
    recipe = write_recipe(recipe_of(tmp_path, tiny_model_dir, "run", **changes), tmp_path)
    run, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    with launch("train", recipe, cwd=tmp_path) as process:
        deadline = time.monotonic() + 100
        while not metrics.exists() or not metrics.read_text():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no step within 100 s"
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
        output, errors = process.communicate(timeout=100)  # until the last of the processes has closed its end
    done = len(lines_of(metrics))
    assert 1 <= done < 100
    assert [checkpoint.step for checkpoint in list_checkpoints(run)] == [done], errors
    assert f"interrupted after step {done}; go on with: grpo train {run} --resume" in "".join(output.splitlines())
    assert {path.name for path in tmp_path.glob("seen-*")} == {"seen-0-of-2", "seen-1-of-2"}
    assert process.returncode != 0  # the launcher's own: -2 for Ctrl-C


def test_bad_input_under_a_launcher_is_one_error_and_a_failure(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(recipe_of(tmp_path, tiny_model_dir, "run"), tmp_path)
    with launch("train", recipe, "rollout.group_size=1", cwd=tmp_path) as process:
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 1  # the launcher's own, whatever its processes end with
    assert [line for line in errors.splitlines() if line.startswith("error:")] == [
        line for line in errors.splitlines() if "rollout.group_size" in line and "error:" in line
    ]
    assert errors.count("error: ") == 1, errors
    assert not (tmp_path / "run").exists()


def test_an_error_that_only_another_process_meets_is_told_by_it(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "grpo", "train", str(tmp_path / "nowhere.yaml")]
    done = subprocess.run(line, env={**os.environ, "RANK": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error in process 1: ")
    assert "nowhere.yaml" in done.stderr
