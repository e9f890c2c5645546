"""Claims about the weights for the gap between engine and trainer (FORMULAS 5), against a loop in float64."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.update.rollout_correction import correction_weights, ratio_tails

Level = Literal["token", "sequence"]
Mode = Literal["truncate", "mask"]
Length = Literal["mean", "sum"]

KINDS: list[tuple[Level, Mode, Length]] = [
    ("token", "truncate", "mean"),
    ("token", "mask", "mean"),
    ("sequence", "truncate", "mean"),
    ("sequence", "truncate", "sum"),
    ("sequence", "mask", "mean"),
    ("sequence", "mask", "sum"),
]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[float]], list[list[bool]]]:
    """Log-ratios old - sampler [B][T], extreme ones too, and a mask with holes that may leave a row nothing."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    gap = st.one_of(st.floats(-1.5, 1.5), st.sampled_from([0.0, 25.0, -25.0, 700.0, -700.0]))
    gaps = [[draw(gap) for _ in range(width)] for _ in range(rows)]
    return gaps, [[draw(st.booleans()) for _ in range(width)] for _ in range(rows)]


def slow_weights(
    gaps: list[list[float]], mask: list[list[bool]], kind: tuple[Level, Mode, Length], low: float, high: float
) -> list[list[float]]:
    """FORMULAS 5, one token at a time."""
    level, mode, length = kind
    rows: list[list[float]] = []
    for row, is_loss in zip(gaps, mask, strict=True):
        kept = [gap for gap, keep in zip(row, is_loss, strict=True) if keep]
        weights: list[float] = []
        for gap, keep in zip(row, is_loss, strict=True):
            if not keep:
                weights.append(1.0)
                continue
            log_ratio = gap if level == "token" else sum(kept) / (len(kept) if length == "mean" else 1)
            weight = math.exp(min(max(log_ratio, -20.0), 20.0))
            if mode == "truncate":
                weights.append(min(weight, high))
            else:
                weights.append(weight if low <= weight <= high else 0.0)
        rows.append(weights)
    return rows


def tensors(gaps: list[list[float]], mask: list[list[bool]], dirt: float = -3.0) -> tuple[Tensor, Tensor, Tensor]:
    """old_logprobs, sampler_logprobs (`dirt` in both outside the mask) and the mask."""
    is_loss = torch.tensor(mask)
    old = torch.tensor(gaps, dtype=torch.float64).masked_fill(~is_loss, dirt)
    return old, torch.zeros_like(old).masked_fill(~is_loss, dirt), is_loss


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(batch=batches(), bounds=st.sampled_from([(0.5, 2.0), (0.5, 5.0), (0.0, 1.1)]))
def test_weights_are_those_of_the_loop(
    kind: tuple[Level, Mode, Length],
    batch: tuple[list[list[float]], list[list[bool]]],
    bounds: tuple[float, float],
) -> None:
    level, mode, length = kind
    old, sampler, mask = tensors(*batch)
    got = correction_weights(
        old, sampler, mask, level=level, mode=mode, low=bounds[0], high=bounds[1], sequence_log_ratio=length
    )
    expected = slow_weights(*batch, kind, *bounds)
    for got_row, expected_row in zip(got.tolist(), expected, strict=True):
        assert got_row == pytest.approx(expected_row, rel=1e-12)


def test_token_weights_worked_out_by_hand() -> None:
    # ratios 4, 1.5, 0.25: truncated at 2 -> 2, 1.5, 0.25; masked outside [0.5, 2] -> 0, 1.5, 0
    old, sampler, mask = tensors([[math.log(4), math.log(1.5), math.log(0.25)]], [[True] * 3])
    assert correction_weights(old, sampler, mask)[0].tolist() == pytest.approx([2.0, 1.5, 0.25])
    assert correction_weights(old, sampler, mask, mode="mask")[0].tolist() == pytest.approx([0.0, 1.5, 0.0])


def test_the_mean_over_a_sequence_does_not_depend_on_its_length_and_the_sum_does() -> None:
    # every token at ratio 1.1: the mean's weight is 1.1 at any length, the sum's is 1.1^3 = 1.331, and 1.1 for one
    gaps = [[math.log(1.1)] * 3, [math.log(1.1), 0.0, 0.0]]
    old, sampler, mask = tensors(gaps, [[True, True, True], [True, False, False]])
    by_mean = correction_weights(old, sampler, mask, level="sequence")
    by_sum = correction_weights(old, sampler, mask, level="sequence", sequence_log_ratio="sum")
    torch.testing.assert_close(by_mean, torch.tensor([[1.1, 1.1, 1.1], [1.1, 1.0, 1.0]]).double())
    torch.testing.assert_close(by_sum, torch.tensor([[1.331, 1.331, 1.331], [1.1, 1.0, 1.0]]).double())


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_agrees_has_weight_exactly_1(kind: tuple[Level, Mode, Length]) -> None:
    level, mode, length = kind
    logprobs = -torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) * 5
    mask = torch.arange(4) < torch.tensor([[4], [2], [0]])
    weights = correction_weights(logprobs, logprobs.clone(), mask, level=level, mode=mode, sequence_log_ratio=length)
    assert torch.equal(weights, torch.ones(3, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dirt", [math.nan, math.inf, -math.inf])
def test_what_stands_outside_the_mask_has_weight_1_and_moves_nothing(
    kind: tuple[Level, Mode, Length], dirt: float
) -> None:
    level, mode, length = kind
    gaps, mask = [[0.3, 9.0, -0.2], [1.0, 2.0, 3.0]], [[True, False, True], [False, False, False]]

    def weights(outside: float) -> Tensor:
        return correction_weights(*tensors(gaps, mask, outside), level=level, mode=mode, sequence_log_ratio=length)

    assert torch.equal(weights(dirt), weights(-3.0))
    assert weights(dirt)[~torch.tensor(mask)].tolist() == [1.0] * 4
    assert ratio_tails(*tensors(gaps, mask, dirt)).tolist() == pytest.approx([0.3, 0.2])


def test_neither_weights_nor_tails_carry_a_gradient() -> None:
    old = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert not correction_weights(old, torch.zeros(1, 2), mask).requires_grad
    assert not ratio_tails(old, torch.zeros(1, 2), mask).requires_grad


@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_tails_are_the_absolute_log_ratios_before_any_truncation(
    batch: tuple[list[list[float]], list[list[bool]]],
) -> None:
    tails = ratio_tails(*tensors(*batch))
    expected = [
        abs(gap) for row, is_loss in zip(*batch, strict=True) for gap, keep in zip(row, is_loss, strict=True) if keep
    ]
    assert tails.tolist() == expected  # 700 stays 700: the clamp at 20 is for exp


def test_half_precision_is_compared_in_float32() -> None:
    old, sampler = torch.tensor([[-1.5]], dtype=torch.bfloat16), torch.tensor([[-1.001]])
    assert ratio_tails(old, sampler, torch.tensor([[True]])).item() == pytest.approx(0.499, abs=1e-6)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"old_logprobs \[1, 2\].*mask \[2, 1\]"):
        correction_weights(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.parametrize("option", ["level", "mode", "sequence_log_ratio"])
def test_an_unknown_choice_is_refused_by_name(option: str) -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"{option} is 'nothing'"):
        correction_weights(torch.zeros(1, 1), torch.zeros(1, 1), mask, **{option: "nothing"})  # pyright: ignore[reportArgumentType]
