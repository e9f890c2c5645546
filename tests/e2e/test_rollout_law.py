"""Claims about the recipe's penalties, bans, processors and engine: the law shapes what is sampled, the trainer replays
it, and what cannot be is refused before the first step. The real command and the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_builders import Runs, completions_of, metrics_of
from vllm_double import VllmDouble
from vllm_package import announce_version, put_in_place
from vllm_server_builders import Bench

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
        ({"repetition_over": "answer"}, ["rollout.repetition_over"]),
        ({"presence_penalty": 2.5}, ["rollout.presence_penalty"]),
        ({"frequency_penalty": "much"}, ["rollout.frequency_penalty"]),
        ({"no_repeat_ngram": -1}, ["rollout.no_repeat_ngram"]),
        ({"min_new_tokens": 8}, ["min_new_tokens = 8", "max_new_tokens = 8", "set it lower"]),
        ({"top_p": 0}, ["rollout.top_p"]),
        ({"top_k": -1}, ["rollout.top_k"]),
        ({"min_p": 1}, ["rollout.min_p"]),
    ],
)
def test_a_law_that_cannot_be_is_refused_before_anything_is_written(
    law: dict[str, Any], words: list[str], runs: Runs
) -> None:
    runs.check_refused(words, rollout=rollout(**law))


def test_a_vllm_that_is_too_old_is_refused_with_the_version_it_needs_and_the_extra(
    runs: Runs, tmp_path_factory: pytest.TempPathFactory
) -> None:
    announce_version(tmp_path_factory.mktemp("site"), runs.monkeypatch, "0.17.1")
    words = ["vLLM 0.17.1 is installed", "needs 0.18 or newer", "grpo-toolkit[vllm]", "scripts/install_vllm_cpu.sh"]
    runs.check_refused(words, rollout=rollout(engine={"type": "vllm"}))


def test_a_context_of_vllm_that_is_too_short_for_prompt_and_completion_is_refused(
    runs: Runs, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The model's own context is long enough: only vLLM's was cut."""
    llms = put_in_place(tmp_path_factory.mktemp("site"), runs.monkeypatch)
    words = ["a prompt of", "rollout.max_new_tokens = 8 exceed the 24 tokens", "rollout.engine.max_model_len higher"]
    runs.check_refused(words, rollout=rollout(engine={"type": "vllm", "max_model_len": 24}))
    (llm,) = llms.built
    assert llm.done == []  # neither synced nor sampled from


def test_a_server_that_serves_another_model_is_refused(runs: Runs) -> None:
    with VllmDouble(Bench.of(runs.model_dir).facts) as server:
        server.facts["shape"] = {**server.facts["shape"], "hidden_size": 4096}
        engine = {"type": "vllm_server", "urls": [server.url]}
        runs.check_refused(
            [server.url, "another model than the recipe's", "hidden_size 4096"], rollout=rollout(engine=engine)
        )
