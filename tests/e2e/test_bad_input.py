"""Bad input: exit code 2, one clear message, nothing written. The real command; most runs share a process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.cli import main

ROWS = [{"id": f"row-{n}", "prompt": f"Add {n} and 1.", "reference": str(n + 1)} for n in range(4)]


def make_recipe(model_dir: Path) -> dict[str, Any]:
    """A recipe that trains: every case below changes one thing of it."""
    length = {"name": "length", "params": {"target_tokens": 4, "limit_tokens": 8}}
    return {
        "model": str(model_dir),
        "steps": 1,
        "output_dir": "run",
        "device": "cpu",
        "prompts": {"type": "file", "path": "data.jsonl", "held_out_path": "test.jsonl", "per_step": 2},
        "objectives": {
            "brevity": {"rewards": [length], "beta": {"type": "band", "low": 0.01, "high": 0.1}},
        },
        "rollout": {"group_size": 2, "max_new_tokens": 8},
        "optim": {"learning_rate": 1e-3},
        "trainable": {"type": "lora", "rank": 2},
        "eval": {"before": False, "after": False},
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """A folder with a recipe and its data, all as it should be."""

    folder: Path
    recipe: dict[str, Any]

    @property
    def recipe_path(self) -> Path:
        return self.folder / "recipe.yaml"

    def write(self) -> None:
        self.recipe_path.write_text(yaml.safe_dump(self.recipe))

    def listing(self) -> dict[str, tuple[int, int]]:
        """Every file and folder, with size and time of the last change."""
        return {
            str(path.relative_to(self.folder)): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(self.folder.rglob("*"))
        }


@pytest.fixture
def workplace(tmp_path: Path, tiny_model_dir: Path) -> Workplace:
    place = Workplace(folder=tmp_path, recipe=make_recipe(tiny_model_dir))
    write_rows(tmp_path / "data.jsonl", ROWS)
    write_rows(tmp_path / "test.jsonl", ROWS)
    return place


def run_in_process(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """`grpo ...` without a new interpreter: exit code and stderr."""
    monkeypatch.setattr(sys, "argv", ["grpo", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0), capsys.readouterr().err


def free_port() -> int:
    """A loopback port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- what is wrong, and what must be said of it

Change = Callable[[Workplace], None]


def overrides(*pairs: str) -> Change:
    """Mistakes in the recipe itself: `dotted.key=YAML` written into the file."""

    def change(place: Workplace) -> None:
        for pair in pairs:
            key, _, text = pair.partition("=")
            *parents, last = key.split(".")
            section = place.recipe
            for parent in parents:
                section = section[parent]
            section[last] = yaml.safe_load(text)

    return change


def data(rows: list[dict[str, Any]], name: str = "data.jsonl") -> Change:
    return lambda place: write_rows(place.folder / name, rows)


def model_without(*names: str) -> Change:
    """A copy of the model folder in which some files are missing."""

    def change(place: Workplace) -> None:
        folder = place.folder / "model"
        shutil.copytree(place.recipe["model"], folder)
        for name in names:
            (folder / name).unlink()
        place.recipe["model"] = "model"

    return change


def model_cut_short(place: Workplace) -> None:
    model_without()(place)
    weights = place.folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def run_directory_exists(place: Workplace) -> None:
    (place.folder / "run").mkdir()
    (place.folder / "run" / "precious.txt").write_text("mine")


def run_directory_below_a_file(place: Workplace) -> None:
    (place.folder / "file").write_text("mine")
    place.recipe["output_dir"] = "file/run"


def judge_that_is_not_there(place: Workplace) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    params = {"endpoint": {"url": url, "model": "judge"}, "rubric": "fairness"}
    place.recipe["objectives"]["brevity"]["rewards"] = [{"name": "judged", "params": params}]


LONG = "word " * 300
"""Longer than the tiny model's context of 256 tokens."""

CASES: dict[str, tuple[Change, list[str]]] = {
    "unknown key": (
        overrides("rollout.group_sze=4"),
        ["unknown key rollout.group_sze", "did you mean rollout.group_size?"],
    ),
    "wrong type": (overrides("steps=many"), ["steps is 'many'; expected a whole number"]),
    "group_size 1": (
        overrides("rollout.group_size=1"),
        ["rollout.group_size is 1", "at least 2 completions per prompt"],
    ),
    "temperature 0": (overrides("rollout.temperature=0"), ["rollout.temperature is 0", "set it above 0"]),
    "missing dataset": (overrides("prompts.path=gone.jsonl"), ["no dataset at {folder}/gone.jsonl"]),
    "missing held-out dataset": (overrides("prompts.held_out_path=gone.jsonl"), ["no dataset at {folder}/gone.jsonl"]),
    "empty dataset": (data([]), ["{folder}/data.jsonl is empty: it holds no prompt"]),
    "dataset without a prompt column": (
        data([{"question": "Who?", "reference": "Anna"}] * 2),
        ["{folder}/data.jsonl row 1 has no column 'prompt'", "['question', 'reference']", "prompts.prompt_column"],
    ),
    "more prompts a step than there are": (
        overrides("prompts.per_step=5"),
        ["prompts.per_step is 5, but the dataset has 4 prompts"],
    ),
    "no held-out prompts to evaluate": (
        overrides("eval.before=true", "prompts.held_out_path=null"),
        ["there are no held-out prompts", "prompts.held_out_path", "eval.before=false"],
    ),
    "unknown task": (
        overrides("prompts={type: tasks, names: [fairnes]}"),
        ["fairnes", "fairness"],
    ),
    "unknown reward": (
        overrides("objectives.brevity.rewards=[{name: lenght}]"),
        ["objectives.brevity", "there is no reward 'lenght'", "'length'"],
    ),
    "unknown parameter of a reward": (
        overrides("objectives.brevity.rewards=[{name: length, params: {target_tokens: 1, limit_token: 2}}]"),
        ["objectives.brevity", "there is no param 'limit_token'", "'limit_tokens'"],
    ),
    "a reward's module that is not there": (
        overrides("objectives.brevity.rewards=[{name: 'my_rewards:short'}]"),
        ["reward 'my_rewards:short'", "cannot be imported", "beside the recipe"],
    ),
    "unknown objective in the dataset": (
        data([{"prompt": "Who?", "objectives": ["honesty"]}] * 2),
        ["{folder}/data.jsonl asks for objectives ['honesty']", "the recipe has ['brevity']"],
    ),
    "unknown objective of all rows": (
        overrides("prompts.objectives=[honesty]"),
        ["asks for objectives ['honesty']", "the recipe has ['brevity']"],
    ),
    "weights all 0": (overrides("objectives.brevity.weight=0"), ["all weights are 0", "set one above 0"]),
    "KL band with low above high": (
        overrides("objectives.brevity.beta.low=0.2"),
        ["objectives.brevity.beta", "low = 0.2 >= high = 0.1", "set low < high"],
    ),
    "KL band with low = high": (overrides("objectives.brevity.beta.low=0.1"), ["low = 0.1 >= high = 0.1"]),
    "bands of one prompt that do not meet": (
        overrides(
            "objectives.other={rewards: [{name: length, params: {target_tokens: 1, limit_tokens: 2}}], "
            "beta: {type: band, low: 0.2, high: 0.3}}"
        ),
        ["their bands do not meet", "brevity [0.01, 0.1]", "other [0.2, 0.3]"],
    ),
    "model folder missing": (overrides("model=./models/gone"), ["{folder}/models/gone", "does not exist"]),
    "model folder without weights": (model_without("model.safetensors"), ["{folder}/model has no weights"]),
    "model folder without config": (model_without("config.json"), ["{folder}/model has no config.json"]),
    "model folder without tokenizer": (
        model_without("tokenizer.json", "tokenizer_config.json"),
        ["{folder}/model has no tokenizer"],
    ),
    "model weights cut short": (model_cut_short, ["{folder}/model/model.safetensors", "cut short"]),
    "unknown end token": (overrides("rollout.end_tokens=[99999]"), ["end token 99999 is not in the vocabulary"]),
    "prompt that does not fit": (
        data([{"id": "novel", "prompt": LONG}, *ROWS[:1]]),
        ["prompt 'novel' has", "tokens, but the model's context leaves 248"],  # 256 - 8 new tokens
    ),
    "completions as long as the context": (
        overrides("rollout.max_new_tokens=300"),  # of 256
        ["context leaves 0 for a prompt beside rollout.max_new_tokens", "lower rollout.max_new_tokens"],
    ),
    "held-out prompt that does not fit": (
        lambda place: (
            data([{"id": "novel", "prompt": LONG}], "test.jsonl")(place),
            overrides("eval.before=true")(place),
        )[-1],
        ["prompt 'novel' has"],
    ),
    "run directory exists": (run_directory_exists, ["output_dir {folder}/run exists already", "--resume", "run-2"]),
    "run directory not writable": (
        run_directory_below_a_file,
        ["output_dir {folder}/file/run cannot be made", "{folder}/file is no folder"],
    ),
    "flash attention on a CPU": (
        overrides("attention=flash_attention_2"),
        ["attention is flash_attention_2", "runs on CUDA only", "attention=auto"],
    ),
    "judge that cannot be reached": (judge_that_is_not_there, ["reward 'judged'", "http://127.0.0.1:"]),
}


def check_refused(code: int, stderr: str, words: list[str], place: Workplace) -> None:
    assert code == 2, stderr
    assert stderr.startswith("error: "), stderr
    assert "Traceback" not in stderr
    for word in words:
        assert word.format(folder=place.folder) in stderr


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_with_one_clear_message_and_nothing_is_written(
    case: str, workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = CASES[case]
    change(workplace)
    workplace.write()
    before = workplace.listing()
    code, stderr = run_in_process(["train", str(workplace.recipe_path)], monkeypatch, capsys)
    check_refused(code, stderr, words, workplace)
    assert stderr.count("error: ") == 1
    assert workplace.listing() == before


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_bad_input_that_says_where_to_get_it(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides("rollout.engine={type: vllm}")(workplace)
    workplace.write()
    before = workplace.listing()
    code, stderr = run_in_process(["train", str(workplace.recipe_path)], monkeypatch, capsys)
    check_refused(code, stderr, ["vLLM is not installed", "[vllm]", "scripts/install_vllm_cpu.sh"], workplace)
    assert workplace.listing() == before


@pytest.mark.parametrize("case", ["unknown key", "group_size 1", "prompt that does not fit"])
def test_the_installed_command_refuses_it_in_the_same_way(case: str, workplace: Workplace) -> None:
    change, words = CASES[case]
    change(workplace)
    workplace.write()
    before = workplace.listing()
    done = subprocess.run(
        [sys.executable, "-m", "grpo", "train", "recipe.yaml"],
        cwd=workplace.folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    check_refused(done.returncode, done.stderr, words, workplace)
    assert done.stdout == ""
    assert workplace.listing() == before


@pytest.mark.parametrize("name", ["data.jsonl", "test.jsonl"])
def test_a_prompt_that_does_not_fit_is_found_before_the_first_step_wherever_it_stands(
    name: str, workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [{"id": f"row-{n}", "prompt": "Who?"} for n in range(40)]
    data([*short, {"id": "novel", "prompt": LONG}], name)(workplace)
    overrides("eval.before=true", "steps=40")(workplace)
    workplace.write()
    before = workplace.listing()
    code, stderr = run_in_process(["train", str(workplace.recipe_path)], monkeypatch, capsys)
    check_refused(code, stderr, ["prompt 'novel' has"], workplace)
    assert workplace.listing() == before


def test_the_same_recipe_without_a_mistake_trains(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.write()
    code, stderr = run_in_process(["train", str(workplace.recipe_path)], monkeypatch, capsys)
    assert code == 0, stderr
    assert (workplace.folder / "run" / "metrics.jsonl").is_file()


# --- wrong ways to call it


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "quikstart"], ["no recipe is called 'quikstart'", "Did you mean 'quickstart'?"]),
        (["train", "recipe.yaml", "rollout.group_size"], ["'rollout.group_size' is no override", "write key=value"]),
        (["train", "recipe.yaml", "sead=1"], ["unknown key sead; did you mean seed?"]),
        (["train", "recipe.yaml", "--resume"], ["{folder}/run is no run directory"]),
        (["report", "."], ["{folder} is not a run directory: it has no config.yaml"]),
        (["eval", "recipe.yaml", "--json", "gone/eval.json"], ["{folder}/gone/eval.json", "folder does not exist"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0] in {"train", "report", "eval"} else "",
)
def test_a_wrong_call_is_refused_and_nothing_is_written(
    arguments: list[str],
    words: list[str],
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workplace.write()
    before = workplace.listing()
    monkeypatch.chdir(workplace.folder)
    code, stderr = run_in_process(arguments, monkeypatch, capsys)
    check_refused(code, stderr, words, workplace)
    assert workplace.listing() == before
