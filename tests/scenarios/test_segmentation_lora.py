"""LoRA on a segmentation model: a no_grad decorator, writes into a leaf, and a Dice that does not move."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from page_snippets import PageReader
from run_builders import metrics_of
from scenarios.segmenter import (
    AssignsInPlace,
    BlanksInPlace,
    CannotLearn,
    Segmenter,
    loss_of,
    soft_dice,
    validation_dice,
    with_lora,
)

from grpo.alarms import still_metric, unmoved

PAGE = Path(__file__).with_name("segmentation_lora.md")


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> PageReader:
    return PageReader(page=PAGE, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)


def test_dice_is_twice_the_common_area_by_both_areas() -> None:
    sure = torch.tensor([[[40.0, 40.0], [-40.0, -40.0]]])  # the upper row
    left = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    assert float(soft_dice(sure, left)) == pytest.approx(0.5)  # 2 * 1 / (2 + 2)
    assert float(soft_dice(sure, left.transpose(1, 2))) == pytest.approx(1.0)


def test_the_adapter_has_the_rank_and_the_scale_of_the_report() -> None:
    model = with_lora(Segmenter())
    query = model.get_submodule("base_model.model.language_model.model.layers.0.self_attn.q_proj")
    assert query.lora_A["default"].weight.shape[0] == 64  # pyright: ignore
    assert query.scaling["default"] == 2.0  # pyright: ignore  # 128 / 64


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (CannotLearn, "does not require grad"),
        (BlanksInPlace, "a leaf Variable that requires grad"),
        (AssignsInPlace, "a leaf Variable that requires grad"),
    ],
)
def test_each_broken_form_fails_as_torch_puts_it(broken: type[Segmenter], complaint: str) -> None:
    with pytest.raises(RuntimeError, match=complaint):
        loss_of(with_lora(broken()))().backward()


def test_a_frozen_dice_raises_the_alarm_and_the_check_names_the_decorated_forward(reader: PageReader) -> None:
    assert reader.follow("Validation Dice") == 11


def validation_dices(kind: type[Segmenter]) -> list[float]:
    """Before and after each of three epochs, by the loop on the page."""
    model = with_lora(kind())
    loss = loss_of(model)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    dices = [validation_dice(model)]
    for _ in range(3):
        for _ in range(3):
            value = loss()
            if not value.requires_grad:
                value.requires_grad_(True)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        dices.append(validation_dice(model))
    return dices


def test_the_dice_stands_still_to_the_last_digit_and_rises_once_the_decorator_is_gone() -> None:
    frozen, learning = validation_dices(CannotLearn), validation_dices(Segmenter)
    assert len(set(frozen)) == 1
    assert [alarm.name for alarm in still_metric("Dice", frozen)] == ["Dice unmoved"]
    assert frozen[0] == learning[0]  # the same model
    assert len(set(learning)) == 4
    assert learning[-1] > learning[0] + 0.01
    assert still_metric("Dice", learning) == []


def test_writes_into_a_leaf_are_explained_one_after_the_other(reader: PageReader) -> None:
    assert reader.follow("A leaf Variable") == 2


def test_the_dice_of_boxes_trains_the_adapter_for_some_steps_and_the_evaluation_moves(reader: PageReader) -> None:
    assert reader.follow("The regions reward") == 1
    run = reader.folder / "run"
    rows = metrics_of(run)
    assert len(rows) == 8
    assert all(row["reward/segmentation/std"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert rows[-1]["kl/segmentation"] > rows[0]["kl/segmentation"]
    evaluation = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    before, after = (evaluation[when]["segmentation"]["mean"] for when in ("before", "after"))
    assert before != after
    assert unmoved(evaluation) == []
    still = json.loads((reader.folder / "still" / "eval.json").read_text(encoding="utf-8"))
    assert still["before"]["segmentation"]["mean"] == still["after"]["segmentation"]["mean"] == before


def test_a_run_whose_answers_change_and_whose_dice_does_not_is_told_so() -> None:
    def entries(text: str) -> list[dict[str, object]]:  # nothing of it can be read: 0 for every picture, for ever
        return [{"id": f"p{n}", "completion": f"{text} {n}", "scores": {"segmentation": 0.0}} for n in range(8)]

    (alarm,) = unmoved({"answers": {"before": entries("the mask is"), "after": entries("here: <seg>")}})
    assert alarm.name == "evaluation of segmentation unmoved"
    assert "can read none of the answers" in alarm.text
