"""NaN by module, and autograd's complaints about writes in place in words that say where and what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from grpo.diagnostics.checks.numbers import check_pass
from grpo.diagnostics.findings import Finding


class Masks(nn.Module):
    """Writes into a parameter of its own, in one way or another."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.table, self.write = nn.Parameter(torch.ones(3, 4)), write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.table)
        return x * self.table


class Overwrites(nn.Module):
    """Writes into what tanh keeps for its backward pass."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear, self.write = nn.Linear(4, 4), write

    def forward(self, x: Tensor) -> Tensor:
        activated = self.linear(x).tanh()
        self.write(activated)
        return activated


def set_row(tensor: Tensor) -> None:
    tensor[0] = 0.0


def add_one(tensor: Tensor) -> None:
    tensor += 1


def finding_of(model: nn.Module, loss: Callable[[], Tensor] | None = None) -> Finding:
    (finding,) = check_pass(model, loss or (lambda: model(torch.ones(3, 4)).sum()))
    return finding


WRITES: dict[str, tuple[Callable[[Tensor], object], str, str]] = {
    "masked_fill_": (lambda tensor: tensor.masked_fill_(tensor > 2, 0.0), "masked_fill_ at", "x = x.masked_fill(...)"),
    "indexed": (set_row, "__setitem__ at", "torch.where"),
    "+=": (add_one, "add_ at", "x = x + y"),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_in_place_on_a_parameter_is_named_with_module_line_and_remedy(name: str) -> None:
    write, seen, remedy = WRITES[name]
    model = nn.Sequential(nn.Linear(4, 4), Masks(write))
    finding = finding_of(model)
    assert finding.status == "failed"
    assert "a parameter, or an input that learns, is written into in place" in finding.what
    assert f"{seen} grpo/test_verify_numbers.py:" in finding.what
    assert finding.what.endswith("in 1")  # the module's name in the Sequential
    assert remedy in finding.remedy


@pytest.mark.parametrize("name", WRITES)
def test_a_write_in_place_on_what_the_backward_pass_needs_is_named(name: str) -> None:
    write, seen, remedy = WRITES[name]
    model = nn.Sequential(Overwrites(write), nn.Linear(4, 1))
    finding = finding_of(model)
    assert finding.status == "failed"
    assert "a tensor that the backward pass needs is overwritten in place" in finding.what
    assert f"{seen} grpo/test_verify_numbers.py:" in finding.what
    assert finding.figures["module"] == "0"
    assert remedy in finding.remedy


def test_a_write_in_place_that_breaks_nothing_is_no_fault() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
    assert finding_of(model).status == "ok"


def test_another_runtime_error_is_not_explained_away() -> None:
    model = nn.Linear(5, 1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        finding_of(model, lambda: model(torch.ones(3, 4)).sum())


class Logarithm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


class Root(nn.Module):
    """Finite at 0, where its gradient is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


def test_the_first_module_whose_output_is_not_finite_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Logarithm(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.fill_(-1.0)  # pyright: ignore[reportCallIssue, reportArgumentType]
    finding = finding_of(model)
    assert finding.status == "failed"
    assert finding.figures["place"] == "2 (its output)"


def test_the_first_module_whose_gradient_is_not_finite_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Root(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.fill_(-1.0)  # pyright: ignore[reportCallIssue, reportArgumentType]
    finding = finding_of(model)
    assert finding.status == "failed"
    assert finding.figures["place"] == "1 (the gradient of its output)"


def test_a_loss_without_a_graph_is_left_to_the_gradient_check() -> None:
    model = nn.Linear(4, 1)
    assert finding_of(model, lambda: model(torch.ones(3, 4)).sum().detach()).status == "ok"


def test_a_write_in_the_models_own_forward_is_told_as_that_and_one_outside_as_the_losss() -> None:
    model = Masks(WRITES["masked_fill_"][0])
    assert finding_of(model).what.endswith("in the model's own forward")
    plain = nn.Linear(4, 4)
    assert finding_of(plain, lambda: set_and_sum(plain)).what.endswith("in the loss")


def set_and_sum(model: nn.Linear) -> Tensor:
    activated = model(torch.ones(3, 4)).tanh()
    activated[0] = 0.0
    return activated.sum()
