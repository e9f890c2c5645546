"""`grpo score`: a file of completions is scored as a training step would score it, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_builders import Runs, completions_of, lines_of, make_objective, write_rows


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    place = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    place.prepare()
    return place


def scored(runs: Runs, file: Path, *arguments: str, **changes: Any) -> tuple[int, str, str, list[dict[str, Any]]]:
    out = runs.folder / "scored.jsonl"
    recipe = runs.write_recipe("unused", **changes)
    code, stdout, stderr = runs.command("score", str(recipe), str(file), "--out", str(out), *arguments)
    return code, stdout, stderr, lines_of(out) if out.exists() else []


def test_a_runs_own_completions_get_the_verdicts_that_they_had(runs: Runs) -> None:
    run_dir = runs.run("run", steps=2)
    code, stdout, stderr, lines = scored(runs, run_dir / "completions.jsonl")
    assert (code, stderr) == (0, "")
    assert [line["verdicts"] for line in lines] == [line["verdicts"] for line in completions_of(run_dir)]
    assert "short" in stdout
    assert not (runs.folder / "unused").exists()


def test_a_file_of_ones_own_needs_only_prompt_and_completion(runs: Runs) -> None:
    file = runs.folder / "own.jsonl"
    write_rows(file, [{"prompt": "Say ten letters.", "completion": "x" * n} for n in (10, 20)])
    code, _, stderr, lines = scored(runs, file)
    assert (code, stderr) == (0, "")
    assert [line["verdicts"]["short"]["value"] for line in lines] == [0.0, -1.0]
    assert [line["verdicts"]["long"]["value"] for line in lines] == [0.0, -1.0]  # no column says otherwise: both


def test_columns_of_a_line_reach_the_rewards(runs: Runs) -> None:
    file = runs.folder / "own.jsonl"
    row = {"prompt": "Who?", "completion": "It was Anna.", "reference": "Anna", "choices": ["Anna", "Ben"]}
    write_rows(file, [row, {**row, "completion": "Ben"}])
    choice = {"rewards": [{"name": "choice"}], "beta": {"type": "fixed", "value": 0.05}}
    _, _, _, lines = scored(runs, file, objectives={"right": choice})
    assert [line["verdicts"]["right"]["value"] for line in lines] == [1.0, 0.0]


def test_the_means_are_written_with_intervals_and_kinds(runs: Runs) -> None:
    file, figures = runs.folder / "own.jsonl", runs.folder / "means.json"
    rows = [{"prompt": str(n), "completion": "x" * (10 + n), "kind": "odd" if n % 2 else "even"} for n in range(4)]
    write_rows(file, rows)
    assert scored(runs, file, "--json", str(figures))[0] == 0
    short = json.loads(figures.read_text())["short"]
    assert (short["n"], short["unscored"]) == (4, 0)
    assert short["mean"] == pytest.approx(-0.15)  # of 0, -0.1, -0.2, -0.3
    assert short["kinds"] == pytest.approx({"even": -0.1, "odd": -0.2})
    assert short["low"] <= short["mean"] <= short["high"]


def test_verdicts_that_are_missing_stay_missing_and_too_many_of_them_are_a_failure(runs: Runs) -> None:
    file, figures = runs.folder / "own.jsonl", runs.folder / "means.json"
    write_rows(file, [{"prompt": "x", "prompt_id": "p", "completion": "x", "objectives": ["short"]}])
    objectives = {"short": make_objective(missing=["p"]), "long": make_objective()}
    code, _, stderr, lines = scored(runs, file, "--json", str(figures), objectives=objectives)
    assert code == 1
    assert "objective short: 1 of 1 completions have no verdict" in stderr
    assert lines[0]["verdicts"]["short"]["value"] is None
    assert json.loads(figures.read_text()) == {"short": {"n": 0, "unscored": 1}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no completion"),
        ('{"prompt": "x"}\n', "line 1 has no text in column 'completion'"),
        ('{"prompt": "x", "completion": "y", "objectives": ["other"]}\n', "the recipe has ['long', 'short']"),
        ("nonsense\n", "line 1"),
    ],
)
def test_a_file_that_cannot_be_scored_is_bad_input(runs: Runs, text: str, words: str) -> None:
    file = runs.folder / "bad.jsonl"
    file.write_text(text)
    code, stdout, stderr, lines = scored(runs, file)
    assert (code, stdout, lines) == (2, "", [])
    assert words in stderr


def test_a_place_to_write_that_is_not_there_is_found_before_anything_is_scored(runs: Runs) -> None:
    file = runs.folder / "own.jsonl"
    write_rows(file, [{"prompt": "x", "completion": "x"}])
    code, _, stderr, _ = scored(runs, file, "--json", str(runs.folder / "nowhere" / "means.json"))
    assert code == 2
    assert "its folder does not exist" in stderr
