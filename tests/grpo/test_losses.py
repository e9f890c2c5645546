"""Claims about the policy losses per token and their reduction over a window (FORMULAS 5 and 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.update.losses import (
    REDUCTIONS,
    LossInput,
    LossOutput,
    Reduction,
    Variant,
    check_custom_output,
    clipped_tokens,
    load_custom_loss,
    loss_coefficients,
    policy_loss,
    policy_ratio,
    reduce_loss,
)

VARIANTS: tuple[Variant, ...] = get_args(Variant)
CLIPPED: tuple[Variant, ...] = ("dapo", "grpo", "bnpo", "dr_grpo", "gspo")
CLIP_LOW, CLIP_HIGH, MAX_RATIO, POSITIVE, NEGATIVE = 0.2, 0.3, 3.0, 1.0, 1.05
"""The bounds of every test here that names none; MAX_RATIO, POSITIVE and NEGATIVE are CISPO's and SAPO's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One drawn window, as nested lists [B][T] for the slow reference, and as float64 tensors."""

    logprobs: list[list[float]]
    old_logprobs: list[list[float]]
    advantages: list[list[float]]
    mask: list[list[bool]]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """logprobs, old_logprobs, advantages, mask, each [B, T]."""
        logprobs, old, advantages = (
            torch.tensor(x, dtype=torch.float64) for x in (self.logprobs, self.old_logprobs, self.advantages)
        )
        return logprobs, old, advantages, torch.tensor(self.mask)


MODERATE = st.floats(-1.5, 1.5)
# 19.5 and 20.7 lie on both sides of the bound at 20, and no mean of up to four of them lies on it
ANY_GAP = st.one_of(MODERATE, st.sampled_from([0.0, 19.5, -19.5, 20.7, -20.7, 500.0, -500.0]))


@st.composite
def windows(draw: st.DrawFn, gap: st.SearchStrategy[float] = ANY_GAP) -> Window:
    """Log-ratios of the given kind, a mask with holes and rows without tokens (but one), advantages per token."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    places = [(b, t) for b in range(rows) for t in range(width)]
    kept = draw(st.sets(st.sampled_from(places), min_size=1))
    old = [[draw(st.floats(-8, 0)) for _ in range(width)] for _ in range(rows)]
    return Window(
        logprobs=[[value + draw(gap) for value in row] for row in old],
        old_logprobs=old,
        advantages=[[draw(st.sampled_from([-1.5, 0.0, 0.25, 2.0])) for _ in range(width)] for _ in range(rows)],
        mask=[[(b, t) in kept for t in range(width)] for b in range(rows)],
    )


def slow_ratio(gap: float) -> tuple[float, float]:
    """exp of a log-ratio bounded to +-20, and its derivative in that log-ratio."""
    ratio = math.exp(min(max(gap, -20.0), 20.0))
    return ratio, ratio if -20 <= gap <= 20 else 0.0


def slow_clipped(ratio: float, advantage: float, delta: float | None) -> tuple[float, float]:
    """-min(r*A, clip(r)*A) / A branch by branch, and its derivative in r."""
    if advantage > 0:
        return (-ratio, -1.0) if ratio <= 1 + CLIP_HIGH else (-(1 + CLIP_HIGH), 0.0)
    if advantage < 0:
        if ratio < 1 - CLIP_LOW:
            return -(1 - CLIP_LOW), 0.0
        return (-delta, 0.0) if delta is not None and ratio > delta else (-ratio, -1.0)
    return -ratio, -1.0


def slow_sapo(ratio: float, advantage: float) -> tuple[float, float]:
    """-(4/t) sigmoid(t (r - 1)) and its derivative -4 s (1 - s)."""
    temperature = POSITIVE if advantage > 0 else NEGATIVE
    x = temperature * (ratio - 1)
    s = 1 / (1 + math.exp(-x)) if x > -700 else 0.0
    return -4 / temperature * s, -4 * s * (1 - s)


def slow_loss(window: Window, variant: Variant, delta: float | None) -> tuple[list[list[float]], list[list[float]]]:
    """Token losses [B][T], and the derivative of their sum in each log-probability, by hand and without autograd."""
    losses = [[0.0 for _ in row] for row in window.mask]
    slopes = [[0.0 for _ in row] for row in window.mask]
    for b, is_loss in enumerate(window.mask):
        tokens = [t for t, keep in enumerate(is_loss) if keep]
        gaps = {t: window.logprobs[b][t] - window.old_logprobs[b][t] for t in tokens}
        for t in tokens:
            advantage = window.advantages[b][t]
            gap = sum(gaps.values()) / len(gaps) if variant == "gspo" else gaps[t]
            ratio, ratio_slope = slow_ratio(gap)
            if variant == "cispo":
                weight = min(ratio, MAX_RATIO)
                losses[b][t] = -weight * window.logprobs[b][t] * advantage
                slopes[b][t] += -weight * advantage
                continue
            value, slope = slow_sapo(ratio, advantage) if variant == "sapo" else slow_clipped(ratio, advantage, delta)
            losses[b][t] = value * advantage
            # GSPO's ratio moves with every token of the row, each by its 1/n share
            movers = tokens if variant == "gspo" else [t]
            for s in movers:
                slopes[b][s] += slope * advantage * ratio_slope / len(movers)
    return losses, slopes


def slow_reduced(
    token_loss: list[list[float]], mask: list[list[bool]], reduction: Reduction, max_new_tokens: int
) -> float:
    """FORMULAS 6 over a whole window."""
    rows = [[v for v, keep in zip(row, kept, strict=True) if keep] for row, kept in zip(token_loss, mask, strict=True)]
    rows = [row for row in rows if row]
    if reduction == "tokens":
        return sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    if reduction == "rows":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(sum(row) for row in rows) / (len(rows) * max_new_tokens)


def loss_and_slope(
    ratios: list[float], advantage: float, *, variant: Variant = "dapo", **options: Any
) -> tuple[list[float], list[float]]:
    """One row's token losses at the given ratios, and their slopes in the policy's logprobs, which are log r - 2."""
    old = torch.full((1, len(ratios)), -2.0, dtype=torch.float64)
    logprobs = (old + torch.tensor([ratios], dtype=torch.float64).log()).requires_grad_()
    mask = torch.ones_like(old, dtype=torch.bool)
    options = {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH} | options
    loss = policy_loss(logprobs, old, torch.tensor([advantage]).double(), mask, variant=variant, **options)
    return loss[0].tolist(), torch.autograd.grad(loss.sum(), logprobs)[0][0].tolist()


def own_options(delta: float | None = None) -> dict[str, Any]:
    """The bounds of this file, as options of `policy_loss`."""
    return {
        "clip_low": CLIP_LOW,
        "clip_high": CLIP_HIGH,
        "delta": delta,
        "max_ratio": MAX_RATIO,
        "temperature_positive": POSITIVE,
        "temperature_negative": NEGATIVE,
    }


def assert_close(got: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(got.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=60, deadline=None)
@given(window=windows(), delta=st.sampled_from([None, 1.4, 3.0]))
def test_losses_and_gradients_are_those_of_the_loop(variant: Variant, window: Window, delta: float | None) -> None:
    logprobs, old, advantages, mask = window.tensors()
    logprobs.requires_grad_()
    loss = policy_loss(logprobs, old, advantages, mask, variant=variant, **own_options(delta))
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    losses, slopes = slow_loss(window, variant, delta)
    assert_close(loss, losses)
    assert_close(gradient, slopes)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=30, deadline=None)
@given(window=windows(gap=MODERATE), data=st.data())
def test_the_gradient_is_the_difference_quotient_of_the_loss(
    variant: Variant, window: Window, data: st.DataObject
) -> None:
    # CISPO's ratio is detached: there the quotient is taken of the logprobs that it weighs, at a fixed ratio
    logprobs, old, advantages, mask = window.tensors()
    row, column = data.draw(st.sampled_from(mask.nonzero().tolist()))

    def total(values: Tensor) -> Tensor:
        moved_old = old + (values - logprobs).detach() if variant == "cispo" else old
        return policy_loss(values, moved_old, advantages, mask, variant=variant, **own_options(1.4)).sum()

    step = torch.zeros_like(logprobs)
    step[row, column] = 1e-6
    ratio = policy_ratio(logprobs, old, mask, level="sequence" if variant == "gspo" else "token")
    edges = torch.tensor([1 - CLIP_LOW, 1 + CLIP_HIGH, 1.4, MAX_RATIO])
    assume(bool(((ratio[..., None] - edges).abs() > 1e-4).all()))  # no slope at a kink
    quotient = (total(logprobs + step) - total(logprobs - step)).item() / 2e-6
    (gradient,) = torch.autograd.grad(total(logprobs.requires_grad_()), logprobs)
    assert gradient[row, column].item() == pytest.approx(quotient, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25, deadline=None)
@given(window=windows())
def test_at_the_old_policy_the_gradient_is_the_policy_gradient(variant: Variant, window: Window) -> None:
    logprobs, _, advantages, mask = window.tensors()
    row_advantages = advantages[:, 0]
    loss = policy_loss(logprobs.requires_grad_(), logprobs.detach(), row_advantages, mask, variant=variant)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    expected = -(row_advantages[:, None] * mask)  # -A on every sampled token, 0 elsewhere; SAPO's 4/t * t/4 is 1
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25, deadline=None)
@given(window=windows(), share=st.floats(0, 1))
def test_shares_of_the_advantage_give_parts_that_add_up_to_the_loss(
    variant: Variant, window: Window, share: float
) -> None:
    logprobs, old, advantages, mask = window.tensors()
    coefficients = loss_coefficients(logprobs, old, advantages, mask, variant=variant, **own_options(1.4))
    first, second = advantages * share + 0.7, advantages * (1 - share) - 0.7  # shares may oppose the whole
    whole = policy_loss(logprobs, old, advantages, mask, variant=variant, **own_options(1.4))
    parts = (coefficients * first + coefficients * second).masked_fill(~mask, 0.0)
    scale = 1 + coefficients.abs().max().item()
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-14 * scale)


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


def test_delta_bounds_the_ratio_of_bad_tokens_only() -> None:
    # min(r, 3): the bad token at ratio 5 costs 2 * 3 instead of 2 * 5, with no slope
    assert loss_and_slope([2.0, 5.0], -2.0, delta=3.0) == (pytest.approx([4.0, 6.0]), pytest.approx([4.0, 0.0]))
    assert loss_and_slope([0.5, 5.0], 2.0, delta=3.0) == loss_and_slope([0.5, 5.0], 2.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_with_advantage_zero_costs_nothing_and_moves_nothing(variant: Variant) -> None:
    losses, slopes = loss_and_slope([0.1, 1.0, 5.0], 0.0, variant=variant)
    assert losses == [0.0, 0.0, 0.0]
    assert slopes == [0.0, 0.0, 0.0]


def test_advantage_zero_is_unclipped_so_that_opposed_shares_still_act() -> None:
    ratio = torch.tensor([[0.1, 1.0, 5.0]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    for variant in ("dapo", "grpo", "bnpo", "dr_grpo"):
        got = loss_coefficients(ratio.log(), torch.zeros(1, 3), torch.zeros(1), mask, variant=variant, delta=2.0)
        torch.testing.assert_close(got, -ratio)
    got = loss_coefficients(ratio.log(), torch.zeros(1, 3), torch.zeros(1), mask, variant="sapo")
    torch.testing.assert_close(got, -4 / 1.05 * torch.sigmoid(1.05 * (ratio - 1)))  # 0 counts as not positive


def test_gspo_clips_the_rows_ratio_and_moves_all_its_tokens_alike() -> None:
    # log r = mean(ln 2, ln 0.5, ln 1.1) = ln(1.1) / 3: r = 1.0322801; alone, 2 would be clipped at 1.3
    losses, slopes = loss_and_slope([2.0, 0.5, 1.1], 2.0, variant="gspo")
    assert losses == pytest.approx([-2.0645602] * 3, abs=1e-7)
    assert slopes == pytest.approx([-2.0645602] * 3, abs=1e-7)  # three losses, each with r / 3 per token
    losses, slopes = loss_and_slope([2.0, 2.0], 2.0, variant="gspo")
    assert losses == pytest.approx([-2.6, -2.6])
    assert slopes == [0.0, 0.0]


def test_cispo_bounds_the_weight_and_silences_no_token() -> None:
    # -min(r, 3) * A * logprob, logprob = log r - 2; slope -min(r, 3) * A
    losses, slopes = loss_and_slope([0.5, 4.0], 2.0, variant="cispo", max_ratio=3.0)
    assert losses == pytest.approx([-0.5 * 2 * (math.log(0.5) - 2), -3 * 2 * (math.log(4) - 2)])
    assert slopes == pytest.approx([-1.0, -6.0])
    assert loss_and_slope([0.5, 4.0], -2.0, variant="cispo", max_ratio=3.0)[1] == pytest.approx([1.0, 6.0])


def test_sapo_has_a_soft_gate_that_is_sharper_for_bad_tokens() -> None:
    # A = 1, t = 1, r = 2: -4 sigmoid(1) = -2.9242343; slope -4 s (1 - s) r = -4 * 0.1966119 * 2 = -1.5728955
    losses, slopes = loss_and_slope([1.0, 2.0], 1.0, variant="sapo")
    assert losses == pytest.approx([-2.0, -2.9242343], abs=1e-7)
    assert slopes == pytest.approx([-1.0, -1.5728955], abs=1e-7)
    # A = -1, t = 1.05: 4 / 1.05 * sigmoid(0) = 1.9047619 at r = 1; at r = 2 4 / 1.05 * 0.7407749 = 2.8219996
    losses, slopes = loss_and_slope([1.0, 2.0], -1.0, variant="sapo")
    assert losses == pytest.approx([1.9047619, 2.8219996], abs=1e-7)
    assert slopes == pytest.approx([1.0, 1.536220], abs=1e-6)  # 4 * 0.7407749 * 0.2592251 * 2


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25, deadline=None)
@given(window=windows(), dirt=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_stands_outside_the_mask_is_exactly_nothing(variant: Variant, window: Window, dirt: float) -> None:
    logprobs, old, advantages, mask = window.tensors()
    spoilt = logprobs.masked_fill(~mask, dirt).requires_grad_()
    loss = policy_loss(
        spoilt, old.masked_fill(~mask, -dirt), advantages.masked_fill(~mask, dirt), mask, variant=variant
    )
    reduced = reduce_loss(loss, mask, num_tokens=7, reduction=REDUCTIONS[variant], num_rows=3, max_new_tokens=5)
    (gradient,) = torch.autograd.grad(reduced, spoilt)
    assert loss[~mask].count_nonzero() == 0
    assert gradient[~mask].count_nonzero() == 0
    assert torch.equal(loss, policy_loss(logprobs, old, advantages, mask, variant=variant))
    assert torch.isfinite(gradient).all()


def test_a_log_ratio_beyond_20_cannot_overflow() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    ratio = policy_ratio(torch.tensor([[0.0, -500.0]]), torch.tensor([[-500.0, 0.0]]), mask)
    torch.testing.assert_close(ratio, torch.tensor([[20.0, -20.0]]).exp())


def test_a_row_without_tokens_has_ratio_1() -> None:
    logprobs, mask = torch.tensor([[-3.0, math.nan], [-1.0, -2.0]]), torch.tensor([[False, False], [True, False]])
    # second row: the mean over its one token, -1 - (-1.5) = 0.5, on that token only
    ratio = policy_ratio(logprobs, torch.full((2, 2), -1.5), mask, level="sequence")
    torch.testing.assert_close(ratio, torch.tensor([[1.0, 1.0], [math.exp(0.5), 1.0]]))


def test_the_old_policy_and_the_advantages_get_no_gradient() -> None:
    logprobs, old = torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2, requires_grad=True)
    advantages = torch.ones(1, requires_grad=True)
    policy_loss(logprobs, old, advantages, torch.ones(1, 2, dtype=torch.bool)).sum().backward()
    assert old.grad is None
    assert advantages.grad is None
    assert logprobs.grad is not None


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_is_computed_in_float32(variant: Variant) -> None:
    logprobs, old = torch.tensor([[-1.0, -2.0]], dtype=torch.bfloat16), torch.tensor([[-1.001, -2.002]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = policy_loss(logprobs, old, torch.ones(1, dtype=torch.bfloat16), mask, variant=variant)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, policy_loss(logprobs.float(), old, torch.ones(1), mask, variant=variant), rtol=0, atol=0
    )


def test_advantages_per_row_are_those_of_each_of_its_tokens() -> None:
    logprobs, old = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]]), torch.tensor([[-1.5, -1.9], [-2.0, -1.1]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    by_row = policy_loss(logprobs, old, torch.tensor([2.0, -1.0]), mask)
    assert torch.equal(by_row, policy_loss(logprobs, old, torch.tensor([[2.0, 2.0], [-1.0, -1.0]]), mask))


def test_clipped_tokens_counts_only_tokens_that_the_clip_silenced() -> None:
    ratio = torch.tensor([[0.5, 0.9, 1.5, 1.5], [0.5, 0.7, 1.1, 1.5], [0.1, 9.0, 0.1, 9.0]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, True], [True, True, True, True]])
    advantages = torch.tensor([1.0, -1.0, 0.0])
    # A > 0: only 1.5 at place 2 (place 3 is masked); A < 0: 0.5 and 0.7, while 1.5 still counts; A = 0: none
    assert clipped_tokens(ratio, advantages, mask, clip_low=0.2, clip_high=0.3).tolist() == [2, 1]


def test_clipped_tokens_goes_by_each_tokens_own_advantage() -> None:
    ratio, mask = torch.tensor([[0.5, 0.5, 1.5, 1.5]]), torch.ones(1, 4, dtype=torch.bool)
    advantages = torch.tensor([[-1.0, 1.0, -1.0, 1.0]])  # 0.5 is silenced for -1, 1.5 for +1
    assert clipped_tokens(ratio, advantages, mask, clip_low=0.2, clip_high=0.3).tolist() == [1, 1]


@pytest.mark.parametrize("reduction", get_args(Reduction))
@settings(max_examples=40, deadline=None)
@given(window=windows())
def test_reductions_are_those_of_the_loop(reduction: Reduction, window: Window) -> None:
    token_loss, _, _, mask = window.tensors()
    got = reduce_loss(
        token_loss,
        mask,
        num_tokens=int(mask.sum()),
        reduction=reduction,
        num_rows=int(mask.any(dim=1).sum()),
        max_new_tokens=9,
    )
    assert got.item() == pytest.approx(slow_reduced(window.logprobs, window.mask, reduction, 9), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=40, deadline=None)
@given(window=windows(), data=st.data())
def test_the_parts_of_a_window_add_up_to_its_loss_and_gradient_however_it_is_split(
    variant: Variant, window: Window, data: st.DataObject
) -> None:
    logprobs, old, advantages, mask = window.tensors()
    logprobs.requires_grad_()
    num_tokens, num_rows, rows = int(mask.sum()), int(mask.any(dim=1).sum()), len(mask)

    def part(chosen: list[int], padding: int) -> Tensor:
        def wider(values: Tensor) -> Tensor:
            return torch.nn.functional.pad(values[chosen], (0, padding))

        token_loss = policy_loss(
            wider(logprobs), wider(old), wider(advantages), wider(mask), variant=variant, **own_options()
        )
        return reduce_loss(
            token_loss,
            wider(mask),
            num_tokens=num_tokens,
            reduction=REDUCTIONS[variant],
            num_rows=num_rows,
            max_new_tokens=6,
        )

    whole = part(list(range(rows)), 0)
    (whole_gradient,) = torch.autograd.grad(whole, logprobs)
    order = data.draw(st.permutations(range(rows)))
    cuts = sorted(data.draw(st.sets(st.integers(0, rows))))
    splits = [order[start:end] for start, end in zip([0, *cuts], [*cuts, rows], strict=True)]
    parts = [part(split, data.draw(st.integers(0, 2))) for split in splits]
    gradient = sum((torch.autograd.grad(loss, logprobs)[0] for loss in parts), torch.zeros_like(logprobs))
    assert sum(loss.item() for loss in parts) == pytest.approx(whole.item(), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-12, atol=1e-12)
    token_loss, _ = slow_loss(window, variant, None)
    assert whole.item() == pytest.approx(
        slow_reduced(token_loss, window.mask, REDUCTIONS[variant], 6), rel=1e-11, abs=1e-12
    )


def test_reductions_worked_out_by_hand() -> None:
    token_loss = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 64.0, 64.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    # the window has 10 tokens in 4 rows: (1 + 2 + 8) / 10, not / 3 here
    assert reduce_loss(token_loss, mask, num_tokens=10).item() == pytest.approx(1.1)
    # (1.5 + 8) / 4, the empty row in neither
    assert reduce_loss(token_loss, mask, num_tokens=10, reduction="rows", num_rows=4).item() == pytest.approx(2.375)
    # 11 / (4 * 5)
    got = reduce_loss(token_loss, mask, num_tokens=10, reduction="max_tokens", num_rows=4, max_new_tokens=5)
    assert got.item() == pytest.approx(0.55)


@pytest.mark.parametrize("reduction", get_args(Reduction))
def test_a_masked_token_loss_that_is_nan_does_not_spoil_the_sum(reduction: Reduction) -> None:
    token_loss = torch.tensor([[1.0, math.nan], [math.nan, math.nan]])
    mask = torch.tensor([[True, False], [False, False]])
    got = reduce_loss(token_loss, mask, num_tokens=1, reduction=reduction, num_rows=1, max_new_tokens=1)
    assert got.item() == 1.0


@pytest.mark.parametrize(
    ("counts", "missing"),
    [
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"num_tokens": -3}, "num_tokens is -3"),
        ({"num_tokens": 1, "reduction": "rows"}, "num_rows is None"),
        ({"num_tokens": 1, "reduction": "rows", "num_rows": 0}, "num_rows is 0"),
        ({"num_tokens": 1, "reduction": "max_tokens", "max_new_tokens": 3}, "num_rows is None"),
        ({"num_tokens": 1, "reduction": "max_tokens", "num_rows": 3}, "max_new_tokens is None"),
        ({"num_tokens": 1, "reduction": "max_tokens", "num_rows": 3, "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_tokens": 1, "reduction": "mean"}, "'mean'.*tokens, rows, max_tokens"),
    ],
)
def test_a_count_that_a_reduction_needs_is_asked_for_by_name(counts: dict[str, Any], missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        reduce_loss(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), **counts)


@pytest.mark.parametrize(
    ("old_shape", "mask_shape", "advantages_shape"),
    [((2, 2), (2, 3), (2,)), ((2, 3), (3, 2), (2,)), ((2, 3), (2, 3), (3,)), ((2, 3), (2, 3), (2, 1))],
)
def test_shapes_that_do_not_fit_are_refused(
    old_shape: tuple[int, ...], mask_shape: tuple[int, ...], advantages_shape: tuple[int, ...]
) -> None:
    mask = torch.ones(mask_shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\[B"):
        policy_loss(torch.zeros(2, 3), torch.zeros(old_shape), torch.zeros(advantages_shape), mask)


def test_what_cannot_hold_is_refused_by_name() -> None:
    zeros, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"'ppo'.*dapo.*sapo"):
        policy_loss(zeros, zeros, torch.zeros(1), mask, variant="ppo")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"'word'.*token, sequence"):
        policy_ratio(zeros, zeros, mask, level="word")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"delta is 1.2.*1 \+ clip_high = 1.3"):
        policy_loss(zeros, zeros, torch.zeros(1), mask, clip_high=0.3, delta=1.2)


def make_input() -> LossInput:
    """Two rows of three tokens, with gradient."""
    zeros = torch.zeros(2, 3)
    return LossInput(
        logprobs=torch.zeros(2, 3, requires_grad=True),
        old_logprobs=zeros,
        sampler_logprobs=zeros,
        ref_logprobs=zeros,
        advantages=torch.ones(2),
        mask=torch.ones(2, 3, dtype=torch.bool),
    )


def test_a_loss_of_ones_own_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_losses_found.py").write_text(
        "from grpo.update.losses import LossInput, LossOutput\n"
        "def reinforce(inputs: LossInput, *, weight: float) -> LossOutput:\n"
        "    token_loss = -weight * inputs.advantages[:, None] * inputs.logprobs\n"
        "    return LossOutput(token_loss=token_loss, metrics={'row': inputs.advantages, 'token': token_loss})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    inputs = make_input()
    output = check_custom_output(load_custom_loss("own_losses_found:reinforce")(inputs, weight=2.0), inputs)
    (gradient,) = torch.autograd.grad(output.token_loss.sum(), inputs.logprobs)
    assert gradient.tolist() == [[-2.0] * 3] * 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("math", "form package.module:name"),
        ("math:", "form package.module:name"),
        (":exp", "form package.module:name"),
        (".math:exp", "form package.module:name"),
        ("math:exp:more", "form package.module:name"),
        ("no_such_module_at_all:loss", "No module named 'no_such_module_at_all'"),
        ("math:no_such_loss", "math holds nothing named no_such_loss"),
        ("math:pi", "is a float; expected a function of LossInput"),
    ],
)
def test_a_loss_that_cannot_be_loaded_says_why(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as failure:
        load_custom_loss(path)
    assert repr(path) in str(failure.value)


def test_a_loss_whose_module_misses_a_package_names_that_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_losses_broken.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="a_package_that_is_missing"):
        load_custom_loss("own_losses_broken:loss")


@pytest.mark.parametrize(
    ("token_loss", "metrics", "message"),
    [
        (lambda x: x.sum(), {}, r"\[2, 3\], got \[\]; the update divides"),
        (lambda x: x.sum(dim=1), {}, r"got \[2\]"),
        (lambda x: x.tolist(), {}, r"got list"),
        (lambda x: x.detach(), {}, "no grad_fn"),
        (lambda x: x, {"seen": torch.zeros(3)}, r"'seen'.*\[2\], got \[3\]"),
        (lambda x: x, {"seen": 1.0}, r"'seen'.*got float"),
        (lambda x: x, {"kl": torch.zeros(2)}, r"'kl'.*give it another than policy, kl"),
    ],
)
def test_an_output_that_does_not_fit_says_what_was_expected(token_loss: Any, metrics: Any, message: str) -> None:
    inputs = make_input()
    with pytest.raises(ValueError, match=message):
        check_custom_output(LossOutput(token_loss=token_loss(inputs.logprobs * 1), metrics=metrics), inputs)


def test_an_output_that_is_no_loss_output_is_refused() -> None:
    with pytest.raises(ValueError, match="LossOutput, got Tensor"):
        check_custom_output(torch.zeros(2, 3), make_input())


def test_without_gradients_an_output_needs_none() -> None:
    with_gradient = make_input()
    frozen = LossInput(**{name: getattr(with_gradient, name).detach() for name in LossInput.__dataclass_fields__})
    output = LossOutput(token_loss=frozen.logprobs, metrics={})
    assert check_custom_output(output, frozen) is output
