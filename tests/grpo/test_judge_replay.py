"""A training run whose judge is an earlier run's audit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run_builders import Runs, lines_of, tensors_of, what_was_computed, write_rows

from judges.demo_server import serve

ROWS = [
    {
        "id": f"p{n}",
        "prompt": f"Anna and Omar waited. One of them forgot the keys. Who forgot the {n} keys?",
        "reference": "Anna",
        "objectives": ["short"],
    }
    for n in range(8)
]


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    made = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    made.prepare()
    return made


def judged(url: str, model: str = "demo-judge") -> dict[str, Any]:
    endpoint = {"url": url, "model": model}
    params = {"endpoint": endpoint, "rubric": "fairness", "attempts": 1, "backoff_s": 0.001}
    return {"rewards": [{"name": "judged", "params": params}], "beta": {"type": "fixed", "value": 0.05}}


def test_a_run_replayed_without_its_judge_has_every_verdict_to_the_bit(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(runs.folder / "train.jsonl", ROWS)
    changes: dict[str, Any] = {"steps": 3, "eval": {"before": True, "after": True, "num_prompts": 2}}
    with serve(error_rate=0.5, failure_rate=0.2) as server:
        monkeypatch.setenv("RUN_JUDGE_URL", server.url)
        first = runs.run("first", objectives={"short": judged("env:RUN_JUDGE_URL")}, **changes)
    monkeypatch.delenv("RUN_JUDGE_URL")  # the server is gone, and nobody could say where it was
    scoring = {"replay": "first/judge_audit.jsonl"}
    second = runs.run("second", objectives={"short": judged("env:RUN_JUDGE_URL")}, scoring=scoring, **changes)
    assert (second / "completions.jsonl").read_bytes() == (first / "completions.jsonl").read_bytes()
    assert what_was_computed(second) == what_was_computed(first)
    ours, theirs = tensors_of(second), tensors_of(first)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert (second / "eval.json").read_text() == (first / "eval.json").read_text()
    outcomes = {line["outcome"] for line in lines_of(first / "judge_audit.jsonl")}
    assert outcomes == {"scored", "unavailable"}  # both are replayed
    assert {line["origin"] for line in lines_of(second / "judge_audit.jsonl")} == {"replayed", None}
    steps = {line["step"] for line in lines_of(second / "judge_audit.jsonl")}
    assert steps == {None, 1, 2, 3}  # None: the evaluations


def test_a_replay_of_another_judge_says_so_before_the_first_step(runs: Runs) -> None:
    runs.check_refused(
        ["none.jsonl", "cannot be read"],
        objectives={"short": judged("http://127.0.0.1:9/v1"), "long": judged("http://127.0.0.1:9/v1")},
        scoring={"replay": "none.jsonl"},
    )
