"""Claims about the window's gradient: what is added stays, until the next window begins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grpo.update.gradients import GradientWindow


def make_parameters() -> dict[str, nn.Parameter]:
    return {
        "weight": nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64)),
        "bias": nn.Parameter(torch.tensor([3.0], dtype=torch.float64)),
    }


def open_window(parameters: dict[str, nn.Parameter]) -> GradientWindow:
    window = GradientWindow(parameters)
    window.start_window()
    return window


def gradient_of(parameter: nn.Parameter) -> list[float]:
    assert parameter.grad is not None
    return parameter.grad.tolist()


def test_two_losses_add_up_to_the_gradient_of_their_sum() -> None:
    parameters = make_parameters()
    weight, bias = parameters.values()
    window = open_window(parameters)
    window.add((weight**2).sum() + bias.sum())  # 2 w = (2, 4); 1
    window.add((weight * bias).sum())  # b = (3, 3); w1 + w2 = 3
    assert gradient_of(weight) == [5.0, 7.0]
    assert gradient_of(bias) == [4.0]


@settings(max_examples=30, deadline=None)
@given(data=st.data(), rows=st.integers(1, 8))
def test_a_windows_gradient_does_not_depend_on_how_it_is_split_or_ordered(data: st.DataObject, rows: int) -> None:
    inputs = torch.randn(rows, 2, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)

    def row_losses(parameters: dict[str, nn.Parameter]) -> Tensor:
        return torch.tanh(inputs @ parameters["weight"] + parameters["bias"]) / rows  # [rows]

    whole, split = make_parameters(), make_parameters()
    open_window(whole).add(row_losses(whole).sum())
    window = open_window(split)
    order = data.draw(st.permutations(range(rows)))
    cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1)))) if rows > 1 else []
    for start, end in zip([0, *cuts], [*cuts, rows], strict=True):
        window.add(row_losses(split)[order[start:end]].sum())
    for name in whole:
        assert gradient_of(split[name]) == pytest.approx(gradient_of(whole[name]), rel=1e-12, abs=1e-15)


def test_starting_a_window_zeroes_what_was_there() -> None:
    parameters = make_parameters()
    window = open_window(parameters)
    window.add(parameters["weight"].sum())
    window.start_window()
    assert gradient_of(parameters["weight"]) == [0.0, 0.0]
    window.add(parameters["weight"].sum())
    assert gradient_of(parameters["weight"]) == [1.0, 1.0]


def test_starting_a_window_drops_a_gradient_that_is_not_finite() -> None:
    parameters = make_parameters()
    window = open_window(parameters)
    window.add(parameters["weight"].sum() * math.nan)
    window.start_window()
    assert gradient_of(parameters["weight"]) == [0.0, 0.0]  # multiplying by 0 would have kept NaN


def test_a_parameter_that_a_loss_does_not_use_keeps_what_it_had() -> None:
    parameters = make_parameters()
    window = open_window(parameters)
    window.add(parameters["weight"].sum())
    assert gradient_of(parameters["bias"]) == [0.0]
    window.add(2 * parameters["bias"].sum())
    assert gradient_of(parameters["weight"]) == [1.0, 1.0]
    assert gradient_of(parameters["bias"]) == [2.0]


def test_a_tensor_outside_the_window_gets_no_gradient() -> None:
    parameters, outside = make_parameters(), torch.ones(2, dtype=torch.float64, requires_grad=True)
    open_window(parameters).add((parameters["weight"] * outside).sum())
    assert outside.grad is None


def test_a_loss_without_a_graph_is_refused_and_says_why() -> None:
    parameters = make_parameters()
    window = open_window(parameters)
    with pytest.raises(RuntimeError, match="detached from the parameters"):
        window.add(parameters["weight"].detach().sum())
    with torch.no_grad(), pytest.raises(RuntimeError, match="detached from the parameters"):
        window.add(parameters["weight"].sum())


def test_a_loss_that_reaches_none_of_the_windows_parameters_is_refused() -> None:
    # it has a graph, but to a tensor that nobody steps: training would stand still in silence
    elsewhere = torch.ones(1, requires_grad=True)
    with pytest.raises(RuntimeError, match="detached from the parameters"):
        open_window(make_parameters()).add(elsewhere.sum())


def test_clip_scales_the_whole_gradient_once_and_returns_the_norm_before() -> None:
    parameters = make_parameters()
    window = open_window(parameters)
    window.add((parameters["weight"] * torch.tensor([3.0, 0.0])).sum() + 4 * parameters["bias"].sum())
    assert window.clip(1.0) == pytest.approx(5.0)  # sqrt(3^2 + 0^2 + 4^2)
    assert gradient_of(parameters["weight"]) == pytest.approx([0.6, 0.0], rel=1e-5)
    assert gradient_of(parameters["bias"]) == pytest.approx([0.8], rel=1e-5)


def test_a_gradient_below_the_limit_is_left_alone() -> None:
    parameters = make_parameters()
    window = open_window(parameters)
    window.add(0.25 * parameters["bias"].sum())
    assert window.clip(1.0) == pytest.approx(0.25)
    assert gradient_of(parameters["bias"]) == [0.25]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_the_first_gradient_that_is_not_finite_is_named(factor: float) -> None:
    parameters = make_parameters()
    window = open_window(parameters)
    window.add(parameters["weight"].sum())
    assert window.first_non_finite() is None
    window.add(parameters["bias"].sum() * factor)
    assert window.first_non_finite() == "bias"


def test_the_gradient_is_kept_in_the_parameters_own_dtype() -> None:
    parameters = {"weight": nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}
    open_window(parameters).add(parameters["weight"].float().sum())
    grad = parameters["weight"].grad
    assert grad is not None
    assert grad.dtype == torch.bfloat16
    assert grad.tolist() == [1.0, 1.0]


def test_a_frozen_parameter_is_refused_by_name() -> None:
    parameters = make_parameters()
    parameters["bias"].requires_grad_(False)
    with pytest.raises(ValueError, match="'bias'"):
        GradientWindow(parameters)


def test_a_window_over_no_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="parameters that learn"):
        GradientWindow({})
