"""The shipped accumulator passes, and each way to break it is called by its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from verify_subjects import open_subject, state_of

from grpo.diagnostics.checks.accumulation import check_accumulation
from grpo.diagnostics.checks.subject import Subject
from grpo.diagnostics.findings import Finding
from grpo.update.gradients import GradientWindow


class Overwriting(GradientWindow):
    """`.grad = gradient` where `+=` is meant."""

    def add(self, loss: Tensor, **_: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        parameters = list(self._parameters.values())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient


class ZeroedInside(GradientWindow):
    """zero_grad() in the loop over micro-batches."""

    def add(self, loss: Tensor, **options: Any) -> None:
        for parameter in self._parameters.values():
            assert parameter.grad is not None
            parameter.grad.zero_()
        super().add(loss, **options)


class StartedInside(GradientWindow):
    """The window begins anew with each micro-batch."""

    def add(self, loss: Tensor, **options: Any) -> None:
        self.start_window()
        super().add(loss, **options)


class DividedTwice(GradientWindow):
    """loss / accumulation_steps, where the loss is a part of one mean already."""

    def __init__(self, parameters: Any, num_micro_batches: int) -> None:
        super().__init__(parameters)
        self._num_micro_batches = num_micro_batches

    def add(self, loss: Tensor, **options: Any) -> None:
        super().add(loss / self._num_micro_batches, **options)


class NeverZeroed(GradientWindow):
    """What the window before left stays."""

    def start_window(self, *, num_objectives: int = 0) -> None:
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


class ZeroedAtTheEnd(GradientWindow):
    """zero_grad() between the last backward pass and the optimizer."""

    def clip(self, max_norm: float) -> float:
        self.start_window()
        return super().clip(max_norm)


class Tripled(GradientWindow):
    """A factor that nobody meant."""

    def add(self, loss: Tensor, **options: Any) -> None:
        super().add(3 * loss, **options)


@pytest.fixture(scope="module")
def subject(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with open_subject(tiny_model_dir, tmp_path_factory.mktemp("subject")) as subject:
        yield subject


def finding_with(subject: Subject, window: GradientWindow | None = None) -> Finding:
    updater = subject.parts.updater
    shipped = updater.gradients
    updater.gradients = window or shipped
    try:
        (finding,) = check_accumulation(subject)
    finally:
        updater.gradients = shipped
    return finding


def test_the_shipped_accumulator_comes_to_one_large_batch_and_nothing_is_left_of_the_trial(subject: Subject) -> None:
    before = state_of(subject.parts)
    finding = finding_with(subject)
    assert finding.status == "ok", finding
    assert finding.figures["coefficients"] == pytest.approx([1.0] * len(finding.figures["coefficients"]), abs=1e-4)
    assert len(finding.figures["coefficients"]) > 1
    assert finding.figures["relative_gap_to_one_batch"] < 1e-4
    after = state_of(subject.parts)
    assert all(torch.equal(before["weights"][name], value) for name, value in after["weights"].items())
    assert {name: before[name] for name in ("optimizer", "betas", "gradients")} == {
        name: after[name] for name in ("optimizer", "betas", "gradients")
    }


def test_several_windows_over_one_batch_that_are_clipped_by_more_and_more_are_no_scaled_gradient(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    with open_subject(
        tiny_model_dir, tmp_path, update={"iterations": 2}, optim={"learning_rate": 0.1, "max_grad_norm": 0.01}
    ) as subject:
        assert finding_with(subject).status == "ok"


WINDOWS = {
    Overwriting: "each micro-batch overwrites the one before",
    ZeroedInside: "gradients are zeroed inside the window",
    StartedInside: "gradients are zeroed inside the window",
    NeverZeroed: "the gradient of the window before is still there",
    ZeroedAtTheEnd: "the gradient is zero when the optimizer steps",
    Tripled: "the gradient is scaled by 3",
}


def check_named(window: type[GradientWindow], subject: Subject) -> None:
    finding = finding_with(subject, window(subject.parts.policy.trainable_parameters()))
    assert finding.status == "failed"
    assert finding.what.startswith(WINDOWS[window]), finding.what
    assert finding.remedy


@pytest.mark.parametrize("window", [Overwriting, ZeroedInside])
def test_the_two_classic_failures_are_told_apart(window: type[GradientWindow], subject: Subject) -> None:
    check_named(window, subject)


@pytest.mark.slow
@pytest.mark.parametrize("window", WINDOWS)
def test_a_broken_accumulator_is_named(window: type[GradientWindow], subject: Subject) -> None:
    check_named(window, subject)


def test_a_gradient_divided_twice_is_named_with_the_divisor(subject: Subject) -> None:
    finding = finding_with(subject, DividedTwice(subject.parts.policy.trainable_parameters(), 4))
    assert finding.status == "failed"
    assert "divided twice: by the window's counts, and by the number of micro-batches (4)" in finding.what
    assert finding.figures["coefficients"] == pytest.approx([0.25] * 4, abs=1e-4)


def test_a_loss_divided_by_each_micro_batchs_own_tokens_is_another_gradient(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_mean_loss.py").write_text(
        "from grpo.update.losses import LossOutput\n\n\n"
        "def own_mean(given):\n"
        "    ratio = (given.logprobs - given.old_logprobs.detach()).exp()\n"
        "    loss = -ratio * given.advantages[:, None] / given.mask.sum()\n"
        "    return LossOutput(token_loss=loss, metrics={})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    loss = {"type": "custom", "path": "own_mean_loss:own_mean"}
    with open_subject(tiny_model_dir, tmp_path, update={"loss": loss}) as subject:
        finding = finding_with(subject)
    assert finding.status == "failed"
    assert "come to another gradient than the same rows as one batch" in finding.what


@pytest.mark.slow
def test_objectives_that_are_combined_otherwise_than_by_a_sum_are_tried_one_at_a_time(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    with open_subject(tiny_model_dir, tmp_path, update={"gradients": {"method": "pcgrad"}}) as subject:
        assert finding_with(subject).status == "ok"
