"""Claims about the per-token KL penalties (FORMULAS 3): their values, their slopes, and what cannot explode."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.update.kl import Estimator, bounded, kl_penalty

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


@pytest.mark.parametrize("estimator", ESTIMATORS)
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


def test_k3_has_the_values_worked_out_by_hand() -> None:
    # exp(-d) + d - 1: d = 1: 0.3678794 + 1 - 1; d = -1: 2.7182818 - 1 - 1; d = ln 2: 0.5 + 0.6931472 - 1
    values, slopes = value_and_slope([1.0, -1.0, math.log(2)], "k3")
    assert values == pytest.approx([0.3678794, 0.7182818, 0.1931472], abs=1e-7)
    # slope 1 - exp(-d): 1 - 0.3678794, 1 - 2.7182818, 1 - 0.5
    assert slopes == pytest.approx([0.6321206, -1.7182818, 0.5], abs=1e-7)


def test_k3_keeps_its_precision_where_the_policies_almost_agree() -> None:
    # d^2 / 2 = 5e-9; exp(-d) + d - 1 in float32 would be off by several percent, or 0
    values, _ = value_and_slope([1e-4, -1e-4], "k3", dtype=torch.float32)
    assert values == pytest.approx([5e-9, 5e-9], rel=1e-2)


@settings(max_examples=50, deadline=None)
@given(difference=st.floats(-3.0, 9.9))
def test_k3s_slope_is_that_of_its_value_where_it_is_not_bounded(difference: float) -> None:
    step = 1e-5
    values, slopes = value_and_slope([difference - step, difference, difference + step], "k3")
    assert slopes[1] == pytest.approx((values[2] - values[0]) / (2 * step), abs=1e-6)


def test_k3s_slope_is_at_most_20_inside_the_clamp_and_1_beyond() -> None:
    # inside: 1 - exp(3) = -19.0855 is free, 1 - exp(3.5) = -32.1 and 1 - exp(10) = -22025 are bounded
    values, slopes = value_and_slope([-3.0, -3.5, -9.9, -10.1, -1e4, 10.1, 1e4], "k3")
    assert slopes == pytest.approx([1 - math.exp(3), -20.0, -20.0, -1.0, -1.0, 1.0, 1.0], abs=1e-4)
    # beyond it the value is that of the edge: exp(10) - 10 - 1 = 22015.466, exp(-10) + 10 - 1 = 9.0000454
    assert values[3:] == pytest.approx([22015.466, 22015.466, 9.0000454, 9.0000454], rel=1e-7)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=50, deadline=None)
@given(differences=st.lists(log_ratio, min_size=1, max_size=6))
def test_no_log_ratio_makes_a_penalty_negative_or_infinite_or_steep(
    estimator: Estimator, differences: list[float]
) -> None:
    values, slopes = value_and_slope(differences, estimator, dtype=torch.float32)
    highest = 10.0 if estimator == "clamped" else 22015.468
    for difference, value, slope in zip(differences, values, slopes, strict=True):
        assert 0.0 <= value <= highest
        assert abs(slope) <= (20.0 if estimator == "k3" and abs(difference) <= 10 else 1.0)
        assert slope * difference >= 0  # descending leads toward the reference, never away


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1e9, 1e9, width=32), min_size=1, max_size=6), limit=st.floats(0.5, 20.0, width=32))
def test_bounded_is_exactly_the_clamp_and_passes_the_gradient_through(values: list[float], limit: float) -> None:
    log_ratios = torch.tensor(values, requires_grad=True)
    got = bounded(log_ratios, limit)
    (slope,) = torch.autograd.grad(got.sum(), log_ratios)
    assert got.tolist() == [min(max(value, -limit), limit) for value in values]
    assert slope.tolist() == [1.0] * len(values)


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
    assert penalty.dtype == torch.float32
    # d = -0.499: relu 0.499 (bfloat16 would round to 0.5); k3: exp(0.499) - 0.499 - 1 = 0.1480733
    assert penalty.item() == pytest.approx({"clamped": 0.499, "k3": 0.1480733}[estimator], abs=1e-6)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 2\].*\[1, 1\]"):
        kl_penalty(torch.zeros(1, 2), torch.zeros(1, 1))


def test_an_unknown_estimator_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'k9'.*clamped, k3"):
        kl_penalty(torch.zeros(1, 2), torch.zeros(1, 2), estimator="k9")  # pyright: ignore[reportArgumentType]
