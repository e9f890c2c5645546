"""A run of `grpo.trainer.Trainer` that stops for a signal before every step."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer_race.pacing import Pace
from trainer_race.task import ALPHA, BETA, LEARNING_RATE, MODEL, RANK, Case, StepFigures

from grpo.config import RunConfig
from grpo.trainer import Trainer


def train(case: Case, prompts: Sequence[str], pace: Pace) -> None:
    """case.steps steps."""
    with tempfile.TemporaryDirectory(prefix="grpo-vs-trl-") as name:
        folder = Path(name)
        rows = [{"prompt": text, "objectives": ["digits"]} for text in prompts]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = RunConfig.model_validate(
            {
                "model": MODEL,
                "steps": case.steps,
                "output_dir": folder / "run",
                "base_dir": folder,
                "prompts": {"type": "file", "path": folder / "train.jsonl", "per_step": case.prompts},
                "objectives": {
                    "digits": {
                        "rewards": [{"name": "trl:trainer_race.task:digit_share"}],
                        "beta": {"type": "fixed", "value": BETA},
                    }
                },
                "rollout": {
                    "group_size": case.group_size,
                    "temperature": 1.0,
                    "max_new_tokens": case.new_tokens,
                },
                "update": {
                    "loss": {"type": "dapo"},
                    "kl": {"estimator": "k3", "kl_correction": "ratio"},
                    "micro_batch_tokens": case.micro_batch_tokens,
                },
                "optim": {"learning_rate": LEARNING_RATE, "schedule": "constant"},
                "trainable": {"type": "lora", "rank": RANK, "alpha": ALPHA},
                "eval": {"before": False, "after": False},
                "checkpoint": {"every": 10_000},
            }
        )
        Trainer(config, observer=PacedObserver(pace)).run()


class PacedObserver:
    """Waits for the signal where a step has ended."""

    def __init__(self, pace: Pace) -> None:
        self._pace, self._start = pace, 0.0

    def start(self, title_rows: list[tuple[str, str]]) -> None:
        """Before the first step."""
        self._pace.wait()
        self._start = time.perf_counter()

    def step(self, row: Mapping[str, Any], *, total_steps: int, seconds_left: float | None) -> None:
        """After each."""
        figures = StepFigures(
            step_s=time.perf_counter() - self._start,
            rollout_s=row["time/rollout_s"],
            scoring_s=row["time/judge_wait_s"],  # what sampling did not hide
            tokens=row["tokens/completion"],
            reward=row["reward/digits/mean"],
        )
        self._pace.done(figures)
        if row["step"] < total_steps:
            self._pace.wait()
        self._start = time.perf_counter()

    def note(self, text: str) -> None:
        """Nothing to show."""

    def warn(self, text: str) -> None:
        """Nothing to show."""
