"""`grpo score`: a file of completions is scored as a training step would score it, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
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
    cause = "run_rewards:letters: the reward gave no value and no reason"
    assert json.loads(figures.read_text()) == {"short": {"n": 0, "unscored": 1, "causes": {cause: 1}}}
    assert f"The commonest reason: {cause}" in stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no completion"),
        ('{"prompt": "x"}\n', "row 1 has no text in column 'completion'; it has ['prompt']"),
        ('{"prompt": 3, "completion": "y"}\n', "row 1 has no text in column 'prompt', nor messages"),
        ('{"prompt": [{"role": "assistant", "content": "z"}], "completion": "y"}\n', "nor messages that end with the"),
        ('{"prompt": "x", "completion": "y", "num_tokens": "many"}\n', "num_tokens is 'many'; expected a whole number"),
        ('{"prompt": "x", "completion": "y", "objectives": 3}\n', "asks for objectives 3; the recipe has"),
        (
            '{"prompt_id": 1, "prompt": "x", "completion": "y"}\n{"prompt_id": 1, "prompt": "z", "completion": "y"}\n',
            "rows 1 and 2 have one prompt_id, '1', but different values in column 'prompt'",
        ),
        ('{"prompt": "x", "completion": "y", "objectives": ["other"]}\n', "the recipe has ['long', 'short']"),
        ("prompt,completion\nWho?,Anna\n", "line 1: Expecting value"),
        ("nonsense\n", "A file of comma-separated values has a name that ends in .csv."),
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,completion\n", "holds no completion. Expected JSON lines or CSV"),
        ("question,answer\nWho?,Anna\n", "row 1 has no text in column 'completion'; it has ['answer', 'question']"),
        ("prompt,completion\nWho?,Anna, and Ben\n", "row 1 has more cells than the header. Quote cells"),
        (b"prompt,completion\nWho?,\xff\n", "cannot be read as UTF-8 text"),
        ('prompt,completion\nWho?,"' + "x" * 200_000 + '"\n', "field larger than field limit"),
    ],
)
def test_a_csv_that_cannot_be_scored_is_bad_input(runs: Runs, text: str | bytes, words: str) -> None:
    file = runs.folder / "bad.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, stdout, stderr, lines = scored(runs, file)
    assert (code, stdout, lines) == (2, "", [])
    assert words in stderr


def test_a_file_that_is_not_there_or_is_a_folder_is_bad_input(runs: Runs) -> None:
    for name in ("nowhere.jsonl", "nowhere.csv", "."):
        code, stdout, stderr, _ = scored(runs, runs.folder / name)
        assert (code, stdout) == (2, ""), name
        assert str(runs.folder) in stderr
        assert "Traceback" not in stderr


RIGHT = {"right": {"rewards": [{"name": "exact_match"}]}}


def score_by_objectives(runs: Runs, objectives: dict[str, Any], file: Path) -> list[Any]:
    """The verdicts of a recipe that holds objectives and nothing else."""
    recipe, out = runs.folder / "objectives.yaml", runs.folder / "scored.jsonl"
    recipe.write_text(yaml.safe_dump({"objectives": objectives}))
    code, _, stderr = runs.command("score", str(recipe), str(file), "--out", str(out))
    assert (code, stderr) == (0, "")
    (name,) = objectives
    return [line["verdicts"][name]["value"] for line in lines_of(out)]


def test_a_recipe_of_objectives_alone_scores_a_csv_as_a_spreadsheet_saves_it(runs: Runs) -> None:
    file = runs.folder / "own.csv"
    rows = ["prompt,completion,reference", 'Who?,"Anna.",Anna', "Who?,,Anna", '"Who, and when?","Ben\n",Anna']
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    assert score_by_objectives(runs, RIGHT, file) == [1.0, 0.0, 0.0]


def test_a_json_list_is_scored_as_json_lines_are(runs: Runs) -> None:
    rows = [{"prompt": "Who?", "completion": text, "reference": "Anna"} for text in ("Ben", "Anna")]
    file = runs.folder / "own.json"
    file.write_text(json.dumps(rows, indent=1))
    assert score_by_objectives(runs, RIGHT, file) == [0.0, 1.0]
    write_rows(file, rows)  # HaluEval's .json files are JSON lines
    assert score_by_objectives(runs, RIGHT, file) == [0.0, 1.0]


def test_what_training_needs_is_still_asked_for_by_training(runs: Runs) -> None:
    recipe = runs.folder / "objectives.yaml"
    recipe.write_text(yaml.safe_dump({"objectives": RIGHT}))
    code, _, stderr = runs.command("train", str(recipe))
    assert code == 2
    for key in ("model", "steps", "prompts", "optim", "objectives.right.beta"):
        assert f"{key} is missing" in stderr
    recipe.write_text(yaml.safe_dump({"objective": RIGHT}))
    code, _, stderr = runs.command("score", str(recipe), str(recipe))
    assert code == 2
    assert "objectives is missing" in stderr
    assert "unknown key objective; did you mean objectives?" in stderr


def test_rows_of_one_prompt_with_other_references_are_scored_by_their_own(runs: Runs) -> None:
    file = runs.folder / "own.jsonl"
    rows = [
        {"prompt": "Add.", "completion": "2", "reference": "2"},
        {"prompt": "Add.", "completion": "3", "reference": 3},  # a number stands for its text
        {"prompt": "Add.", "completion": "2", "reference": "3"},
        {"prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Add."}], "completion": "2"}
        | {"reference": "2"},
    ]
    write_rows(file, rows)
    assert score_by_objectives(runs, RIGHT, file) == [1.0, 1.0, 0.0, 1.0]


def test_rows_of_one_prompt_id_are_one_group_and_what_differs_among_them_is_no_prompts(runs: Runs) -> None:
    (runs.folder / "run_rewards.py").write_text(
        "def group(inputs):\n"
        "    return [100.0 * len(inputs) + 10 * len(one.meta) + len(one.messages) for one in inputs]\n"
    )
    file = runs.folder / "own.jsonl"
    turns = [{"role": "user", "content": text} for text in ("Hello", "Add.")]
    rows = [{"prompt_id": 7, "prompt": turns, "completion": "x", "kind": "sum", "rater": name} for name in "abc"]
    write_rows(file, [*rows, {"prompt": "Add.", "completion": "x"}])
    objectives = {"size": {"rewards": [{"name": "run_rewards:group"}]}}
    assert score_by_objectives(runs, objectives, file) == [312.0, 312.0, 312.0, 101.0]  # meta: the kind alone


PLUGIN = """
def polite(inputs):
    return [float("please" in one.completion.lower()) for one in inputs]

async def brief(inputs, *, most=3):
    return [float(len(one.completion.split()) <= most) for one in inputs]

def made_for_trl(completions, reference, **kwargs):
    return [float(said[0]["content"] == right) for said, right in zip(completions, reference)]
"""


def test_a_reward_of_ones_own_is_named_by_module_by_an_installed_entry_point_or_as_trls(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = runs.folder / "site-packages"
    info = site / "polite_rewards-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "run_broken.py").write_text(PLUGIN)  # a module that the fixture forgets again
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: polite-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[grpo.rewards]\npolite = run_broken:polite\nbrief = run_broken:brief\n")
    monkeypatch.syspath_prepend(str(site))
    (runs.folder / "run_rewards.py").write_text(PLUGIN)
    file = runs.folder / "own.jsonl"
    texts = ["Please sit.", "Sit", "Would you be so kind"]
    write_rows(file, [{"prompt": "Ask.", "completion": text, "reference": "Sit"} for text in texts])

    def values(name: str, **params: Any) -> list[Any]:
        return score_by_objectives(runs, {"own": {"rewards": [{"name": name, "params": params}]}}, file)

    assert values("polite") == values("run_rewards:polite") == [1.0, 0.0, 0.0]
    assert values("brief") == values("run_rewards:brief") == [1.0, 1.0, 0.0]
    assert values("brief", most=1) == [0.0, 1.0, 0.0]
    assert values("trl:run_rewards:made_for_trl") == [0.0, 1.0, 0.0]
    code, _, stderr = runs.command(
        "score", str(runs.folder / "objectives.yaml"), str(file), "objectives.own.rewards=[{name: polit}]"
    )
    assert code == 2
    assert "there is no reward 'polit' (did you mean 'polite'?)" in stderr
    assert "Installed: brief, polite" in stderr
