"""Runs of tiny vision-language models on prompts with images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from image_builders import save_image
from run_builders import Runs, completions_of, make_objective, metrics_of, write_rows

from grpo.errors import DatasetError, TooFewVerdicts
from grpo.runtime.image_processors import load_image_text_processor
from grpo.runtime.models import load_model, load_tokenizer

PROMPTS = {
    "type": "file",
    "path": "shown.jsonl",
    "held_out_path": "shown.jsonl",
    "images_column": "pictures",
    "per_step": 3,
}
OBJECTIVES = {"a": make_objective()}
PAINTER = """
from PIL import Image


def paint(inputs):
    Image.new("RGB", (24, 24), (9, 9, 9)).save("{path}")
    return [float(n) for n, _ in enumerate(inputs)]
"""


SOMETIMES_SILENT = """
from pathlib import Path


def letters(inputs):
    is_silent = Path("{folder}/silent").exists()
    return [None if is_silent else abs(len(one.completion) - 10) / -10 for one in inputs]
"""


def prepared(model_dir: Path, request: pytest.FixtureRequest) -> Runs:
    """Rows with no, one and two images in turn."""
    fixture = request.getfixturevalue
    runs = Runs(
        model_dir=model_dir,
        folder=fixture("tmp_path"),
        monkeypatch=fixture("monkeypatch"),
        capsys=fixture("capsys"),
    )
    runs.prepare()
    save_image(runs.folder / "a.png", 24, 16)
    save_image(runs.folder / "b.png", 17, 40, seed=1)
    texts = ("What is {}?", "<image>Is it {}?", "<image> or <image>: {}?")
    pictures: tuple[Any, ...] = (None, "a.png", ["b.png", "a.png"])
    rows = [{"id": f"p{n}", "prompt": texts[n % 3].format(n), "pictures": pictures[n % 3]} for n in range(6)]
    write_rows(runs.folder / "shown.jsonl", rows)
    return runs


@pytest.fixture
def llava(tiny_llava_dir: Path, request: pytest.FixtureRequest) -> Runs:
    return prepared(tiny_llava_dir, request)


def check_whole_run(runs: Runs) -> None:
    evaluated = {"before": False, "after": True, "num_prompts": 3}
    whole = runs.run_in_two_parts(steps=2, prompts=PROMPTS, objectives=OBJECTIVES, eval=evaluated)
    rows = metrics_of(whole)
    assert [row["sampler/ratio_p99"] for row in rows] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert rows[1]["kl/a"] > 0  # it has learned something
    assert json.loads((whole / "eval.json").read_text())["after"]["a"]["n"] == 3
    shown = {row["prompt_id"]: row.get("images", []) for row in completions_of(whole)}
    assert [Path(path).name for path in shown["p2"]] == ["b.png", "a.png"]
    assert shown["p0"] == []


def test_a_run_with_images_that_is_resumed_is_the_uninterrupted_one(llava: Runs) -> None:
    check_whole_run(llava)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny_qwen_vl_dir", "tiny_qwen2_5_vl_dir"])
def test_so_is_one_with_positions_of_three_dimensions(model: str, request: pytest.FixtureRequest) -> None:
    check_whole_run(prepared(request.getfixturevalue(model), request))


def test_a_policy_that_was_trained_whole_is_saved_with_its_processor(llava: Runs) -> None:
    run_dir = llava.run("whole", steps=1, prompts=PROMPTS, objectives=OBJECTIVES, trainable={"type": "full"})
    policy = run_dir / "checkpoints" / "step-1" / "policy"
    tokenizer = load_tokenizer(str(policy), base_dir=policy)
    assert load_image_text_processor(str(policy), tokenizer, base_dir=policy) is not None
    assert load_model(str(policy), dtype=torch.float32, base_dir=policy).config.model_type == "llava"


def test_an_image_that_changes_between_sampling_and_update_stops_the_run(llava: Runs) -> None:
    """The reward paints over it: completions that were sampled for another image teach nothing about this one."""
    (llava.folder / "run_rewards.py").write_text(PAINTER.format(path=llava.folder / "a.png"))
    objective = {"rewards": [{"name": "run_rewards:paint"}], "beta": {"type": "fixed", "value": 0.05}}
    with pytest.raises(DatasetError, match=r"a\.png\) have changed since its completions were sampled"):
        llava.run("painted", prompts=PROMPTS, objectives={"a": objective})


def test_completions_for_an_image_that_has_changed_are_sampled_again_where_a_step_is_taken_up(llava: Runs) -> None:
    """The journal holds those of the old image; the update would compute their log-probabilities with the new one."""
    (llava.folder / "run_rewards.py").write_text(SOMETIMES_SILENT.format(folder=llava.folder))
    objective = {"rewards": [{"name": "run_rewards:letters"}], "beta": {"type": "fixed", "value": 0.05}}
    (llava.folder / "silent").touch()
    with pytest.raises(TooFewVerdicts):
        llava.run("taken_up", steps=1, prompts=PROMPTS, objectives={"a": objective})
    save_image(llava.folder / "a.png", 24, 16, seed=7)
    (llava.folder / "silent").unlink()
    run_dir = llava.run("taken_up", resume=True, steps=1, prompts=PROMPTS, objectives={"a": objective})
    assert metrics_of(run_dir)[0]["sampler/ratio_p99"] == pytest.approx(1.0, abs=1e-4)


def test_an_image_that_is_missing_or_no_image_is_refused(llava: Runs) -> None:
    (llava.folder / "b.png").write_text("a poem")
    llava.check_refused(["b.png of prompt 'p2' cannot be read"], prompts=PROMPTS, objectives=OBJECTIVES)
    (llava.folder / "b.png").unlink()
    llava.check_refused(["row 3: there is no image", "b.png"], prompts=PROMPTS, objectives=OBJECTIVES)


def test_an_image_that_is_cut_short_ends_the_command_by_name(llava: Runs) -> None:
    """Its header says how large it is, so that nothing before the pixels are needed finds it out."""
    path = llava.folder / "b.png"
    save_image(path, 64, 64)
    path.write_bytes(path.read_bytes()[:2000])
    recipe = llava.write_recipe("cut", prompts={**PROMPTS, "per_step": 6}, objectives=OBJECTIVES)
    code, _, stderr = llava.command("train", str(recipe))
    assert code == 2
    assert "b.png of prompt 'p2' cannot be read" in stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout": {"group_size": 4, "engine": {"type": "vllm"}}}, ["rollout.engine vllm", "transformers"]),
        (
            {"warmup": {"path": "shown.jsonl", "steps": 1, "learning_rate": 1e-3}},
            ["warmup does not take vision-language models"],
        ),
    ],
)
def test_what_is_not_offered_for_such_models_is_refused(llava: Runs, changes: dict[str, Any], words: list[str]) -> None:
    llava.check_refused(words, **{"prompts": PROMPTS, "objectives": OBJECTIVES, **changes})


def test_a_model_that_reads_text_alone_refuses_rows_with_images(
    tiny_model_dir: Path, request: pytest.FixtureRequest
) -> None:
    runs = prepared(tiny_model_dir, request)
    runs.check_refused(["prompt 'p1' shows images", "reads text alone"], prompts=PROMPTS, objectives=OBJECTIVES)
