"""Claims about scores -> advantages (FORMULAS 2): a missing verdict is no number, and moves nobody else's."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.advantages import Advantages, Combine, Scale, group_advantages

NAN = math.nan
EPS = 1e-4
COMBINES: tuple[Combine, ...] = get_args(Combine)
SCALES: tuple[Scale, ...] = get_args(Scale)
MODES = list(itertools.product(COMBINES, SCALES))

Scores = list[list[list[float | None]]]
"""[P][K][O], None where there is no verdict."""

# multiples of 1/64: sums of them are exact, so that both ways of computing agree on which group is flat
score = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0]), st.integers(-6400, 6400).map(lambda n: n / 64))
float_score = st.floats(-100, 100, width=32)


class Case(NamedTuple):
    """One batch."""

    scores: Scores
    weights: list[float]
    applies: list[list[bool]]


@st.composite
def batches(draw: st.DrawFn) -> Case:
    num_prompts, size, num_objectives = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 3))

    def fill(values: st.SearchStrategy[object]) -> list[list[object]]:
        return [[draw(values) for _ in range(num_objectives)] for _ in range(size)]

    return Case(
        scores=[fill(score) for _ in range(num_prompts)],  # pyright: ignore[reportArgumentType]
        weights=[draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])) for _ in range(num_objectives)],
        applies=[[draw(st.booleans()) for _ in range(num_objectives)] for _ in range(num_prompts)],
    )


def any_verdict(group: list[float | None]) -> bool:
    return any(value is not None for value in group)


def tensor_of(scores: Scores, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([[[NAN if s is None else s for s in row] for row in group] for group in scores], dtype=dtype)


def one_objective(*scores: float, scale: Scale = "group", dtype: torch.dtype = torch.float32) -> Advantages:
    """One group, one objective of weight 1."""
    return group_advantages(torch.tensor(scores, dtype=dtype)[None, :, None], torch.ones(1), scale=scale)


def column(advantages: Advantages) -> list[float]:
    return advantages.per_objective[0, :, 0].tolist()


# The slow twin: FORMULAS 2 as loops over Python floats.


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def std(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def slow_normalise(groups: list[list[float | None]], scale: Scale) -> list[list[float]]:
    """[P][K] scores of one objective -> [P][K]."""
    batch_std = std([s for group in groups for s in group if s is not None])
    result: list[list[float]] = []
    for group in groups:
        there = [s for s in group if s is not None]
        teaches = len(there) >= 2 and max(there) - min(there) > 1e-6 * max(1.0, *map(abs, there))
        divisor = {"group": std(there) + EPS, "batch": batch_std + EPS, "none": 1.0}[scale]
        result.append([(s - mean(there)) / divisor if teaches and s is not None else 0.0 for s in group])
    return result


def slow_combined(case: Case, combine: Combine, scale: Scale) -> list[list[float]]:
    """[P][K]"""
    prompts, rows = range(len(case.scores)), range(len(case.scores[0]))
    objectives = range(len(case.weights))
    scores = [
        [[case.scores[p][k][o] if case.applies[p][o] else None for o in objectives] for k in rows] for p in prompts
    ]
    if combine == "summed":
        totals: list[list[float | None]] = []
        for p in prompts:
            asked = [o for o in objectives if case.applies[p][o]]
            own = [[(case.weights[o], scores[p][k][o]) for o in asked] for k in rows]
            totals.append(
                [
                    None if not row or any(s is None for _, s in row) else sum(w * (s or 0) for w, s in row)
                    for row in own
                ]
            )
        return slow_normalise(totals, scale)
    columns = [slow_normalise([[scores[p][k][o] for k in rows] for p in prompts], scale) for o in objectives]
    x = [[math.fsum(case.weights[o] * columns[o][p][k] for o in objectives) for k in rows] for p in prompts]
    if len(case.weights) == 1:
        return x
    with_verdict = [x[p][k] for p in prompts for k in rows if any(s is not None for s in scores[p][k])]
    factor = 1 / (std(with_verdict) + EPS) if len(with_verdict) >= 2 else 0.0
    return [[value * factor for value in row] for row in x]


@pytest.mark.parametrize(("combine", "scale"), MODES)
@settings(max_examples=40, deadline=None)
@given(case=batches())
def test_advantages_equal_those_of_plain_loops(combine: Combine, scale: Scale, case: Case) -> None:
    got = group_advantages(
        tensor_of(case.scores),
        torch.tensor(case.weights, dtype=torch.float64),
        combine=combine,
        scale=scale,
        applies=torch.tensor(case.applies),
    )
    expected = torch.tensor(slow_combined(case, combine, scale), dtype=torch.float64)
    torch.testing.assert_close(got.combined, expected, rtol=1e-10, atol=1e-10)
    assert not got.per_objective.isnan().any()


# Missing is missing


@pytest.mark.parametrize("combine", COMBINES)
def test_a_missing_verdict_is_left_out_of_the_mean_and_not_counted_as_zero(combine: Combine) -> None:
    scores = torch.tensor([[[1.0], [NAN], [0.0], [0.0]]])
    got = group_advantages(scores, torch.ones(1), combine=combine, scale="none")
    # mean over three verdicts: 1/3; with the missing one as 0 it would be 1/4, giving 0.75 and -0.25
    torch.testing.assert_close(got.combined, torch.tensor([[2 / 3, 0.0, -1 / 3, -1 / 3]]))
    torch.testing.assert_close(got.per_objective[..., 0], torch.tensor([[2 / 3, 0.0, -1 / 3, -1 / 3]]))
    assert got.valid[..., 0].tolist() == [[True, False, True, True]]
    assert got.combined[0, 1].item() == 0.0


def test_the_std_is_unbiased_and_over_the_verdicts_only() -> None:
    # verdicts 3, 1: mean 2, deviations +-1, std sqrt((1 + 1) / (2 - 1)) = 1.41421, so 1 / (1.41421 + 0.0001) = 0.70706
    got = column(one_objective(3.0, NAN, 1.0, NAN))
    assert got == pytest.approx([0.7070568, 0.0, -0.7070568, 0.0], abs=1e-6)


@pytest.mark.parametrize(("combine", "scale"), MODES)
@settings(max_examples=50, deadline=None)
@given(data=st.data(), group=st.lists(st.one_of(st.none(), float_score), min_size=1, max_size=40).filter(any_verdict))
def test_a_missing_verdict_moves_no_bit_of_any_other_advantage(
    combine: Combine, scale: Scale, data: st.DataObject, group: list[float | None]
) -> None:
    there = [k for k, value in enumerate(group) if value is not None]
    whole = tensor_of([[[value] for value in group]], torch.float32)  # [1, K, 1]
    alone = whole[:, there]
    weights = torch.tensor([data.draw(st.sampled_from([0.3, 1.0]))])
    got = group_advantages(whole, weights, combine=combine, scale=scale)
    expected = group_advantages(alone, weights, combine=combine, scale=scale)
    assert torch.equal(got.per_objective[:, there], expected.per_objective)
    assert torch.equal(got.combined[:, there], expected.combined)
    assert got.combined.count_nonzero() == got.combined[:, there].count_nonzero()


@pytest.mark.parametrize("scale", SCALES)
@settings(max_examples=50, deadline=None)
@given(case=batches())
def test_one_objectives_missing_verdicts_move_no_bit_of_another_objective(scale: Scale, case: Case) -> None:
    scores, weights = tensor_of(case.scores, torch.float32), torch.tensor(case.weights)
    together = group_advantages(scores, weights, scale=scale)
    for o in range(weights.numel()):
        alone = group_advantages(scores[..., o : o + 1], weights[o : o + 1], scale=scale)
        assert torch.equal(together.per_objective[..., o], alone.per_objective[..., 0])
        assert torch.equal(together.is_flat[..., o], alone.is_flat[..., 0])


@pytest.mark.parametrize(("combine", "scale"), MODES)
def test_a_score_that_does_not_apply_moves_nothing_whatever_it_is(combine: Combine, scale: Scale) -> None:
    applies = torch.tensor([[True, False], [True, True]])
    scores = torch.tensor([[[1.0, 5.0], [0.0, 9.0], [0.5, 2.0]], [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]])
    other = scores.clone()
    other[0, :, 1] = torch.tensor([-100.0, NAN, 7.0])
    weights = torch.tensor([1.0, 0.5])
    first = group_advantages(scores, weights, combine=combine, scale=scale, applies=applies)
    second = group_advantages(other, weights, combine=combine, scale=scale, applies=applies)
    for field in ("per_objective", "combined", "valid", "is_flat"):
        assert torch.equal(getattr(first, field), getattr(second, field)), field
    assert first.scale_factor == second.scale_factor
    assert first.valid[0, :, 1].tolist() == [False, False, False]
    assert first.per_objective[0, :, 1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("combine", "scale"), MODES)
@pytest.mark.parametrize("scores", [[NAN, NAN, NAN], [NAN, 4.0, NAN], [4.0]])
def test_fewer_than_two_verdicts_give_zero_and_are_not_called_flat(
    combine: Combine, scale: Scale, scores: list[float]
) -> None:
    got = group_advantages(torch.tensor(scores)[None, :, None], torch.ones(1), combine=combine, scale=scale)
    assert got.combined.tolist() == [[0.0] * len(scores)]
    assert got.per_objective.count_nonzero() == 0
    assert got.is_flat.tolist() == [[False]]


# Groups that teach nothing


@pytest.mark.parametrize(("combine", "scale"), MODES)
@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e6])
def test_equal_scores_give_exactly_zero_and_are_flagged(combine: Combine, scale: Scale, value: float) -> None:
    # 0.1 + 0.1 + 0.1 over 3 is not 0.1 in floats: only the flag makes this exact
    scores = torch.tensor([[[value], [value], [NAN], [value]], [[1.0], [0.0], [1.0], [0.0]]])
    got = group_advantages(scores, torch.ones(1), combine=combine, scale=scale)
    assert got.combined[0].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert got.is_flat.tolist() == [[True], [False]]


def test_scores_count_as_equal_relative_to_their_size() -> None:
    # the tolerance is 1e-6 * max(1, largest): 1e-3 at 1000, 1e-6 at 0.5
    assert one_objective(1000.0, 1000.0005, dtype=torch.float64).is_flat.item()
    assert not one_objective(1000.0, 1000.002, dtype=torch.float64).is_flat.item()
    assert one_objective(0.5, 0.5000005, dtype=torch.float64).is_flat.item()
    assert not one_objective(0.5, 0.500002, dtype=torch.float64).is_flat.item()


def test_an_objective_that_does_not_apply_is_not_counted_as_flat() -> None:
    scores = torch.tensor([[[1.0, NAN], [1.0, NAN]], [[NAN, 0.0], [NAN, 1.0]]])
    applies = torch.tensor([[True, False], [False, True]])
    for combine in COMBINES:
        got = group_advantages(scores, torch.ones(2), combine=combine, applies=applies)
        assert got.is_flat.tolist() == [[True, False], [False, False]], combine


# Symmetries


@pytest.mark.parametrize(("combine", "scale"), MODES)
@settings(max_examples=40, deadline=None)
@given(case=batches(), data=st.data())
def test_reordering_completions_reorders_advantages(
    combine: Combine, scale: Scale, case: Case, data: st.DataObject
) -> None:
    scores, weights = tensor_of(case.scores), torch.tensor(case.weights, dtype=torch.float64)
    order = data.draw(st.permutations(range(scores.shape[1])))
    straight = group_advantages(scores, weights, combine=combine, scale=scale)
    reordered = group_advantages(scores[:, order], weights, combine=combine, scale=scale)
    torch.testing.assert_close(reordered.combined, straight.combined[:, order], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(reordered.per_objective, straight.per_objective[:, order], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", ["group", "none"])
@settings(max_examples=40, deadline=None)
@given(group=st.lists(score, min_size=2, max_size=8), shift=st.integers(-64, 64))
def test_adding_a_constant_to_a_groups_scores_leaves_its_advantages(
    scale: Scale, group: list[float | None], shift: int
) -> None:
    scores = tensor_of([[[value] for value in group]])
    before = group_advantages(scores, torch.ones(1), scale=scale)
    after = group_advantages(scores + shift, torch.ones(1), scale=scale)
    torch.testing.assert_close(after.combined, before.combined, rtol=1e-10, atol=1e-10)


def test_scores_far_from_zero_keep_their_std_in_float32() -> None:
    # mean of squares minus square of mean would be 1e8 - 1e8 in float32; centred it is the case of 1 and 0
    assert column(one_objective(10001.0, 10000.0)) == pytest.approx(column(one_objective(1.0, 0.0)), rel=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@settings(max_examples=40, deadline=None)
@given(case=batches())
def test_every_objectives_advantages_sum_to_zero_in_each_group(scale: Scale, case: Case) -> None:
    got = group_advantages(tensor_of(case.scores), torch.tensor(case.weights), scale=scale)
    assert got.per_objective.sum(dim=1).abs().max().item() < 1e-10 / EPS


# Scale


def test_scale_group_gives_each_group_unit_spread_whatever_its_range() -> None:
    # 1, 0: deviations +-0.5, std 0.70711; 10, 0: deviations +-5, std 7.07107
    assert column(one_objective(1.0, 0.0)) == pytest.approx([0.7070068, -0.7070068], abs=1e-6)
    assert column(one_objective(10.0, 0.0)) == pytest.approx([0.7070968, -0.7070968], abs=1e-6)


def test_scale_batch_divides_by_the_spread_of_all_verdicts_of_the_objective() -> None:
    scores = torch.tensor([[[1.0], [0.0]], [[5.0], [2.0]]], dtype=torch.float64)
    got = group_advantages(scores, torch.ones(1), scale="batch")
    # all of 1, 0, 5, 2: mean 2, squares 1 + 4 + 9 + 0 = 14, std sqrt(14 / 3) = 2.1602469
    expected = [[0.5 / 2.1603469, -0.5 / 2.1603469], [1.5 / 2.1603469, -1.5 / 2.1603469]]
    torch.testing.assert_close(got.combined, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)


def test_scale_none_keeps_differences_in_the_rewards_own_unit() -> None:
    assert column(one_objective(10.0, 0.0, scale="none")) == [5.0, -5.0]


# Several objectives


def test_the_decoupled_factor_is_one_over_the_spread_of_the_weighted_sum() -> None:
    scores = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 4.0], [0.0, 0.0]]], dtype=torch.float64)
    got = group_advantages(scores, torch.tensor([1.0, 0.25]), scale="none")
    # x = 1 * (0.5, -0.5), then 0.25 * (2, -2) = (0.5, -0.5); std over 4 rows sqrt(4 * 0.25 / 3) = 0.5773503
    assert got.scale_factor == pytest.approx(1 / 0.5774503, rel=1e-6)
    expected = torch.tensor([[0.5, -0.5], [0.5, -0.5]], dtype=torch.float64) / 0.5774503
    torch.testing.assert_close(got.combined, expected, rtol=1e-6, atol=0)
    # weights come after normalising: per_objective does not hold them
    assert got.per_objective[1, :, 1].tolist() == [2.0, -2.0]


def test_one_objective_is_not_rescaled() -> None:
    got = group_advantages(torch.tensor([[[4.0], [0.0]]]), torch.tensor([0.5]), scale="none")
    assert got.combined.tolist() == [[1.0, -1.0]]  # 0.5 * +-2
    assert got.scale_factor == 1.0


def test_rows_at_zero_stay_exactly_zero_when_the_batch_is_rescaled() -> None:
    scores = torch.tensor([[[0.1, 0.7], [0.1, 0.7], [0.1, 0.7]], [[1.0, 0.3], [0.0, 0.9], [0.4, NAN]]])
    got = group_advantages(scores, torch.tensor([1.0, 0.5]))
    assert got.combined[0].tolist() == [0.0, 0.0, 0.0]
    assert got.combined[1].count_nonzero() == 3
    assert got.scale_factor > 1.0


def test_flat_rows_count_in_the_spread_and_rows_without_a_verdict_do_not() -> None:
    rows = [[1.0, NAN], [0.0, NAN]]
    flat, missing = [[0.5, NAN], [0.5, NAN]], [[NAN, NAN], [NAN, NAN]]
    weights = torch.ones(2)
    # x = 0.5, -0.5: std 0.7071068 over 2 rows; with two rows at 0: sqrt(0.5 / 3) = 0.4082483 over 4
    alone = group_advantages(torch.tensor([rows]), weights, scale="none")
    with_missing = group_advantages(torch.tensor([rows, missing]), weights, scale="none")
    with_flat = group_advantages(torch.tensor([rows, flat]), weights, scale="none")
    assert alone.scale_factor == pytest.approx(1 / 0.7072068, rel=1e-6)
    assert with_missing.scale_factor == alone.scale_factor
    assert with_flat.scale_factor == pytest.approx(1 / 0.4083483, rel=1e-6)


@pytest.mark.parametrize("score", [NAN, 3.0])
def test_fewer_than_two_rows_with_a_verdict_have_no_advantage_to_rescale(score: float) -> None:
    got = group_advantages(torch.tensor([[[score, NAN], [NAN, NAN]]]), torch.ones(2))
    assert got.combined.tolist() == [[0.0, 0.0]]
    assert got.scale_factor == 0.0


def test_in_summed_mode_a_row_that_misses_one_of_its_objectives_is_itself_missing() -> None:
    scores = torch.tensor([[[1.0, 1.0], [9.0, NAN], [0.0, 1.0], [0.0, 0.0]]])
    got = group_advantages(scores, torch.tensor([1.0, 2.0]), combine="summed", scale="none")
    # sums 3, missing, 2, 0: mean 5/3
    torch.testing.assert_close(got.combined, torch.tensor([[4 / 3, 0.0, 1 / 3, -5 / 3]]))
    assert got.valid[0].tolist() == [[True, True], [False, False], [True, True], [True, True]]
    assert got.per_objective[0, 1].tolist() == [0.0, 0.0]


def test_in_summed_mode_only_the_objectives_that_apply_must_be_there() -> None:
    scores = torch.tensor([[[1.0, NAN], [0.0, NAN]], [[1.0, NAN], [0.0, 1.0]]])
    applies = torch.tensor([[True, False], [True, True]])
    got = group_advantages(scores, torch.ones(2), combine="summed", scale="none", applies=applies)
    # the second group keeps one complete row, which has nothing to be compared with
    assert got.combined.tolist() == [[0.5, -0.5], [0.0, 0.0]]
    assert got.valid[1].tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize(("combine", "scale"), MODES)
@settings(max_examples=40, deadline=None)
@given(case=batches())
def test_the_weighted_shares_of_the_objectives_add_up_to_the_combined_advantage(
    combine: Combine, scale: Scale, case: Case
) -> None:
    weights = torch.tensor(case.weights, dtype=torch.float64)
    got = group_advantages(
        tensor_of(case.scores), weights, combine=combine, scale=scale, applies=torch.tensor(case.applies)
    )
    shares = (weights * got.per_objective).sum(dim=-1) * got.scale_factor
    torch.testing.assert_close(shares, got.combined, rtol=1e-9, atol=1e-9)
    assert got.per_objective[~got.valid].count_nonzero() == 0


def test_opposite_objectives_of_equal_weight_cancel_in_summed_mode() -> None:
    got = group_advantages(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.ones(2), combine="summed")
    assert got.combined.tolist() == [[0.0, 0.0]]
    assert got.is_flat.tolist() == [[True, True]]


@pytest.mark.parametrize("combine", COMBINES)
def test_the_shares_of_three_objectives_are_their_parts_of_the_combined_advantage(combine: Combine) -> None:
    scores = torch.tensor([[[1.0, 0.0, 4.0], [0.0, 2.0, 0.0]]], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 0.25])
    got = group_advantages(scores, weights, combine=combine, scale="none")
    # 1 * +-0.5, 0.5 * -+1, 0.25 * +-2: together +-0.5, whose std over two rows is 0.7071068
    factor = 1.0 if combine == "summed" else 1 / 0.7072068
    expected = torch.tensor([[[0.5, -0.5, 0.5], [-0.5, 0.5, -0.5]]], dtype=torch.float64) * factor
    torch.testing.assert_close(got.shares(weights), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.shares(weights).sum(dim=-1), got.combined)


@pytest.mark.parametrize(("combine", "scale"), MODES)
@settings(max_examples=40, deadline=None)
@given(case=batches())
def test_the_shares_add_up_and_are_0_without_a_verdict(combine: Combine, scale: Scale, case: Case) -> None:
    weights = torch.tensor(case.weights, dtype=torch.float64)
    got = group_advantages(
        tensor_of(case.scores), weights, combine=combine, scale=scale, applies=torch.tensor(case.applies)
    )
    shares = got.shares(weights)
    torch.testing.assert_close(shares.sum(dim=-1), got.combined, rtol=1e-9, atol=1e-9)
    assert shares[~got.valid].count_nonzero() == 0


def test_in_summed_mode_a_share_is_divided_by_the_sums_spread_and_not_by_its_own() -> None:
    scores = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]], dtype=torch.float64)
    got = group_advantages(scores, torch.ones(2), combine="summed", scale="group")
    # sums 1 and 3: +-1 around 2, std sqrt(2); of a: +-0.5, of b: -+1.5
    expected = torch.tensor([[[0.5, -1.5], [-0.5, 1.5]]], dtype=torch.float64) / (math.sqrt(2) + EPS)
    torch.testing.assert_close(got.shares(torch.ones(2)), expected, rtol=1e-9, atol=0)


# Records and refusals


def test_half_precision_scores_are_normalised_in_float32() -> None:
    got = group_advantages(torch.tensor([[[1.0], [0.0], [0.0]]], dtype=torch.float16), torch.ones(1), scale="none")
    assert got.combined.dtype == torch.float32
    # float16 would give 0.66650
    torch.testing.assert_close(got.combined, torch.tensor([[2 / 3, -1 / 3, -1 / 3]]), rtol=1e-7, atol=0)


def test_the_scores_are_left_as_they_were() -> None:
    scores = torch.tensor([[[1.0], [NAN], [0.0]]])
    group_advantages(scores, torch.ones(1))
    assert scores[0, :, 0].nan_to_num(-1.0).tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_score_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="infinite"):
        one_objective(value, 0.0)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 2)])
def test_scores_that_do_not_fit_the_weights_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[P, K, O\]"):
        group_advantages(torch.zeros(shape), torch.ones(3))
