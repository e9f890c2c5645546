"""Claims about the recipe's penalties, bans and processors: they shape what is sampled, the trainer replays them, and
what cannot be is refused before the first step. The real command and the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_builders import Runs, completions_of, metrics_of

PROCESSORS = '''
"""A processor as a user writes one beside the recipe."""

import torch

from grpo.rollout.processors import Prefix


class NoUneven:
    """Makes tokens of uneven number less likely, more so as the completion grows."""

    def __init__(self, *, by: float) -> None:
        self._by = by

    def __call__(self, logits: torch.Tensor, prefix: Prefix) -> torch.Tensor:
        is_uneven = torch.arange(logits.shape[1], device=logits.device) % 2 == 1
        return logits - self._by * is_uneven * prefix.lengths[:, None]


class InPlace:
    def __call__(self, logits, prefix):
        return logits.add_(1.0)
'''


@pytest.fixture
def runs(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    runs = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    runs.prepare()
    (tmp_path / "run_processors.py").write_text(PROCESSORS)
    return runs


def rollout(**law: Any) -> dict[str, Any]:
    return {"group_size": 4, "max_new_tokens": 8, **law}


@pytest.mark.parametrize(
    "law",
    [
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "penalties_over": "both"},
        {"banned": ["e", "1 and"], "no_repeat_ngram": 1, "min_new_tokens": 3},
        {"processors": [{"path": "run_processors:NoUneven", "params": {"by": 0.5}}], "top_p": 0.9},
    ],
)
def test_the_trainer_replays_the_law_of_the_recipe_in_all_windows(law: dict[str, Any], runs: Runs) -> None:
    for row in metrics_of(runs.run("run", steps=2, rollout=rollout(**law))):
        assert row["sampler/ratio_p99"] == pytest.approx(1.0, abs=1e-4)
        assert row["sampler/kept_set_miss_frac"] == 0


def test_no_completion_holds_a_banned_text(runs: Runs) -> None:
    digits = [*"0123456789"]  # a token each, of this tokenizer

    def num_digits(name: str, **law: Any) -> int:
        lines = completions_of(runs.run(name, steps=1, rollout=rollout(group_size=8, max_new_tokens=32, **law)))
        return sum(line["completion"].count(digit) for line in lines for digit in digits)

    assert num_digits("banned", banned=digits) == 0
    assert num_digits("plain") > 0


@pytest.mark.parametrize(
    ("law", "words"),
    [
        ({"banned": ["a", ""]}, ["rollout.banned[1]", "empty text"]),
        ({"banned": ["<|im_end|>"]}, ["rollout.banned[0]", "is the end token"]),
        ({"processors": [{"path": "run_processors:Missing"}]}, ["run_processors:Missing", "holds nothing named"]),
        ({"processors": [{"path": "nowhere:Name"}]}, ["nowhere:Name", "No module named 'nowhere'"]),
        ({"processors": [{"path": "nowhere"}]}, ["rollout.processors", "path"]),
        (
            {"processors": [{"path": "run_processors:NoUneven", "params": {"amount": 1}}]},
            ["run_processors:NoUneven", "amount"],
        ),
        (
            {"processors": [{"path": "run_processors:NoUneven", "params": {"by": "much"}}]},
            ["run_processors:NoUneven", "fails on"],
        ),
        ({"processors": [{"path": "run_processors:InPlace"}]}, ["run_processors:InPlace", "changes the logits"]),
        ({"repetition_penalty": 0}, ["rollout.repetition_penalty"]),
        ({"penalties_over": "answer"}, ["rollout.penalties_over"]),
    ],
)
def test_a_law_that_cannot_be_is_refused_before_anything_is_written(
    law: dict[str, Any], words: list[str], runs: Runs
) -> None:
    runs.check_refused(words, rollout=rollout(**law))
