"""`grpo verify`: a table with a verdict, JSON, exit codes, and nothing on the disk but what was asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from run_builders import Runs

FLAT = {"flat": [f"p{n}" for n in range(8)]}
"""Every prompt's completions score alike."""


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    runs = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    runs.prepare()
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.setenv("COLUMNS", "160")
    return runs


def contents(*folders: Path) -> dict[str, str]:
    """Path -> hash of every file."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_sound_recipe_passes_and_nothing_on_the_disk_changes(runs: Runs) -> None:
    recipe = runs.write_recipe("run")
    before = contents(runs.folder, runs.model_dir)
    code, stdout, stderr = runs.command("verify", str(recipe))
    assert code == 0, stdout + stderr
    assert contents(runs.folder, runs.model_dir) == before
    assert not (runs.folder / "run").exists()
    for check in ("gradient flow", "scope", "accumulation", "it learns", "numbers", "engine and trainer", "signal"):
        assert check in stdout
    assert "gradient in 28 of 28 tensors" in stdout
    assert "failed" not in stdout
    last = stdout.strip().splitlines()[-1]
    assert last.startswith(("All is well.", "Nothing stands in the way"))


def test_a_recipe_without_signal_fails_with_a_remedy_and_as_json(runs: Runs, tmp_path: Path) -> None:
    reward = {"name": "run_rewards:letters", "params": FLAT}
    objective = {"rewards": [reward], "beta": {"type": "fixed", "value": 0.05}}
    recipe = runs.write_recipe(
        "run",
        objectives={"short": objective, "long": objective},
        rollout={"group_size": 8, "max_new_tokens": 4},
    )
    file = tmp_path / "findings.json"
    code, stdout, _ = runs.command("verify", str(recipe), "--json", str(file))
    assert code == 1
    assert stdout.strip().splitlines()[-1].startswith("Not ready.")
    result = json.loads(file.read_text())
    assert result["verdict"] == "failed"
    failed = [finding for finding in result["findings"] if finding["status"] == "failed"]
    assert [finding["check"] for finding in failed] == ["signal", "signal"]
    assert failed[0]["what"].startswith("long: mean 0.50, spread within a group 0.00; 4 of 4 groups without any")
    assert "rollout.temperature" in failed[0]["remedy"]
    assert "made-up scores" in stdout  # what can be looked at without a signal is looked at all the same


@pytest.mark.slow
def test_every_objective_is_looked_at_whatever_the_first_step_asks_for(runs: Runs) -> None:
    _, stdout, _ = runs.command("verify", str(runs.write_recipe("run")), "--prompts", "2")
    assert "short: mean" in stdout
    assert "long: mean" in stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-recipe"], "no recipe is called 'no-such-recipe'"),
        (["quickstart", "stpes=3"], "unknown key stpes"),
        (["quickstart", "--json", "nowhere/findings.json"], "its folder does not exist"),
    ],
)
def test_bad_input_is_told_before_the_model_is_read(arguments: list[str], words: str, runs: Runs) -> None:
    code, stdout, stderr = runs.command("verify", *arguments)
    assert (code, stdout) == (2, "")
    assert words in stderr


@pytest.mark.slow
def test_the_quickstart_passes_on_its_real_model(smollm_dir: Path, runs: Runs) -> None:
    assert smollm_dir.is_dir()
    code, stdout, stderr = runs.command("verify", "quickstart", "--prompts", "4")
    assert code == 0, stdout + stderr
    assert "trainable 4,884,480 = 3.5%; base frozen: yes; model.layers: gradient in 420 of 420 tensors" in stdout
