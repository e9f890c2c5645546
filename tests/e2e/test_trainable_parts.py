"""Runs that train parts of the tiny model: end to end, resumed to the bit, refused where a pattern is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_builders import Runs
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, T5Config

from grpo.checkpoint import latest_checkpoint
from grpo.runtime.policy import load_parts

MLP = {"type": "full", "modules": "model.layers.1.mlp"}
ATTENTION = {"type": "lora", "rank": 2, "modules": "model.layers.*.self_attn"}


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    runs = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    runs.prepare()
    return runs


def test_a_norm_alone_is_trained_from_the_command_line_and_nothing_else_is_in_the_checkpoint(runs: Runs) -> None:
    trainable = {"type": "parts", "parts": [{"type": "full", "modules": "model.norm"}]}
    code, _, stderr = runs.command("train", str(runs.write_recipe("run", trainable=trainable)))
    assert code == 0, stderr
    folder = latest_checkpoint(runs.folder / "run").folder / "policy"
    saved = load_file(folder / "parts.safetensors")
    assert list(saved) == ["model.norm.weight"]
    plain = AutoModelForCausalLM.from_pretrained(runs.model_dir)
    assert not torch.equal(saved["model.norm.weight"], plain.model.norm.weight)
    assert not (folder / "model.safetensors").exists()


def test_a_run_of_a_part_in_full_and_adapters_goes_on_to_the_bit_and_loads_on_the_plain_model(runs: Runs) -> None:
    whole = runs.run_in_two_parts(steps=2, trainable={"type": "parts", "parts": [MLP, ATTENTION]})
    base = AutoModelForCausalLM.from_pretrained(runs.model_dir)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    loaded = load_parts(base, latest_checkpoint(whole).folder / "policy")
    after = loaded.get_base_model().state_dict()
    same = {name for name, value in before.items() if torch.equal(after.get(name, torch.empty(0)), value)}
    names = {name for name in before if ".self_attn." not in name}  # those have adapters beside them
    assert names - same == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("q_proj", "'**.q_proj' matches 2 modules"),
        ("model.lay(er)s", "is no pattern of module names"),
    ],
)
def test_a_wrong_pattern_ends_with_2_and_nothing_written(pattern: str, words: str, runs: Runs) -> None:
    trainable = {"type": "parts", "parts": [{"type": "lora", "modules": pattern}]}
    code, _, stderr = runs.command("train", str(runs.write_recipe("run", trainable=trainable)))
    assert code == 2
    assert words in " ".join(stderr.split())
    assert not (runs.folder / "run").exists()


@pytest.mark.parametrize("kind", ["t5", "instructblip", pytest.param("bart", marks=pytest.mark.slow)])
def test_an_encoder_decoder_is_refused_with_what_there_is_for_it(kind: str, runs: Runs) -> None:
    folder = runs.folder / "model"
    config = AutoConfig.for_model(kind)
    if kind == "instructblip":
        config.text_config = T5Config()
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (folder / file).write_bytes((runs.model_dir / file).read_bytes())
    runs.check_refused(["an encoder and a decoder", "make_trainable", "Seq2SeqTrainer"], model=str(folder))
