"""Claims about the per-token KL penalties (FORMULAS 3): their values, their slopes, and what cannot explode."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.update.kl import Estimator, kl_penalty

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

log_ratio = st.floats(-1e4, 1e4, width=32)


def value_and_slope(
    differences: list[float], estimator: Estimator, *, dtype: torch.dtype = torch.float64, max_log_ratio: float = 10.0
) -> tuple[list[float], list[float]]:
    """The penalty of tokens whose policy - reference is `differences`, and its slope in the policy's logprobs."""
    logprobs = torch.tensor([differences], dtype=dtype, requires_grad=True)  # [1, T]
    reference = torch.zeros(1, len(differences), dtype=dtype)
    penalty = kl_penalty(logprobs, reference, estimator=estimator, max_log_ratio=max_log_ratio)
    (slope,) = torch.autograd.grad(penalty.sum(), logprobs)
    return penalty[0].tolist(), slope[0].tolist()


def slow_value(estimator: Estimator, d: float) -> float:
    """The table of FORMULAS 3, without the clamp."""
    if estimator == "clamped":
        return -d if d < 0 else 0.0
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d * d / 2
    if estimator == "abs":
        return d if d > 0 else -d
    return math.expm1(-d) + d


def slow_slope(estimator: Estimator, d: float) -> float:
    """The derivative of the table by hand, k3's bounded; where there is none, the subgradient 0."""
    if estimator == "clamped":
        return -1.0 if d < 0 else 0.0
    if estimator == "k1":
        return 1.0
    if estimator in ("k2", "k3+"):
        return d
    if estimator == "abs":
        return math.copysign(1.0, d) if d else 0.0
    return min(max(1 - math.exp(-d), -20.0), 20.0)


def slow_penalty(estimator: Estimator, d: float, limit: float) -> tuple[float, float]:
    """Value and slope with the clamp, one token at a time."""
    if -limit <= d <= limit:
        return slow_value(estimator, d), slow_slope(estimator, d)
    edge = limit if d > 0 else -limit
    at_edge = slow_slope(estimator, edge)
    return slow_value(estimator, edge), math.copysign(min(abs(at_edge), 1.0), at_edge) if at_edge else 0.0


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=80, deadline=None)
@given(
    differences=st.lists(
        st.one_of(log_ratio, st.floats(-11, 11), st.sampled_from([0.0, 10.0, -10.0, 1e-12])), min_size=1, max_size=6
    ),
    limit=st.sampled_from([0.5, 2.0, 10.0, 15.0]),
)
def test_values_and_slopes_are_those_of_the_table(estimator: Estimator, differences: list[float], limit: float) -> None:
    values, slopes = value_and_slope(differences, estimator, max_log_ratio=limit)
    expected = [slow_penalty(estimator, d, limit) for d in differences]
    assert values == pytest.approx([value for value, _ in expected], rel=1e-12, abs=1e-15)
    assert slopes == pytest.approx([slope for _, slope in expected], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("estimator", ["clamped", "k1", "k2", "k3", "abs"])
@settings(max_examples=50, deadline=None)
@given(distance=st.floats(0.01, 2.9), sign=st.sampled_from([-1, 1]))
def test_the_slope_is_that_of_the_value_where_it_is_not_bounded(
    estimator: Estimator, distance: float, sign: int
) -> None:
    # a statement without derivatives; |d| < ln 21, where k3's slope is free, and away from the kink at 0
    step, difference = 1e-5, sign * distance
    values, slopes = value_and_slope([difference - step, difference, difference + step], estimator)
    assert slopes[1] == pytest.approx((values[2] - values[0]) / (2 * step), abs=1e-6)


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "k1"])
def test_equal_policies_have_penalty_zero_and_no_pull(estimator: Estimator) -> None:
    # torch.clamp(-d, min=0) would answer slope -1 here, on every token of the first LoRA step
    logprobs = torch.tensor([[-0.5, -7.0, 0.0]], requires_grad=True)
    penalty = kl_penalty(logprobs, logprobs.detach().clone(), estimator=estimator)
    (slope,) = torch.autograd.grad(penalty.sum(), logprobs)
    assert penalty.tolist() == [[0.0, 0.0, 0.0]]
    assert slope.tolist() == [[0.0, 0.0, 0.0]]


def test_clamped_pulls_back_only_tokens_that_became_less_likely() -> None:
    values, slopes = value_and_slope([-2.0, -0.5, 0.5, 2.0], "clamped")
    assert values == [2.0, 0.5, 0.0, 0.0]
    assert slopes == [-1.0, -1.0, 0.0, 0.0]


def test_clamped_is_constant_beyond_the_clamp_and_still_pulls() -> None:
    values, slopes = value_and_slope([-9.9, -10.5, -300.0, 300.0], "clamped")
    assert values == [9.9, 10.0, 10.0, 0.0]
    assert slopes == [-1.0, -1.0, -1.0, 0.0]


def test_the_clamp_can_be_set() -> None:
    values, slopes = value_and_slope([-1.0, -3.0], "clamped", max_log_ratio=2.0)
    assert (values, slopes) == ([1.0, 2.0], [-1.0, -1.0])


def test_a_slope_below_1_at_the_edge_is_kept_beyond_it() -> None:
    # clamp at 0.5: k2's slope there is +-0.5 and its value 0.125; k3's slope is 1 - exp(0.5) = -0.6487 on the left
    assert value_and_slope([-3.0, 3.0], "k2", max_log_ratio=0.5) == ([0.125, 0.125], [-0.5, 0.5])
    assert value_and_slope([-3.0], "k3", max_log_ratio=0.5)[1] == pytest.approx([-0.6487213], abs=1e-7)


def test_k1_k2_and_abs_have_the_values_worked_out_by_hand() -> None:
    assert value_and_slope([-2.0, 3.0, -40.0, 40.0], "k1") == ([-2.0, 3.0, -10.0, 10.0], [1.0, 1.0, 1.0, 1.0])
    # d^2 / 2; beyond the clamp 10^2 / 2 with slope 1 instead of 10
    assert value_and_slope([-2.0, 3.0, -40.0, 40.0], "k2") == ([2.0, 4.5, 50.0, 50.0], [-2.0, 3.0, -1.0, 1.0])
    assert value_and_slope([-2.0, 3.0, -40.0, 40.0], "abs") == ([2.0, 3.0, 10.0, 10.0], [-1.0, 1.0, -1.0, 1.0])


def test_k3_has_the_values_worked_out_by_hand() -> None:
    # exp(-d) + d - 1: d = 1: 0.3678794 + 1 - 1; d = -1: 2.7182818 - 1 - 1; d = ln 2: 0.5 + 0.6931472 - 1
    values, slopes = value_and_slope([1.0, -1.0, math.log(2)], "k3")
    assert values == pytest.approx([0.3678794, 0.7182818, 0.1931472], abs=1e-7)
    # slope 1 - exp(-d): 1 - 0.3678794, 1 - 2.7182818, 1 - 0.5
    assert slopes == pytest.approx([0.6321206, -1.7182818, 0.5], abs=1e-7)


def test_k3_plus_reports_k3_and_pulls_as_k2() -> None:
    differences = [-9.0, -1.0, 0.5, 4.0]
    values, slopes = value_and_slope(differences, "k3+")
    assert values == value_and_slope(differences, "k3")[0]
    assert slopes == differences  # k3 itself would pull with 1 - exp(9) = -8102 at -9, and is bounded to -20


@pytest.mark.parametrize("estimator", ["k3", "k3+"])
def test_k3_keeps_its_precision_where_the_policies_almost_agree(estimator: Estimator) -> None:
    # d^2 / 2 = 5e-9; exp(-d) + d - 1 in float32 would be off by several percent, or 0
    values, _ = value_and_slope([1e-4, -1e-4], estimator, dtype=torch.float32)
    assert values == pytest.approx([5e-9, 5e-9], rel=1e-2)


def test_k3s_slope_is_at_most_20_inside_the_clamp_and_1_beyond() -> None:
    # inside: 1 - exp(3) = -19.0855 is free, 1 - exp(3.5) = -32.1 and 1 - exp(10) = -22025 are bounded
    values, slopes = value_and_slope([-3.0, -3.5, -9.9, -10.1, -1e4, 10.1, 1e4], "k3")
    assert slopes == pytest.approx([1 - math.exp(3), -20.0, -20.0, -1.0, -1.0, 1.0, 1.0], abs=1e-4)
    # beyond it the value is that of the edge: exp(10) - 10 - 1 = 22015.466, exp(-10) + 10 - 1 = 9.0000454
    assert values[3:] == pytest.approx([22015.466, 22015.466, 9.0000454, 9.0000454], rel=1e-7)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=50, deadline=None)
@given(differences=st.lists(log_ratio, min_size=1, max_size=6))
def test_no_log_ratio_makes_a_penalty_infinite_or_steep_or_pull_away(
    estimator: Estimator, differences: list[float]
) -> None:
    values, slopes = value_and_slope(differences, estimator, dtype=torch.float32)
    highest = {"k2": 50.0, "k3": 22015.468, "k3+": 22015.468}.get(estimator, 10.0)
    steepest = {"k2": 10.0, "k3": 20.0, "k3+": 10.0}.get(estimator, 1.0)
    for difference, value, slope in zip(differences, values, slopes, strict=True):
        assert (-10.0 if estimator == "k1" else 0.0) <= value <= highest
        assert abs(slope) <= (steepest if abs(difference) <= 10 else 1.0)
        assert estimator == "k1" or slope * difference >= 0  # descending leads toward the reference


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=50, deadline=None)
@given(data=st.data(), size=st.integers(1, 6))
def test_what_stands_outside_the_mask_is_exactly_nothing(estimator: Estimator, data: st.DataObject, size: int) -> None:
    wild = st.one_of(log_ratio, st.sampled_from([math.nan, math.inf, -math.inf]))
    is_loss = torch.tensor([[data.draw(st.booleans()) for _ in range(size)]])
    clean = torch.tensor([[data.draw(st.floats(-5, 5, width=32)) for _ in range(size)]])
    dirt = torch.tensor([[data.draw(wild) for _ in range(size)]])

    def penalty_and_slope(logprobs: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        logprobs.requires_grad_()
        penalty = kl_penalty(logprobs, reference, estimator=estimator, mask=is_loss)
        return penalty.detach(), torch.autograd.grad(penalty.sum(), logprobs)[0]

    logprobs, reference = torch.where(is_loss, clean, dirt), torch.where(is_loss, 0.5, dirt.flip(1))
    penalty, slope = penalty_and_slope(logprobs, reference)
    assert penalty[~is_loss].tolist() == [0.0] * int((~is_loss).sum())
    assert slope[~is_loss].tolist() == [0.0] * int((~is_loss).sum())
    alone_penalty, alone_slope = penalty_and_slope(clean.clone(), torch.full_like(clean, 0.5))
    assert torch.equal(penalty[is_loss], alone_penalty[is_loss])
    assert torch.equal(slope[is_loss], alone_slope[is_loss])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_row_without_loss_tokens_has_no_penalty_and_no_pull(estimator: Estimator) -> None:
    logprobs = torch.tensor([[-1.0, math.nan]], requires_grad=True)
    penalty = kl_penalty(logprobs, torch.zeros(1, 2), estimator=estimator, mask=torch.zeros(1, 2, dtype=torch.bool))
    (slope,) = torch.autograd.grad(penalty.sum(), logprobs)
    assert (penalty.tolist(), slope.tolist()) == ([[0.0, 0.0]], [[0.0, 0.0]])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_infinite_logprob_inside_the_mask_is_not_hidden(estimator: Estimator) -> None:
    penalty = kl_penalty(torch.tensor([[-math.inf]]), torch.tensor([[-1.0]]), estimator=estimator)
    assert not torch.isfinite(penalty).any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_reference_gets_no_gradient(estimator: Estimator) -> None:
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    reference = torch.tensor([[-0.5]], requires_grad=True)
    kl_penalty(logprobs, reference, estimator=estimator).sum().backward()
    assert reference.grad is None
    assert logprobs.grad is not None


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_half_precision_logprobs_are_compared_in_float32(estimator: Estimator) -> None:
    logprobs = torch.tensor([[-1.5]], dtype=torch.bfloat16)
    penalty = kl_penalty(logprobs, torch.tensor([[-1.001]]), estimator=estimator)
    # d = -0.499 (bfloat16 would round to -0.5); k3: exp(0.499) - 0.499 - 1 = 0.1480733; k2: 0.499^2 / 2 = 0.1245005
    expected = {"k1": -0.499, "k2": 0.1245005, "k3": 0.1480733, "k3+": 0.1480733}.get(estimator, 0.499)
    assert penalty.item() == pytest.approx(expected, abs=1e-6)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 2\].*\[1, 1\]"):
        kl_penalty(torch.zeros(1, 2), torch.zeros(1, 1))


def test_an_unknown_estimator_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'k9'.*clamped, k1, k2, k3, k3\+, abs"):
        kl_penalty(torch.zeros(1, 2), torch.zeros(1, 2), estimator="k9")  # pyright: ignore[reportArgumentType]
