"""How much of the judges' time a real run hides behind sampling: the quickstart with a judge, over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RECIPE = Path(__file__).parents[2] / "grpo" / "recipes" / "quickstart-judged.yaml"

ROWS = 64
"""Completions of a step: 8 prompts of 8, half of them of each objective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One short run."""

    delay_s: float
    """Seconds that the judge takes for a verdict."""
    concurrency: int
    """Calls in flight, of both objectives together."""
    max_rows: int
    """Rows sampled side by side."""
    steps: int = 6


def measure_training(training: Training) -> dict[str, Any]:
    """Figures of the run's steps but the first, which warms up.

    "alone_s" is the least time that the step's judging takes by itself: 64 calls.
    """
    with tempfile.TemporaryDirectory() as folder, _demo_judge(training.delay_s) as url:
        recipe = yaml.safe_load(RECIPE.read_text())
        for objective in recipe["objectives"].values():
            params = objective["rewards"][0]["params"]
            params["endpoint"]["url"] = url
            params["concurrency"] = training.concurrency
        recipe |= {"steps": training.steps, "output_dir": f"{folder}/run", "checkpoint": {"every": 1000}}
        recipe["rollout"]["max_rows"] = training.max_rows
        recipe["eval"] |= {"before": False, "after": False}
        (Path(folder) / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "grpo", "train", f"{folder}/recipe.yaml"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    sums = {name: sum(row[f"time/{name}_s"] for row in rows) for name in ("rollout", "judge", "judge_wait", "step")}
    unscored = sum(row[f"reward/{o}/unscored_frac"] for row in rows for o in recipe["objectives"])
    return {
        "delay_s": training.delay_s,
        "concurrency": training.concurrency,
        "max_rows": training.max_rows,
        "steps": len(rows),
        **{f"{name}_s": total / len(rows) for name, total in sums.items()},
        "turns": ROWS // training.max_rows,
        "alone_s": ROWS / training.concurrency * training.delay_s,
        "hidden": 1.0 - sums["judge_wait"] / sums["judge"],
        "unscored": unscored,
    }


@contextmanager
def _demo_judge(delay_s: float) -> Iterator[str]:
    command = [sys.executable, "-m", "judges.demo_server", "--port", "0", "--delay-s", str(delay_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError("the demo judge did not start")
        try:
            yield url
        finally:
            process.terminate()
