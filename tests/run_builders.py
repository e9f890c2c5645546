"""Whole runs on the tiny model, for tests of the trainer: a recipe that can be changed, and what a run left."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from grpo.checkpoint import list_checkpoints
from grpo.cli import main
from grpo.config import RunConfig
from grpo.metrics import read_metrics
from grpo.recipe_loader import parse_recipe
from grpo.trainer import Trainer

ROWS = [{"id": f"p{n}", "prompt": f"Add {n} and 1.", "objectives": [("short", "long")[n % 2]]} for n in range(8)]
REWARDS = '''
"""Ten letters are best, or many vowels; completions of some prompts all score alike, or have no verdict."""


def letters(inputs, flat=(), missing=()):
    return [
        None if one.prompt_id in missing else 0.5 if one.prompt_id in flat else abs(len(one.completion) - 10) / -10
        for one in inputs
    ]


def vowels(inputs):
    return [sum(letter in "aeiou" for letter in one.completion) for one in inputs]
'''
MODULES = ("run_rewards", "run_losses", "run_processors", "run_broken", "run_unparsed")
"""What tests write beside a recipe; imported anew in every test."""


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_objective(*, flat: Sequence[str] = (), missing: Sequence[str] = (), **beta: Any) -> dict[str, Any]:
    """One objective. Args: flat: ids of prompts whose completions all score alike; missing: of those that get no
    verdict; beta: fixed where empty."""
    reward = {"name": "run_rewards:letters", "params": {"flat": list(flat), "missing": list(missing)}}
    return {"rewards": [reward], "beta": beta or {"type": "fixed", "value": 0.05}}


@dataclass(slots=True, kw_only=True)
class Notebook:
    """An observer that keeps what it is told, and does something after a step or at a note."""

    after: Mapping[int, Callable[[], object]] = field(default_factory=dict)
    at: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def start(self, title_rows: list[tuple[str, str]]) -> None:
        pass

    def step(self, row: Mapping[str, Any], *, total_steps: int, seconds_left: float | None) -> None:
        self.after.get(row["step"], list)()

    def note(self, text: str) -> None:
        self.notes.append(text)
        for part, do in self.at.items():
            if part in text:
                do()

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """A folder with a recipe's data, and the runs in it. Two objectives, each with prompts of its own."""

    model_dir: Path
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def prepare(self) -> None:
        """Write what recipes name. The import path and the modules on it are put back after the test."""
        (self.folder / "run_rewards.py").write_text(REWARDS)
        write_rows(self.folder / "train.jsonl", ROWS)
        self.forget_modules()

    def forget_modules(self) -> None:
        """As a new interpreter would be: without the recipe's folder and what was imported from it."""
        path = [entry for entry in sys.path if entry != str(self.folder.resolve())]
        self.monkeypatch.setattr(sys, "path", path)
        for name in MODULES:
            self.monkeypatch.delitem(sys.modules, name, raising=False)

    def recipe(self, name: str, **changes: Any) -> dict[str, Any]:
        """Whose run directory is called `name`."""
        return {
            "model": str(self.model_dir),
            "steps": 2,
            "output_dir": name,
            "device": "cpu",
            "dtype": "float32",  # in bfloat16, engine and trainer differ by its rounding
            "prompts": {"type": "file", "path": "train.jsonl", "held_out_path": "train.jsonl", "per_step": 2},
            "objectives": {"short": make_objective(), "long": make_objective()},
            "rollout": {"group_size": 4, "max_new_tokens": 8},
            "optim": {"learning_rate": 1e-2},
            "trainable": {"type": "lora", "rank": 2},
            "eval": {"before": False, "after": False, "num_prompts": 2},
            **changes,
        }

    def config(self, name: str, **changes: Any) -> RunConfig:
        """The same as a config."""
        return parse_recipe(self.recipe(name, **changes), base_dir=self.folder, source="recipe.yaml")

    def run(self, name: str, *, resume: bool = False, observer: Notebook | None = None, **changes: Any) -> Path:
        """Run it; gives the run directory."""
        return Trainer(self.config(name, **changes), observer=observer).run(resume=resume).run_dir

    def run_in_two_parts(self, *, steps: int = 3, first: int = 1, **changes: Any) -> Path:
        """A run that is ended after `first` steps and resumed must be the uninterrupted one, bit for bit; gives it."""
        whole = self.run("whole", steps=steps, **changes)
        self.run("resumed", steps=first, **changes)
        resumed = self.run("resumed", resume=True, steps=steps, **changes)
        ours, theirs = tensors_of(resumed), tensors_of(whole)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
        assert what_was_computed(resumed) == what_was_computed(whole)
        return whole

    def command(self, *arguments: str) -> tuple[int, str, str]:
        """`grpo ...` without a new interpreter: exit code, stdout and stderr."""
        self.forget_modules()
        self.monkeypatch.setattr(sys, "argv", ["grpo", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = self.capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    def write_recipe(self, name: str, **changes: Any) -> Path:
        """The recipe as a file."""
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe(name, **changes)))
        return path

    def check_refused(self, words: Sequence[str], **changes: Any) -> None:
        """The command ends with exit code 2 and one message with the words, and writes nothing."""
        recipe = self.write_recipe("refused", **changes)
        self.monkeypatch.setattr(sys, "dont_write_bytecode", True)
        before = sorted(self.folder.rglob("*"))
        code, stdout, stderr = self.command("train", str(recipe))
        assert (code, stdout) == (2, ""), stderr
        assert stderr.startswith("error: ")
        assert stderr.count("error: ") == 1
        assert "Traceback" not in stderr
        assert [word for word in words if word not in stderr] == [], stderr
        assert sorted(self.folder.rglob("*")) == before


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    return read_metrics(run_dir / "metrics.jsonl")


def completions_of(run_dir: Path) -> list[dict[str, Any]]:
    return lines_of(run_dir / "completions.jsonl")


def tensors_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint."""
    last = list_checkpoints(run_dir)[-1].folder
    return {
        f"{file.relative_to(last)}/{key}": tensor
        for file in sorted(last.rglob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }


def what_was_computed(run_dir: Path) -> dict[str, Any]:
    """All that a run left but its weights, without times, memory and what it cost to ask the judges."""
    last = list_checkpoints(run_dir)[-1].folder
    return {
        "state": json.loads((last / "state.json").read_text()),
        "metrics": [
            {name: value for name, value in row.items() if not name.startswith(("time/", "memory/", "judge/"))}
            for row in metrics_of(run_dir)
        ],
        "completions": completions_of(run_dir),
    }
