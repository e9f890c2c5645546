"""The run that is killed: two objectives, one of them judged, betas that move, a learning rate that falls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from kill_harness.counting_judge import CountingJudge

from judges.config import PriceConfig

CONCURRENCY = 4
"""Calls that may be in flight at a kill."""
JUDGE_DELAY_S = 0.02
PRICE = PriceConfig(input=1.0, output=2.0)


def write_recipe(
    folder: Path,
    model: Path,
    judge: CountingJudge,
    *,
    steps: int = 4,
    full: bool = False,
    cap: float = 1.0,
    **changes: Any,
) -> Path:
    """Groups that teach nothing are sampled again; evaluations before and after.

    Args:
        full: all weights learn, instead of an adapter.
        cap: on what the judge may cost in the run, by `PRICE`; the default is out of reach.
        changes: keys of the recipe that are to be others.
    """
    endpoint = {"url": judge.url, "model": "demo-judge", "price": PRICE.model_dump()}
    judged = {"endpoint": endpoint, "rubric": "fairness", "concurrency": CONCURRENCY, "budget": {"per_run": cap}}
    length = {"name": "length", "params": {"target_tokens": 2, "limit_tokens": 8}}
    beta = {"type": "band", "initial": 0.05, "low": 0.001, "high": 0.01}
    recipe = {
        "model": str(model),
        "steps": steps,
        "output_dir": "run",
        "device": "cpu",
        "prompts": {"type": "file", "path": "train.jsonl", "held_out_path": "test.jsonl", "per_step": 2},
        "objectives": {
            "fair": {"rewards": [{"name": "judged", "params": judged}, length], "beta": beta},
            "short": {"rewards": [length], "beta": beta},
        },
        "rollout": {"group_size": 4, "max_new_tokens": 8, "resample_rounds": 1},
        "optim": {"learning_rate": 1e-2, "schedule": "linear"},
        "trainable": {"type": "full"} if full else {"type": "lora", "rank": 2},
        "eval": {"num_prompts": 2},
        "checkpoint": {"every": 2, "keep": 1},
        **changes,
    }
    for name, first, count in (("train", 0, 7), ("test", 100, 4)):
        rows = [
            {"id": f"p{n}", "prompt": f"Who is {n}?", "reference": "Ann", "objectives": ["fair", "short"][: 1 + n % 2]}
            for n in range(first, first + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
