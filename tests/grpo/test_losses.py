"""Claims about the policy loss per token and its reduction over a window (FORMULAS 5 and 6)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.update.losses import clipped_tokens, policy_loss, policy_ratio, reduce_loss


@st.composite
def windows(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs [B, T] float64, a ragged mask [B, T] that leaves at least one token, and advantages [B]."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    lengths = [draw(st.integers(1, width)), *(draw(st.integers(0, width)) for _ in range(rows - 1))]
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    logprobs = [[draw(st.floats(-8, 0)) for _ in range(width)] for _ in range(rows)]
    advantages = [draw(st.sampled_from([-1.5, 0.0, 0.25, 2.0])) for _ in range(rows)]
    return torch.tensor(logprobs).double(), mask, torch.tensor(advantages).double()


def loss_and_slope(
    ratios: list[float], advantage: float, *, clip_low: float = 0.2, clip_high: float = 0.3
) -> tuple[list[float], list[float]]:
    """One row's token losses at the given ratios, and their slopes in the policy's logprobs."""
    old = torch.full((1, len(ratios)), -2.0, dtype=torch.float64)
    logprobs = (old + torch.tensor([ratios]).double().log()).requires_grad_()
    mask = torch.ones_like(old, dtype=torch.bool)
    loss = policy_loss(logprobs, old, torch.tensor([advantage]).double(), mask, clip_low=clip_low, clip_high=clip_high)
    return loss[0].tolist(), torch.autograd.grad(loss.sum(), logprobs)[0][0].tolist()


@settings(max_examples=50, deadline=None)
@given(window=windows())
def test_at_the_old_policy_the_gradient_is_the_policy_gradient(window: tuple[Tensor, Tensor, Tensor]) -> None:
    logprobs, mask, advantages = window
    logprobs.requires_grad_()
    num_tokens = int(mask.sum())
    loss = reduce_loss(policy_loss(logprobs, logprobs.detach(), advantages, mask), mask, num_tokens=num_tokens)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    expected = -(advantages[:, None] * mask) / num_tokens  # -A / N on every sampled token, 0 elsewhere
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_a_good_token_is_pushed_up_to_the_upper_bound_and_no_further() -> None:
    losses, slopes = loss_and_slope([0.5, 1.0, 1.29, 1.31, 2.0], 2.0)
    # -min(r * 2, clip(r, 0.8, 1.3) * 2): 0.5 is below the lower bound, where the minimum keeps the ratio itself
    assert losses == pytest.approx([-1.0, -2.0, -2.58, -2.6, -2.6])
    assert slopes == pytest.approx([-1.0, -2.0, -2.58, 0.0, 0.0])  # -r * A while it counts


def test_a_bad_token_is_pushed_down_to_the_lower_bound_and_no_further() -> None:
    losses, slopes = loss_and_slope([0.5, 0.79, 0.81, 1.0, 2.0], -2.0)
    # -min(r * -2, clip * -2) = max(2 r, 2 clip): 2.0 is above the upper bound, where the maximum keeps the ratio
    assert losses == pytest.approx([1.6, 1.6, 1.62, 2.0, 4.0])
    assert slopes == pytest.approx([0.0, 0.0, 1.62, 2.0, 4.0])


def test_a_row_with_advantage_zero_costs_nothing_and_moves_nothing() -> None:
    losses, slopes = loss_and_slope([0.1, 1.0, 5.0], 0.0)
    assert losses == [0.0, 0.0, 0.0]
    assert slopes == [0.0, 0.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(window=windows(), dirt=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_stands_outside_the_mask_is_exactly_nothing(window: tuple[Tensor, Tensor, Tensor], dirt: float) -> None:
    logprobs, mask, advantages = window
    old = logprobs - 0.1
    spoilt = logprobs.masked_fill(~mask, dirt).requires_grad_()
    loss = policy_loss(spoilt, old.masked_fill(~mask, -dirt), advantages, mask)
    (gradient,) = torch.autograd.grad(reduce_loss(loss, mask, num_tokens=7), spoilt)
    assert loss[~mask].count_nonzero() == 0
    assert gradient[~mask].count_nonzero() == 0
    assert torch.equal(loss[mask], policy_loss(logprobs, old, advantages, mask)[mask])
    assert torch.isfinite(gradient).all()


def test_a_log_ratio_beyond_20_cannot_overflow() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    ratio = policy_ratio(torch.tensor([[0.0, -500.0]]), torch.tensor([[-500.0, 0.0]]), mask)
    torch.testing.assert_close(ratio, torch.tensor([[20.0, -20.0]]).exp())


def test_the_old_policy_and_the_advantages_get_no_gradient() -> None:
    logprobs, old = torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2, requires_grad=True)
    advantages = torch.ones(1, requires_grad=True)
    policy_loss(logprobs, old, advantages, torch.ones(1, 2, dtype=torch.bool)).sum().backward()
    assert old.grad is None
    assert advantages.grad is None
    assert logprobs.grad is not None


def test_clipped_tokens_counts_only_tokens_that_the_clip_silenced() -> None:
    ratio = torch.tensor([[0.5, 0.9, 1.5, 1.5], [0.5, 0.7, 1.1, 1.5], [0.1, 9.0, 0.1, 9.0]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, True], [True, True, True, True]])
    advantages = torch.tensor([1.0, -1.0, 0.0])
    # A > 0: only 1.5 at place 2 (place 3 is masked); A < 0: 0.5 and 0.7, while 1.5 still counts; A = 0: none
    assert clipped_tokens(ratio, advantages, mask, clip_low=0.2, clip_high=0.3).tolist() == [2, 1]


@settings(max_examples=50, deadline=None)
@given(window=windows(), data=st.data())
def test_the_parts_of_a_window_add_up_to_its_loss_however_it_is_split(
    window: tuple[Tensor, Tensor, Tensor], data: st.DataObject
) -> None:
    token_loss, mask, _ = window
    num_tokens = int(mask.sum())
    whole = sum(token_loss[b, t].item() for b, t in mask.nonzero().tolist()) / num_tokens
    order = data.draw(st.permutations(range(len(mask))))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(mask)))))
    parts = [order[start:end] for start, end in zip([0, *cuts], [*cuts, len(mask)], strict=True)]
    total = sum(reduce_loss(token_loss[part], mask[part], num_tokens=num_tokens).item() for part in parts)
    assert total == pytest.approx(whole, rel=1e-12)


def test_the_reduction_divides_by_the_windows_tokens_and_not_by_the_micro_batchs() -> None:
    token_loss = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # (1 + 2 + 8) / 10 tokens of the window, not / 3 here
    assert reduce_loss(token_loss, mask, num_tokens=10).item() == pytest.approx(1.1)


def test_a_masked_token_loss_that_is_nan_does_not_spoil_the_sum() -> None:
    token_loss = torch.tensor([[1.0, math.nan]])
    assert reduce_loss(token_loss, torch.tensor([[True, False]]), num_tokens=1).item() == 1.0


@pytest.mark.parametrize("num_tokens", [0, -3])
def test_a_window_without_loss_tokens_is_refused(num_tokens: int) -> None:
    with pytest.raises(ValueError, match="num_tokens"):
        reduce_loss(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), num_tokens=num_tokens)


@pytest.mark.parametrize(
    ("old_shape", "mask_shape", "rows"), [((2, 2), (2, 3), 2), ((2, 3), (3, 2), 2), ((2, 3), (2, 3), 3)]
)
def test_shapes_that_do_not_fit_are_refused(old_shape: tuple[int, int], mask_shape: tuple[int, int], rows: int) -> None:
    mask = torch.ones(mask_shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\[B"):
        policy_loss(torch.zeros(2, 3), torch.zeros(old_shape), torch.zeros(rows), mask)


def test_an_unknown_variant_is_refused_by_name() -> None:
    zeros, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"'ppo'.*dapo"):
        policy_loss(zeros, zeros, torch.zeros(1), mask, variant="ppo")  # pyright: ignore[reportArgumentType]
