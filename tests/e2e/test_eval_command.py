"""`grpo eval`: what it needs, what it does not need, and what it says."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

from grpo.cli import main
from grpo.recipe_loader import load_recipe
from grpo.trainer import Trainer

LENGTH = {"name": "length", "params": {"target_tokens": 4, "limit_tokens": 8}}
Grpo = Callable[..., tuple[int, str]]


def dead_judge() -> dict[str, Any]:
    """A judge at a loopback port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    return {"name": "judged", "params": {"endpoint": {"url": url, "model": "judge"}, "rubric": "fairness"}}


def write_recipe(folder: Path, model: Path, **changes: Any) -> Path:
    recipe = {
        "model": str(model),
        "steps": 1,
        "output_dir": "run",
        "device": "cpu",
        "prompts": {"type": "file", "path": "data.jsonl", "held_out_path": "data.jsonl", "per_step": 2},
        "objectives": {"brevity": {"rewards": [LENGTH], "beta": {"type": "fixed"}}},
        "rollout": {"group_size": 2, "max_new_tokens": 8},
        "optim": {"learning_rate": 1e-3},
        "trainable": {"type": "lora", "rank": 2},
        "eval": {"before": False, "after": False, "num_prompts": 3},
        **changes,
    }
    rows = [{"id": f"row-{n}", "prompt": f"Add {n} and 1.", "reference": str(n + 1)} for n in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def one_step(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of one step, with a copy of its model beside it. Only to be read."""
    folder = tmp_path_factory.mktemp("run")
    model = Path(shutil.copytree(tiny_model_dir, folder / "model"))
    return Trainer(load_recipe(str(write_recipe(folder, model)))).run().run_dir


@pytest.fixture
def run_dir(one_step: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(one_step, tmp_path / "run"))


@pytest.fixture
def grpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Grpo:
    """`grpo ...` without a new interpreter: exit code and stderr."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["grpo", *arguments])
        capsys.readouterr()  # what was written before belongs to the test
        with pytest.raises(SystemExit) as exit_:
            main()
        return int(exit_.value.code or 0), capsys.readouterr().err

    return call


def change_objective(run_dir: Path, **changes: Any) -> None:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["objectives"]["brevity"].update(changes)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))


# --- judges


def test_a_judged_run_is_evaluated_by_its_eval_rewards_without_its_judge(
    run_dir: Path, tmp_path: Path, grpo: Grpo
) -> None:
    change_objective(run_dir, rewards=[dead_judge()], eval_rewards=[LENGTH])
    code, stderr = grpo("eval", str(run_dir), "--json", str(tmp_path / "eval.json"))
    assert (code, stderr) == (0, "")
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert set(figures) == {"after"}
    assert (figures["after"]["brevity"]["n"], figures["after"]["brevity"]["unscored"]) == (3, 0)


def test_a_judge_that_evaluation_asks_must_answer(run_dir: Path, grpo: Grpo) -> None:
    change_objective(run_dir, rewards=[LENGTH], eval_rewards=[dead_judge()])
    code, stderr = grpo("eval", str(run_dir))
    assert code == 2
    assert "a reward is not ready: reward 'judged'" in stderr


@pytest.mark.parametrize(("before", "code"), [(False, 0), (True, 2)])
def test_training_asks_the_judge_of_evaluation_only_where_it_evaluates(
    before: bool, code: int, tiny_model_dir: Path, tmp_path: Path, grpo: Grpo
) -> None:
    objective = {"rewards": [LENGTH], "eval_rewards": [dead_judge()], "beta": {"type": "fixed"}}
    recipe = write_recipe(
        tmp_path, tiny_model_dir, objectives={"brevity": objective}, eval={"before": before, "after": False}
    )
    assert grpo("train", str(recipe))[0] == code


# --- what is there to evaluate


def test_a_run_without_held_out_prompts_is_told_how_to_name_them(run_dir: Path, grpo: Grpo, tmp_path: Path) -> None:
    code, stderr = grpo("eval", str(run_dir), "prompts.held_out_path=null", "--json", str(tmp_path / "eval.json"))
    assert code == 2
    assert "there are no held-out prompts to evaluate on" in stderr
    assert "prompts.held_out_path=FILE" in stderr
    assert not (tmp_path / "eval.json").exists()


def test_a_run_without_a_checkpoint_is_refused_before_its_model_is_looked_for(run_dir: Path, grpo: Grpo) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    code, stderr = grpo("eval", str(run_dir), "model=./gone")
    assert code == 2
    assert f"{run_dir} has no usable checkpoint" in stderr


def test_training_prompts_that_are_too_long_do_not_matter_to_evaluation(
    run_dir: Path, tmp_path: Path, grpo: Grpo
) -> None:
    long = [{"id": f"p{n}", "prompt": "word " * 300} for n in range(2)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    code, stderr = grpo("eval", str(run_dir), f"prompts.path={tmp_path / 'long.jsonl'}")
    assert (code, stderr) == (0, "")


# --- models


def evaluate_model(grpo: Grpo, model: Path, recipe: Path) -> dict[str, Any]:
    target = recipe.parent / "eval.json"
    code, stderr = grpo("eval", str(model), "--recipe", str(recipe), "--json", str(target))
    assert (code, stderr) == (0, "")
    return json.loads(target.read_text())


@pytest.mark.parametrize("name", ["a: b", "a #b"])
def test_a_model_folder_is_taken_by_its_name_whatever_yaml_would_make_of_it(
    name: str, tiny_model_dir: Path, tmp_path: Path, grpo: Grpo
) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / name))
    figures = evaluate_model(grpo, model, write_recipe(tmp_path, model))
    assert figures["before"]["brevity"]["n"] == 3


def test_a_model_whose_context_has_no_end_is_evaluated(tiny_model_dir: Path, tmp_path: Path, grpo: Grpo) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    folder = tmp_path / "bloom"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BloomConfig(
            vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
        )
        BloomForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    figures = evaluate_model(grpo, folder, write_recipe(tmp_path, folder))
    assert figures["before"]["brevity"]["n"] == 3
