"""Claims about the window's gradient: what is added stays, until the next window begins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grpo.update.combination import CombinationMethod
from grpo.update.gradients import GradientWindow, combine_gradients


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


# --- objectives kept apart


INPUTS = torch.randn(6, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
SIGNS = torch.tensor([[1.0, -0.5, 0.2, 0.9, -1.0, 0.4], [-0.8, 0.3, 1.0, -0.6, 0.5, 0.1]], dtype=torch.float64)


def objective_losses(parameters: dict[str, nn.Parameter], rows: slice = slice(None)) -> Tensor:
    """[2] two objectives' parts of a window's loss, over the same rows."""
    outputs = torch.tanh(INPUTS[rows] @ parameters["weight"].double() + parameters["bias"].double())  # [rows]
    return SIGNS[:, rows] @ outputs


def window_gradients() -> Tensor:
    """[O, D] each objective's gradient of the whole window, by itself."""
    parameters = make_parameters()
    losses = objective_losses(parameters)
    shares = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([part.flatten() for part in share]) for share in shares])


def add_both(window: GradientWindow, losses: Tensor) -> None:
    window.add(losses[0], objective=0, keep_graph=True)
    window.add(losses[1], objective=1)


def flat_gradient(parameters: dict[str, nn.Parameter]) -> list[float]:
    return [x for parameter in parameters.values() for x in gradient_of(parameter)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_objectives_gradients_summed_are_the_plain_gradient(dtype: torch.dtype) -> None:
    plain, apart = make_parameters(), make_parameters()
    for parameters in (plain, apart):
        for parameter in parameters.values():
            parameter.data = parameter.data.to(dtype)
    plain_window, window = open_window(plain), GradientWindow(apart)
    window.start_window(num_objectives=2)
    for rows in (slice(0, 2), slice(2, 5), slice(5, 6)):
        plain_window.add(objective_losses(plain, rows).sum())
        add_both(window, objective_losses(apart, rows))
    window.combine("sum")
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert flat_gradient(apart) == pytest.approx(flat_gradient(plain), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("method", ["sum", "pcgrad", "cagrad", "mgda"])
def test_a_window_is_combined_once_whole_and_what_has_no_objective_is_added(method: CombinationMethod) -> None:
    parameters = make_parameters()
    window = GradientWindow(parameters)
    window.start_window(num_objectives=2)
    for rows in (slice(0, 2), slice(2, 6)):
        add_both(window, objective_losses(parameters, rows))
        window.add(parameters["weight"].sum() / 2)  # without an objective: 1 for each weight in the end
    gram = window.combine(method, seed=4)
    expected = window_gradients()
    together = combine_gradients(expected, method=method, seed=4) + torch.tensor([1.0, 1.0, 0.0])
    assert flat_gradient(parameters) == pytest.approx(together.tolist(), rel=1e-9)
    torch.testing.assert_close(gram, expected @ expected.T)


@pytest.mark.parametrize("method", ["pcgrad", "cagrad", "mgda"])
def test_combining_per_micro_batch_would_have_given_another_gradient(method: CombinationMethod) -> None:
    def combined_in(cuts: list[slice]) -> Tensor:
        total = torch.zeros(3, dtype=torch.float64)
        for rows in cuts:
            parameters = make_parameters()
            window = GradientWindow(parameters)
            window.start_window(num_objectives=2)
            add_both(window, objective_losses(parameters, rows))
            window.combine(method)
            total += torch.tensor(flat_gradient(parameters), dtype=torch.float64)
        return total

    per_window = combined_in([slice(0, 6)])
    per_micro_batch = combined_in([slice(0, 1), slice(1, 4), slice(4, 6)])
    assert float((per_window - per_micro_batch).norm()) > 0.01 * float(per_window.norm())


def test_an_objective_may_touch_only_some_parameters_or_none() -> None:
    parameters = make_parameters()
    window = GradientWindow(parameters)
    window.start_window(num_objectives=3)
    window.add(2 * parameters["bias"].sum(), objective=2)
    window.add(parameters["weight"].sum(), objective=0)  # and nothing for 1
    gram = window.combine("pcgrad")
    assert flat_gradient(parameters) == [1.0, 1.0, 2.0]
    assert gram.tolist() == [[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 4.0]]


def test_a_scalar_parameter_is_combined_too() -> None:
    parameters = {"gain": nn.Parameter(torch.tensor(3.0))}
    window = GradientWindow(parameters)
    window.start_window(num_objectives=2)
    window.add(parameters["gain"] ** 2, objective=0)  # 6
    window.add(-2 * parameters["gain"], objective=1)  # -2
    assert window.combine("mgda").tolist() == [[36.0, -12.0], [-12.0, 4.0]]
    assert parameters["gain"].grad is not None
    assert parameters["gain"].grad.tolist() == 0.0  # 0 lies between 6 and -2


def test_objectives_of_bfloat16_parameters_are_summed_in_float32() -> None:
    parameters = {"weight": nn.Parameter(torch.ones(1, dtype=torch.bfloat16))}
    window = GradientWindow(parameters)
    window.start_window(num_objectives=1)
    for _ in range(4):
        window.add(parameters["weight"].float().sum(), objective=0)
        window.add(parameters["weight"].float().sum() * 2**-9, objective=0)  # bfloat16 has 8 bits: 1 + 2^-9 is 1
    assert window.combine().tolist() == [[(4 + 4 * 2**-9) ** 2]]


def test_a_detached_loss_of_an_objective_is_refused() -> None:
    parameters = make_parameters()
    window = GradientWindow(parameters)
    window.start_window(num_objectives=1)
    with pytest.raises(RuntimeError, match="detached from the parameters"):
        window.add(parameters["weight"].detach().sum(), objective=0)


@pytest.mark.parametrize("objective", [-1, 2])
def test_an_objective_that_the_window_does_not_keep_is_refused(objective: int) -> None:
    parameters = make_parameters()
    window = GradientWindow(parameters)
    window.start_window(num_objectives=2)
    with pytest.raises(ValueError, match=f"objective {objective} of a window that keeps 2 apart"):
        window.add(parameters["bias"].sum(), objective=objective)


def test_a_window_is_combined_only_once() -> None:
    parameters = make_parameters()
    window = GradientWindow(parameters)
    window.start_window(num_objectives=1)
    window.add(parameters["bias"].sum(), objective=0)
    window.combine()
    with pytest.raises(ValueError, match="kept apart"):
        window.combine()
    with pytest.raises(ValueError, match="keeps 0 apart"):
        window.add(parameters["bias"].sum(), objective=0)
    assert flat_gradient(parameters) == [0.0, 0.0, 1.0]


def test_a_new_window_starts_every_objective_at_zero() -> None:
    parameters = make_parameters()
    window = GradientWindow(parameters)
    window.start_window(num_objectives=1)
    window.add(parameters["bias"].sum() * math.nan, objective=0)
    window.start_window(num_objectives=1)
    window.add(parameters["bias"].sum(), objective=0)
    window.combine()
    assert flat_gradient(parameters) == [0.0, 0.0, 1.0]


def test_clipping_before_combining_is_refused() -> None:
    window = GradientWindow(make_parameters())
    window.start_window(num_objectives=2)
    with pytest.raises(RuntimeError, match="combine"):
        window.clip(1.0)


def test_an_objectives_gradient_that_is_not_finite_is_named_and_not_combined() -> None:
    parameters = make_parameters()
    window = GradientWindow(parameters)
    window.start_window(num_objectives=2)
    window.add(parameters["weight"].sum(), objective=0)
    assert window.first_non_finite() is None
    window.add(parameters["bias"].sum() * math.inf, objective=1)
    assert window.first_non_finite() == "bias"
    with pytest.raises(ValueError, match="NaN or infinity"):
        window.combine()
    assert flat_gradient(parameters) == [0.0, 0.0, 0.0]


# --- ranks


def reduce_together(windows: list[GradientWindow]) -> list[int]:
    """Every window as a rank: their n-th collectives meet and are summed. Returns the sizes that travelled."""
    sent: list[list[Tensor]] = []

    def record(flat: Tensor) -> Tensor:
        sent[-1].append(flat.clone())
        return flat

    for window in windows:  # leaves every gradient as it was
        sent.append([])
        window.reduce(record)
    sums = [torch.stack(parts).sum(dim=0) for parts in zip(*sent, strict=True)]
    for window in windows:
        left = iter(sums)
        window.reduce(lambda flat, left=left: flat.copy_(next(left)))
    return [len(each) for each in sums]


@pytest.mark.parametrize("method", ["sum", "pcgrad", "cagrad", "mgda"])
def test_two_ranks_with_uneven_rows_reach_the_gradient_of_one(method: CombinationMethod) -> None:
    ranks = [make_parameters(), make_parameters()]
    windows = [GradientWindow(parameters) for parameters in ranks]
    for window, parameters, cuts in zip(windows, ranks, ([slice(0, 1)], [slice(1, 3), slice(3, 6)]), strict=True):
        window.start_window(num_objectives=2)
        for rows in cuts:
            add_both(window, objective_losses(parameters, rows))
    windows[1].add(ranks[1]["bias"].sum())  # a term without an objective, on one rank only
    assert reduce_together(windows) == [9]  # three entries, for .grad and two objectives, in one collective
    for window in windows:
        window.combine(method)
    expected = combine_gradients(window_gradients(), method=method) + torch.tensor([0.0, 0.0, 1.0])
    assert flat_gradient(ranks[0]) == pytest.approx(expected.tolist(), rel=1e-10)
    assert flat_gradient(ranks[0]) == flat_gradient(ranks[1])


def test_a_rank_that_learned_nothing_takes_part_and_ends_with_the_others_gradient() -> None:
    idle, busy = make_parameters(), make_parameters()
    windows = [open_window(idle), open_window(busy)]
    windows[1].add((busy["weight"] ** 2).sum())
    reduce_together(windows)
    assert flat_gradient(idle) == flat_gradient(busy) == [2.0, 4.0, 0.0]


def test_an_only_rank_reduces_nothing() -> None:
    parameters = make_parameters()
    window = open_window(parameters)
    window.add(parameters["weight"].sum())
    window.reduce(None)
    assert flat_gradient(parameters) == [1.0, 1.0, 0.0]


def test_a_sum_over_ranks_that_comes_back_in_a_new_tensor_is_taken() -> None:
    parameters = make_parameters()
    window = open_window(parameters)
    window.add(parameters["weight"].sum())
    window.reduce(lambda flat: flat * 2)  # as two equal ranks would
    assert flat_gradient(parameters) == [2.0, 2.0, 0.0]


def test_small_tensors_travel_together_and_large_ones_alone_whatever_their_layout() -> None:
    quarter = 2**21  # entries: 8 MiB in float32, four of them fill the 32 MiB that travel at once
    shapes = [(quarter,), (2, quarter // 2), (quarter,), (quarter,), (7,), (5 * quarter,), (3,)]
    parameters = {str(i): nn.Parameter(torch.zeros(shape)) for i, shape in enumerate(shapes)}
    parameters["1"] = nn.Parameter(torch.zeros(quarter // 2, 2).T)  # as a transposed weight lies in memory
    window = open_window(parameters)
    window.add(parameters["1"].select(0, 1).sum() + 3 * parameters["6"].sum())
    sizes: list[int] = []

    def double(flat: Tensor) -> Tensor:
        sizes.append(len(flat))
        return flat.mul_(2)

    window.reduce(double)
    assert sizes == [4 * quarter, 7, 5 * quarter, 3]
    grad = parameters["1"].grad
    assert grad is not None
    assert grad.mean(dim=1).tolist() == [0.0, 2.0]
    assert gradient_of(parameters["6"]) == [6.0] * 3


def test_bfloat16_gradients_are_added_between_ranks_in_float32() -> None:
    parameters = {"weight": nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}
    window = open_window(parameters)
    window.add(parameters["weight"].float().sum())
    kinds: list[torch.dtype] = []

    def record(flat: Tensor) -> Tensor:
        kinds.append(flat.dtype)
        return flat + 2.0

    window.reduce(record)
    assert kinds == [torch.float32]
    grad = parameters["weight"].grad
    assert grad is not None
    assert grad.dtype == torch.bfloat16
    assert grad.tolist() == [3.0, 3.0]
