"""A run that several processes share: five prompts, two objectives; and what two such runs must have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_builders import lines_of
from safetensors.torch import load_file

from grpo.checkpoint import list_checkpoints

TOPICS = [
    "Add 1 and 1.",
    "What is the capital of France?",
    "Say it.",
    "Add the numbers 1, 2 and 3 for me, please.",
    "?",
]
ROWS = [
    {"id": f"p{n}", "prompt": text, "objectives": [["short", "vowels"], ["short"], ["vowels"]][n % 3]}
    for n, text in enumerate(TOPICS)
]
REWARD = '''
"""The share of vowels; fails on one prompt where it is told to, may take its time, and may write down its rank."""

import os
import time


def vowels(inputs, fails_at="", pause_s=0.0, seen=""):
    time.sleep(pause_s)
    if seen:
        with open("{0}-{RANK}-of-{WORLD_SIZE}".format(seen, **os.environ), "w"):
            pass
    if any(fails_at and one.prompt_id == fails_at for one in inputs):
        raise ValueError(f"no idea about {fails_at}")
    return [sum(letter in "aeiou" for letter in one.completion) / max(len(one.completion), 1) for one in inputs]
'''


def recipe_of(folder: Path, model_dir: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Five prompts of different lengths, three a step: the first rank has two of them, and never the same."""
    folder.mkdir(exist_ok=True)
    (folder / "rank_test_rewards.py").write_text(REWARD)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "warmup.jsonl").write_text("".join(json.dumps({**row, "completion": "Yes."}) + "\n" for row in ROWS[:4]))
    params = changes.pop("reward", {})
    return {
        "model": str(model_dir),
        "steps": 3,
        "output_dir": name,
        "device": "auto",
        "dtype": "float32",
        "prompts": {"type": "file", "path": "data.jsonl", "held_out_path": "data.jsonl", "per_step": 3},
        "objectives": {
            "short": {
                "rewards": [{"name": "length", "params": {"target_tokens": 2, "limit_tokens": 8}}],
                "beta": {"type": "band", "low": 0.01, "high": 0.1},
            },
            "vowels": {
                "rewards": [{"name": "rank_test_rewards:vowels", "params": params}],
                "beta": {"type": "fixed", "value": 0.05},
            },
        },
        "rollout": {"group_size": 4, "max_new_tokens": 8},
        "optim": {"learning_rate": 1e-2},
        "trainable": {"type": "lora", "rank": 2},
        "eval": {"num_prompts": 3},
        "checkpoint": {"every": 2},
        **changes,
    }


def check_same(ours: Path, theirs: Path) -> None:
    """All that two runs computed and wrote; times and memory aside."""
    here, there = (list_checkpoints(run)[-1] for run in (ours, theirs))
    assert here.step == there.step
    for name in ("policy/adapter_model.safetensors", "optimizer.safetensors"):
        mine, other = (load_file(each.folder / name) for each in (here, there))
        assert mine.keys() == other.keys()
        for key, tensor in mine.items():
            torch.testing.assert_close(
                tensor, other[key], rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
    rows, other_rows = (lines_of(run / "metrics.jsonl") for run in (ours, theirs))
    assert len(rows) == len(other_rows)
    for row, other_row in zip(rows, other_rows, strict=True):
        assert row.keys() == other_row.keys()
        for key, value in row.items():
            if not key.startswith(("time/", "memory/")):
                assert value == pytest.approx(other_row[key], rel=1e-4, abs=1e-6), f"{key} in step {row['step']}"
    for mine, other in zip(*(lines_of(run / "completions.jsonl") for run in (ours, theirs)), strict=True):
        assert mine.pop("advantage") == pytest.approx(other.pop("advantage"), abs=1e-6)
        assert mine == other
    answers, others = (
        lines_of(run / "evaluations.jsonl") if (run / "evaluations.jsonl").exists() else [] for run in (ours, theirs)
    )
    assert answers == others
    assert json.loads((ours / "eval.json").read_text()) == json.loads((theirs / "eval.json").read_text())
