"""The command as people run it: help without torch, a run from start to report, kill and resume."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.cli import main
from grpo.recipe_loader import load_recipe
from grpo.trainer import RunResult, Trainer

ROWS = [
    *({"id": f"s{n}", "prompt": f"Add {n} and 1.", "objectives": ["short"], "kind": "odd"} for n in range(3)),
    *({"id": f"v{n}", "prompt": f"Say {n}.", "objectives": ["vowels"]} for n in range(3)),
]
REWARD = '''
"""A reward beside its recipe: the share of vowels; no verdict while the file `silent` exists."""

import pathlib
import time


def vowels(inputs, pause_s=0.0, silent="never.there"):
    time.sleep(pause_s)
    if pathlib.Path(silent).exists():
        return [None for _ in inputs]
    return [sum(letter in "aeiou" for letter in one.completion) / max(len(one.completion), 1) for one in inputs]
'''


def write_recipe(folder: Path, model_dir: Path, **changes: Any) -> Path:
    """Two objectives, each with its own prompts; the reward of one lies beside the recipe."""
    length = {"name": "length", "params": {"target_tokens": 2, "limit_tokens": 12}}
    recipe = {
        "model": str(model_dir),
        "steps": 2,
        "output_dir": "runs/first",
        "device": "cpu",
        "prompts": {"type": "file", "path": "data.jsonl", "held_out_path": "data.jsonl", "per_step": 6},
        "objectives": {
            "short": {"rewards": [length], "beta": {"type": "band", "low": 0.01, "high": 0.1}},
            "vowels": {"rewards": [{"name": "cli_test_rewards:vowels"}], "beta": {"type": "fixed", "value": 0.05}},
        },
        "rollout": {"group_size": 4, "max_new_tokens": 12},
        "optim": {"learning_rate": 1e-3},
        "trainable": {"type": "lora", "rank": 2},
        "eval": {"num_prompts": 2},
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cli_test_rewards.py").write_text(REWARD)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def with_params(recipe: Path, **params: Any) -> str:
    """The recipe's text, its own reward with these parameters."""
    name = "cli_test_rewards:vowels"
    return recipe.read_text().replace(name, f"{name}\n      params: {json.dumps(params)}")


def grpo(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grpo", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@dataclass(frozen=True, slots=True)
class InProcess:
    """`grpo ...` without a new interpreter: seconds less each."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Exit code and stderr."""
        self.monkeypatch.setattr(sys, "argv", ["grpo", *arguments])
        self.monkeypatch.setattr(sys, "path", list(sys.path))  # a reward's folder is added to it
        with pytest.raises(SystemExit) as exit_:
            main()
        return int(exit_.value.code or 0), self.capsys.readouterr().err


@pytest.fixture
def grpo_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    return InProcess(monkeypatch, capsys)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def first_run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, with evaluation before and after, started from another folder. Only to be read."""
    folder = tmp_path_factory.mktemp("recipes")
    write_recipe(folder, tiny_model_dir)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = grpo("train", str(folder / "recipe.yaml"), cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert list(elsewhere.iterdir()) == []
    run_dir = folder / "runs" / "first"
    for path in (run_dir / "checkpoints" / "step-2" / "policy", run_dir / "report.html"):
        assert str(path) in done.stdout.replace("\n", "")
    return run_dir


@pytest.fixture
def own_run(first_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, in another place, to be changed."""
    return Path(shutil.copytree(first_run, tmp_path / "moved"))


# --- without torch


def test_help_answers_without_importing_torch_or_anything_else_that_is_slow() -> None:
    code = (
        "import sys; sys.argv = ['grpo', '--help']\n"
        "from grpo.cli import main\n"
        "try:\n    main()\nexcept SystemExit as exc:\n    assert not exc.code\n"
        "slow = {'torch', 'transformers', 'numpy', 'pydantic', 'matplotlib', 'httpx', 'accelerate', 'peft'}\n"
        "print('loaded:', sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("loaded: []")


def test_help_lists_the_commands() -> None:
    done = grpo("--help")
    assert done.returncode == 0
    for command in ("train", "eval", "report"):
        assert f" {command} " in done.stdout


def test_an_unknown_command_is_bad_input() -> None:
    done = grpo("trian")
    assert done.returncode == 2
    assert "trian" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_report_of_what_is_no_run_is_bad_input(tmp_path: Path) -> None:
    done = grpo("report", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path} is not a run directory")
    assert list(tmp_path.iterdir()) == []


# --- a run


def test_a_run_leaves_its_whole_directory(first_run: Path) -> None:
    assert {path.name for path in first_run.iterdir()} == {
        ".lock",
        ".phase",
        "config.yaml",
        "metrics.jsonl",
        "completions.jsonl",
        "eval.json",
        "checkpoints",
        "journal",
        "report.html",
    }
    assert [path.name for path in (first_run / "checkpoints").iterdir()] == ["step-2"]
    assert (first_run / "checkpoints" / "step-2" / "policy" / "adapter_model.safetensors").is_file()
    config = yaml.safe_load((first_run / "config.yaml").read_text())
    assert (config["output_dir"], config["rollout"]["top_p"]) == (str(first_run), 1.0)  # resolved, defaults written out


ONCE_A_STEP = {
    "step",
    "kl/clamped_frac",
    "loss/policy",
    "loss/kl",
    "grad_norm",
    "entropy",
    "clip/low_frac",
    "clip/high_frac",
    "groups/zero_variance_frac",
    "completion/length_mean",
    "completion/truncated_frac",
    "sampler/ratio_p99",
    "tokens/prompt",
    "tokens/completion",
    "time/rollout_s",
    "time/judge_s",
    "time/judge_wait_s",
    "time/update_s",
    "time/sync_s",
    "time/step_s",
    "memory/peak_bytes",
}
ONCE_AN_OBJECTIVE = {
    "reward/{}/mean",
    "reward/{}/std",
    "reward/{}/unscored_frac",
    "kl/{}",
    "kl/{}/penalty",
    "beta/{}",
    "completion/{}/length_mean",
    "completion/{}/truncated_frac",
    "groups/{}/zero_variance_frac",
}


def test_every_step_is_a_line_with_every_published_name(first_run: Path) -> None:
    names = ONCE_A_STEP | {name.format(o) for name in ONCE_AN_OBJECTIVE for o in ("short", "vowels")}
    rows = lines_of(first_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert names - set(row) == set()
        assert [name for name in names if not isinstance(row[name], int | float)] == []


def test_figures_of_a_step_fit_each_other_and_the_completions(first_run: Path) -> None:
    rows, completions = lines_of(first_run / "metrics.jsonl"), lines_of(first_run / "completions.jsonl")
    for row in rows:
        own = [line for line in completions if line["step"] == row["step"]]
        assert len(own) == 24  # 6 prompts x 4 completions
        assert row["tokens/completion"] == sum(line["num_tokens"] for line in own)
        for objective in ("short", "vowels"):
            values = [line["verdicts"][objective]["value"] for line in own if objective in line["verdicts"]]
            assert len(values) == 12  # 3 prompts of its own x 4
            assert row[f"reward/{objective}/mean"] == pytest.approx(sum(values) / 12)
            assert row[f"reward/{objective}/unscored_frac"] == 0
        assert row["time/step_s"] >= row["time/rollout_s"] + row["time/update_s"]
        assert row["beta/vowels"] == 0.05  # fixed


def test_kl_is_zero_before_the_first_update_and_above_zero_after_it(first_run: Path) -> None:
    first, second = lines_of(first_run / "metrics.jsonl")
    for objective in ("short", "vowels"):
        assert abs(first[f"kl/{objective}"]) < 1e-6
        assert second[f"kl/{objective}"] > 1e-6


def test_evaluation_tells_before_after_and_the_difference_of_each_objective(first_run: Path) -> None:
    evaluation = json.loads((first_run / "eval.json").read_text())
    for objective, kind in (("short", "odd"), ("vowels", "all")):
        for when in ("before", "after"):
            figures = evaluation[when][objective]
            assert figures["n"] == 2
            assert figures["low"] <= figures["mean"] <= figures["high"]
            assert figures["kinds"] == {kind: pytest.approx(figures["mean"])}
        before, after = (evaluation[when][objective]["mean"] for when in ("before", "after"))
        assert evaluation["difference"][objective]["mean"] == pytest.approx(after - before)


def test_the_same_recipe_again_is_refused_and_changes_nothing(first_run: Path, grpo_here: InProcess) -> None:
    before = {path: path.stat().st_mtime_ns for path in first_run.rglob("*")}
    code, stderr = grpo_here("train", str(first_run.parents[1] / "recipe.yaml"))
    assert code == 2
    assert f"output_dir {first_run} exists already. Continue that run with --resume" in stderr
    assert {path: path.stat().st_mtime_ns for path in first_run.rglob("*")} == before


def test_a_report_is_written_again_at_any_time(own_run: Path) -> None:
    (own_run / "report.html").unlink()
    done = grpo("report", str(own_run))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(own_run / "report.html")
    assert "http" not in "".join(  # self-contained: loads nothing from elsewhere
        part for part in (own_run / "report.html").read_text().split('"') if part.endswith((".js", ".css", ".png"))
    )


def test_a_run_works_in_a_notebook_where_an_event_loop_is_already_running(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # a reward's folder is added to it
    config = load_recipe(str(write_recipe(tmp_path, tiny_model_dir, steps=1, eval={"after": False, "num_prompts": 2})))

    async def cell() -> RunResult:
        return Trainer(config).run()

    result = asyncio.run(cell())
    assert result.checkpoint.step == 1
    assert set(result.evaluation["before"]) == {"short", "vowels"}


# --- resuming


@pytest.mark.long
def test_a_run_resumes_where_it_lies_and_adds_the_steps_it_is_asked_for(own_run: Path, first_run: Path) -> None:
    old = [lines_of(own_run / name) for name in ("metrics.jsonl", "completions.jsonl")]
    done = grpo("train", str(own_run), "steps=3", "--resume")
    assert done.returncode == 0, done.stderr
    metrics, completions = (lines_of(own_run / name) for name in ("metrics.jsonl", "completions.jsonl"))
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert [metrics[:2], completions[:48]] == old
    assert len(completions) == 72
    assert {path.name for path in (own_run / "checkpoints").iterdir()} == {"step-2", "step-3"}
    assert [row["step"] for row in lines_of(first_run / "metrics.jsonl")] == [1, 2]  # the original stays


def test_resuming_under_another_recipe_is_refused_and_the_key_is_named(own_run: Path, grpo_here: InProcess) -> None:
    before = (own_run / "metrics.jsonl").read_bytes()
    code, stderr = grpo_here("train", str(own_run), "steps=3", "optim.learning_rate=1e-2", "--resume")
    assert code == 2
    assert "optim.learning_rate was 0.001, now 0.01" in stderr
    assert (own_run / "metrics.jsonl").read_bytes() == before


def test_a_run_that_was_extended_is_evaluated_again_after_its_last_step(own_run: Path, grpo_here: InProcess) -> None:
    evaluation = json.loads((own_run / "eval.json").read_text())
    for entry in evaluation["answers"]["after"]:
        entry["completion"] = "what the policy said after step 2"
    (own_run / "eval.json").write_text(json.dumps(evaluation))
    code, stderr = grpo_here("train", str(own_run), "steps=3", "--resume")
    assert code == 0, stderr
    after = json.loads((own_run / "eval.json").read_text())["answers"]["after"]
    assert "what the policy said after step 2" not in {entry["completion"] for entry in after}


def test_a_resumed_run_has_its_results_shown_before_a_report_that_fails(
    own_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_run / "report.html").unlink()
    (own_run / "report.html").mkdir()
    monkeypatch.setattr(sys, "argv", ["grpo", "train", str(own_run), "--resume"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as exit_:
        main()
    out, err = capsys.readouterr()
    assert exit_.value.code == 1
    assert "before" in out
    assert str(own_run / "checkpoints" / "step-2" / "policy") in out.replace("\n", "")
    assert err.startswith("error: the report was not written: ")
    assert f"grpo report {own_run}" in err
    assert "Traceback" not in err


def test_a_run_that_cannot_go_on_fails_and_names_the_command_that_goes_on(
    tiny_model_dir: Path, tmp_path: Path, grpo_here: InProcess
) -> None:
    recipe = write_recipe(tmp_path, tiny_model_dir, eval={"before": False, "after": False})
    silent = tmp_path / "silent"
    recipe.write_text(with_params(recipe, silent=str(silent)))
    silent.touch()
    code, stderr = grpo_here("train", str(recipe))
    run_dir = tmp_path / "runs" / "first"
    assert code == 1
    assert "error: step 1: objective vowels: 12 of 12 completions have no verdict" in stderr
    assert f"Saved after step 0; go on with: grpo train {run_dir} --resume" in stderr
    silent.unlink()
    code, stderr = grpo_here("train", str(run_dir), "--resume")
    assert code == 0, stderr
    assert [row["step"] for row in lines_of(run_dir / "metrics.jsonl")] == [1, 2]


def test_a_second_process_is_refused_and_a_second_ctrl_c_ends_the_first_at_once(
    tiny_model_dir: Path, tmp_path: Path, grpo_here: InProcess
) -> None:
    recipe = write_recipe(tmp_path, tiny_model_dir, steps=1000, eval={"before": False, "after": False})
    recipe.write_text(with_params(recipe, pause_s=4.0))
    run_dir = tmp_path / "runs" / "first"
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo", "train", str(recipe)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        while not process.stdout.readline().startswith("run directory"):  # the last fact before the first step
            assert process.poll() is None
        code, stderr = grpo_here("train", str(run_dir), "--resume")
        assert code == 2
        assert f"another process is running in {run_dir}" in stderr
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        process.stderr.readline()
        assert process.stderr.readline().startswith("finishing the current step or evaluation, then saving")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err == f"stopped at once. {run_dir}: no checkpoint yet; go on with: grpo train {run_dir} --resume\n"
    assert not (run_dir / "checkpoints").exists()


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGINT])
def test_a_signal_finishes_the_step_saves_exits_130_and_resume_goes_on(
    number: signal.Signals, tiny_model_dir: Path, tmp_path: Path, grpo_here: InProcess
) -> None:
    recipe = write_recipe(tmp_path, tiny_model_dir, steps=1000, eval={"before": False, "after": False})
    recipe.write_text(with_params(recipe, pause_s=0.1))
    run_dir = tmp_path / "runs" / "first"
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo", "train", str(recipe)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (run_dir / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    last = len(lines_of(run_dir / "metrics.jsonl"))
    assert 1 <= last < 1000
    assert f"interrupted after step {last}; go on with: grpo train {run_dir} --resume" in out.replace("\n", "")
    assert (run_dir / "checkpoints" / f"step-{last}" / "manifest.json").is_file()
    code, stderr = grpo_here("train", str(run_dir), f"steps={last + 1}", "--resume")
    assert code == 0, stderr
    assert [row["step"] for row in lines_of(run_dir / "metrics.jsonl")] == list(range(1, last + 2))
    assert len(lines_of(run_dir / "completions.jsonl")) == 24 * (last + 1)  # none lost, none twice
