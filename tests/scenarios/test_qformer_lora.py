"""LoRA meant for the Q-Former: patterns that reach the language model, NaN from the second step, endless skips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from page_snippets import PageReader
from peft import TaskType
from run_builders import metrics_of
from safetensors.torch import load_file
from scenarios.instruct_blip import LanguageModel, loss_of, make_instruct_blip, with_lora

from grpo.checkpoint import list_checkpoints
from grpo.diagnostics.checks.kept_memory import KeptMemory
from grpo.diagnostics.findings import Finding
from grpo.diagnostics.own_model import verify_model
from grpo.runtime.trainable import BYTES_PER_PARAMETER
from grpo.warmup import accelerate_kept, generators_kept

PAGE = Path(__file__).with_name("qformer_lora.md")
MEANT = r".*qformer.*\.(query|value)"
LINEAR: dict[LanguageModel, list[str]] = {
    "t5": ["query", "key", "value", "dense", "q", "k", "v", "o", "wi", "wo"],
    "opt": ["query", "value", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
ENDS = ["query", "value", "q", "v", "q_proj", "v_proj"]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> PageReader:
    return PageReader(page=PAGE, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)


def scope_of(language_model: LanguageModel, patterns: str | list[str]) -> Finding:
    model = with_lora(make_instruct_blip(language_model), patterns)
    (finding,) = [one for one in verify_model(model, loss_of(model), trainable="qformer") if one.check == "scope"]
    return finding


# T5's encoder has 4 attentions, its decoder 8; OPT has 4. Each: two layers of A and B. The Q-Former: 2 + 1 attentions
@pytest.mark.parametrize(("language_model", "besides"), [("t5", 48), ("opt", 16)])
def test_patterns_that_reach_the_language_model_are_told_with_what_they_cost(
    language_model: LanguageModel, besides: int
) -> None:
    wide = scope_of(language_model, ENDS)
    assert wide.status == "failed"
    assert wide.figures["parts"]["qformer"]["tensors"] == 12
    assert wide.figures["parts"]["language_model"]["tensors"] == besides
    # rank 4: A and B of 32 -> 32 are 128 numbers each, of the Q-Former's 16 -> 16 they are 64
    assert wide.figures["parts"]["language_model"]["parameters"] == besides * 128
    assert wide.figures["bytes"] == (12 * 64 + besides * 128) * 5 * 4
    assert 0 < wide.figures["kept_because_of_strays"] < wide.figures["kept_bytes"]
    meant = scope_of(language_model, MEANT)
    assert (meant.status, meant.figures["parameters"]) == ("ok", 12 * 64)


@pytest.mark.parametrize(("language_model", "times"), [("t5", 2.8), ("opt", 2.4)])
def test_all_linear_layers_by_name_take_more_than_twice_the_memory_of_the_qformers(
    language_model: LanguageModel, times: float
) -> None:
    """Learning state, and what the backward pass of a batch of 24 keeps, with LoRA's usual dropout."""

    def learned_bytes(patterns: str | list[str]) -> int:
        model = with_lora(make_instruct_blip(language_model), patterns, dropout=0.1)
        learning = sum(one.numel() for one in model.parameters() if one.requires_grad)
        return BYTES_PER_PARAMETER * learning + KeptMemory(model=model, loss=loss_of(model, batch=24)).total()

    assert learned_bytes(LINEAR[language_model]) / learned_bytes(MEANT) == pytest.approx(times, abs=0.15)


def test_patterns_decide_what_learns_and_the_task_type_does_not() -> None:
    tasks = [None, *(TaskType.FEATURE_EXTRACTION, TaskType.SEQ_2_SEQ_LM, TaskType.CAUSAL_LM)]
    learning = {
        frozenset(name for name, one in model.named_parameters() if one.requires_grad)
        for model in (with_lora(make_instruct_blip("t5"), ENDS, task_type=task) for task in tasks)
    }
    assert [len(names) for names in learning] == [60]


def test_a_wide_pattern_is_told_with_its_parts_and_refused_where_a_recipe_has_it(reader: PageReader) -> None:
    assert reader.follow("Twice the memory") == 8


@pytest.mark.parametrize("language_model", ["t5", "opt"])
def test_float16_gives_nan_from_the_second_step(language_model: LanguageModel) -> None:
    model = with_lora(make_instruct_blip(language_model), MEANT).half()
    learning = [one for one in model.parameters() if one.requires_grad]
    loss, optimizer = loss_of(model), torch.optim.AdamW(learning, lr=1e-3)
    losses: list[float] = []
    for _ in range(4):  # with a loop that skips
        value = loss()
        losses.append(float(value.detach()))
        if not bool(value.isnan()):
            value.backward()
            optimizer.step()
    assert [loss == loss for loss in losses] == [True, False, False, False]


def test_the_first_module_whose_numbers_are_not_finite_is_named_after_the_step_that_ruined_it(
    reader: PageReader,
) -> None:
    assert reader.follow("NaN from the second step") == 4


@pytest.mark.parametrize("language_model", ["t5", "opt"])
def test_the_fixed_form_learns_saves_every_second_step_and_leaves_all_else_as_it_was(
    language_model: LanguageModel, tmp_path: Path
) -> None:
    model = with_lora(make_instruct_blip(language_model), MEANT)
    frozen = {name: one.clone() for name, one in model.named_parameters() if not one.requires_grad}
    loss = loss_of(model)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    first = float(loss().detach())
    for step in range(1, 5):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if step % 2 == 0:
            model.save_pretrained(str(tmp_path / f"step-{step}"), save_embedding_layers=False)
    assert float(loss().detach()) < first
    assert all(torch.equal(one, frozen[name]) for name, one in model.named_parameters() if name in frozen)
    assert sorted(path.parent.name for path in tmp_path.glob("*/adapter_model.safetensors")) == ["step-2", "step-4"]


def test_skips_in_a_row_end_the_run_with_a_checkpoint_of_every_step(reader: PageReader, tiny_model_dir: Path) -> None:
    (reader.folder / "tiny").symlink_to(tiny_model_dir)
    assert reader.follow("Batches skipped") == 1
    rows = metrics_of(reader.folder / "run")
    assert [row["update/skipped"] for row in rows] == [0, 1, 1]
    assert list_checkpoints(reader.folder / "run")[-1].step == 3


def test_an_encoder_decoder_is_refused_with_what_there_is_for_it(reader: PageReader) -> None:
    assert reader.follow("What grpo train says") == 1
    assert not (reader.folder / "run").exists()


def test_transformers_own_trainer_trains_the_selection_with_labels_and_saves_the_adapters_alone(
    reader: PageReader,
) -> None:
    with generators_kept(), accelerate_kept():
        assert reader.follow("Labels train it") == 3
    checkpoints = sorted((reader.folder / "labelled").iterdir())
    assert [path.name for path in checkpoints] == ["checkpoint-4", "checkpoint-8"]
    earlier, later = (load_file(path / "adapter_model.safetensors") for path in checkpoints)
    assert sum(value.numel() for value in later.values()) == 768  # 12 tensors of 64 numbers
    assert all(".qformer." in name for name in later)
    assert not any(torch.equal(earlier[name], value) for name, value in later.items())
    losses = [row["loss"] for row in json.loads((checkpoints[-1] / "trainer_state.json").read_text())["log_history"]]
    assert losses[-1] < losses[0] - 0.1
