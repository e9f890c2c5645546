"""Adapter-only training of a vision-text model: a no_grad block that holds more than the frozen encoder."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from page_snippets import PageReader
from run_builders import metrics_of
from safetensors.torch import load_file
from scenarios.ocr_reader import AnswersWithoutGradient, EncodesWithoutGradient, OcrReader, loss_of
from torch import nn

from grpo.checkpoint import list_checkpoints
from grpo.diagnostics.checks.gradient import judge_flow
from grpo.diagnostics.findings import Finding, worst_status
from grpo.diagnostics.gradflow import GradientFlow
from grpo.diagnostics.own_model import verify_model

PAGE = Path(__file__).with_name("adapter_only.md")


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> PageReader:
    return PageReader(page=PAGE, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)


def cuts_of(model: OcrReader) -> list[Finding]:
    return [one for one in verify_model(model, loss_of(model), trainable="projector") if "kind" in one.figures]


@pytest.mark.parametrize(
    ("broken", "around", "forward", "called"),
    [
        (EncodesWithoutGradient, "projector", EncodesWithoutGradient.features, "self.projector(read)"),
        (AnswersWithoutGradient, "language_model", OcrReader.answer, "self.language_model("),
    ],
)
def test_a_block_that_holds_too_much_is_found_with_its_module_and_line(
    broken: type[OcrReader], around: str, forward: object, called: str
) -> None:
    model = broken()
    with pytest.raises(RuntimeError, match="does not require grad"):  # the failure itself
        loss_of(model)().backward()
    (cut,) = cuts_of(model)
    assert (cut.figures["kind"], cut.figures["around"]) == ("no_grad", [around])
    lines, first = inspect.getsourcelines(forward)  # pyright: ignore[reportArgumentType]
    line = first + next(number for number, text in enumerate(lines) if called in text)
    assert f"called at scenarios/ocr_reader.py:{line}" in cut.what


def test_a_block_around_the_frozen_encoder_alone_is_no_fault() -> None:
    model = OcrReader()
    assert worst_status(verify_model(model, loss_of(model), trainable="projector")) == "ok"


def test_a_loss_that_was_given_requires_grad_runs_and_is_found_all_the_same() -> None:
    model = EncodesWithoutGradient()
    loss = loss_of(model)
    value = loss().requires_grad_(True)
    value.backward()  # no error any more
    assert all(parameter.grad is None for parameter in model.projector.parameters())
    findings = verify_model(model, lambda: loss().requires_grad_(True), trainable="projector")
    assert "the loss has no grad_fn" in findings[0].meaning
    assert "no_grad around projector" in findings[1].what


def test_the_pages_first_check_prints_what_it_shows(reader: PageReader) -> None:
    assert reader.follow("The loss does not move") == 9


def test_the_reports_own_sizes_are_counted_as_it_has_them() -> None:
    with torch.device("meta"):  # sizes without memory
        model = nn.Module()
        model.projector = nn.Sequential(nn.Linear(512, 4096), nn.GELU(), nn.Linear(4096, 4096))
        model.language_model = nn.Linear(40_000, 38_500, bias=False).requires_grad_(False)  # 1.54 billion
    norms: dict[str, float | None] = {f"projector.{name}": 1.0 for name, _ in model.projector.named_parameters()}
    flow = GradientFlow(
        has_graph=True, norms=norms, zero_at_start=(), zero_always=(), cuts=(), outside=(), whole_pass_is_off=False
    )
    (finding,) = judge_flow(flow, model, meant=norms.keys())
    # 512 * 4096 + 4096 + 4096 * 4096 + 4096
    assert finding.what == ("trainable 18,882,560 = 1.2%; base frozen: yes; projector: gradient in 4 of 4 tensors")


def test_ten_steps_move_the_projector_alone_and_the_saved_one_gives_the_same_loss(reader: PageReader) -> None:
    assert reader.follow("Ten steps") == 3
    model = OcrReader()
    loss = loss_of(model)
    untrained = float(loss().detach())
    saved = load_file(reader.folder / "projector.safetensors")
    model.projector.load_state_dict(saved)
    assert sum(value.numel() for value in saved.values()) == 672  # 24 * 16 + 16 + 16 * 16 + 16
    with torch.no_grad():
        assert float(loss()) < untrained - 0.01


def test_an_empty_model_name_is_refused_before_anything_is_read_or_written(reader: PageReader) -> None:
    assert reader.follow("The model has no name") == 2
    assert [path.name for path in reader.folder.iterdir()] == ["nameless.yaml"]


def test_a_recipe_trains_the_projector_alone_for_ten_steps_and_saves_it(reader: PageReader) -> None:
    assert reader.follow("The same through a recipe") == 2
    run = reader.folder / "run"
    assert [row["update/skipped"] for row in metrics_of(run)] == [0] * 10
    assert [one.step for one in list_checkpoints(run)] == [5, 10]
    earlier, later = (load_file(one.folder / "policy" / "parts.safetensors") for one in list_checkpoints(run))
    projector = {f"model.multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    assert later.keys() == projector
    assert not any(torch.equal(earlier[name], later[name]) for name in later)
    assert sum(value.numel() for value in later.values()) == 1600  # 16 * 32 + 32 + 32 * 32 + 32
    held = [path.name for path in (list_checkpoints(run)[-1].folder / "policy").glob("*.safetensors")]
    assert held == ["parts.safetensors"]
