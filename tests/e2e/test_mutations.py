"""The two classic accumulation failures, put into the shipped accumulator: the ordinary suite must notice each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
ADDS = "window_sum.add_(gradient)"
MUTATIONS = {
    "none": (ADDS, ADDS),
    "copy instead of add": (ADDS, "window_sum.copy_(gradient)"),
    "zeroed inside the loop": (
        "        gradients = torch.autograd.grad(",
        "        self.start_window()\n        gradients = torch.autograd.grad(",
    ),
    "never zeroed": ("parameter.grad = torch.zeros_like(parameter)", "parameter.grad = parameter.grad"),
    "averaged": (ADDS, "window_sum.add_(gradient, alpha=0.5)"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_ordinary_suite_fails_on_a_broken_accumulator(name: str, tmp_path: Path) -> None:
    old, new = MUTATIONS[name]
    for package in ("grpo", "rewards", "judges"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("tests", "benchmarks"):  # the latter for its models
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    target = tmp_path / "grpo" / "update" / "gradients.py"
    source = target.read_text()
    assert source.count(old) == 1  # the mutation hits what it means to
    target.write_text(source.replace(old, new))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/grpo/test_update_step.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == (0 if name == "none" else 1), done.stdout[-3000:]
    if name != "none":
        assert "1 failed" in done.stdout
