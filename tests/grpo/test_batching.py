"""Claims about ScoredGroups -> TrainBatch: which rows learn, what they hold, and how they are split."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from builders import make_batch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from grpo.advantages import Combine
from grpo.batching import MicroBatch, TrainBatch, overlong_penalty, score_tensor, teaches_something
from grpo.config import TruncatedConfig, TruncatedMask, TruncatedPenalty
from grpo.types import Completion, Message, Prompt, RolloutGroup, ScoredGroup, Verdict

Scores = Mapping[str, float | None]


def make_group(
    scores: Sequence[Scores],
    *,
    lengths: Sequence[int] | None = None,
    number: int = 0,
    prompt_length: int = 2,
    objectives: tuple[str, ...] | None = None,
) -> ScoredGroup:
    """One completion per entry of `scores`; every token id tells its prompt, row and place: 1000 p + 100 k + t + 1."""
    lengths = lengths or [2] * len(scores)
    base = 1000 * number
    completions = tuple(
        Completion(
            token_ids=tuple(base + 100 * k + t + 1 for t in range(length)),
            text="",
            sampler_logprobs=tuple(-(k + 1) - t / 8 for t in range(length)),
            finish_reason="stop",
        )
        for k, length in enumerate(lengths)
    )
    prompt = Prompt(
        id=f"p{number}", messages=(Message(role="user", content="?"),), objectives=objectives or tuple(scores[0])
    )
    return ScoredGroup(
        rollout=RolloutGroup(
            prompt=prompt,
            prompt_token_ids=tuple(base + 900 + t for t in range(prompt_length)),
            completions=completions,
        ),
        verdicts=tuple({name: Verdict(value=value, parts={}) for name, value in row.items()} for row in scores),
    )


def batch_of(*groups: ScoredGroup, weights: dict[str, float] | None = None, micro_batch_tokens: int = 64) -> TrainBatch:
    return make_batch(groups, weights=weights or {"a": 1.0}, budget=micro_batch_tokens, scale="none")


RowContent = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...], float, tuple[bool, ...]]


def rows_of(batch: TrainBatch) -> list[RowContent]:
    """Every row without its padding: prompt, completion, sampler_logprobs, advantage, is_scored."""
    return [row for part in batch.micro_batches for row in rows_of_part(part)]


def rows_of_part(part: MicroBatch) -> list[RowContent]:
    rows: list[RowContent] = []
    for b, prompt in enumerate(part.prompt_of_row.tolist()):
        mask = part.completion_mask[b]
        rows.append(
            (
                tuple(part.prompt_ids[prompt][part.prompt_mask[prompt].bool()].tolist()),
                tuple(part.completion_ids[b][mask].tolist()),
                tuple(part.sampler_logprobs[b][mask].tolist()),
                part.advantages[b].item(),
                tuple(part.is_scored[b].tolist()),
            )
        )
    return rows


@st.composite
def groups_of_rows(draw: st.DrawFn) -> list[ScoredGroup]:
    size = draw(st.integers(1, 4))
    value = st.sampled_from([None, 0.0, 0.5, 1.0])
    return [
        make_group(
            [{"a": draw(value)} for _ in range(size)],
            lengths=[draw(st.integers(1, 9)) for _ in range(size)],
            number=number,
            prompt_length=draw(st.integers(1, 6)),
        )
        for number in range(draw(st.integers(1, 4)))
    ]


def test_ids_masks_and_prompts_are_those_worked_out_by_hand() -> None:
    batch = batch_of(
        make_group([{"a": 1.0}, {"a": 0.0}], lengths=[1, 3]),
        make_group([{"a": 0.0}, {"a": 4.0}], lengths=[4, 2], number=1, prompt_length=3),
    )
    (part,) = batch.micro_batches  # the group with the longest row (3 + 4) first, and in it the longest completion
    assert part.prompt_ids.tolist() == [[1900, 1901, 1902], [900, 901, 0]]
    assert part.prompt_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert part.prompt_of_row.tolist() == [0, 0, 1, 1]
    assert part.completion_ids.tolist() == [
        [1001, 1002, 1003, 1004],
        [1101, 1102, 0, 0],
        [101, 102, 103, 0],
        [1, 0, 0, 0],
    ]
    assert part.completion_mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
    assert part.sampler_logprobs[0].tolist() == [-1.0, -1.125, -1.25, -1.375]
    assert part.sampler_logprobs[1].tolist() == [-2.0, -2.125, 0.0, 0.0]
    assert part.advantages.tolist() == [-2.0, 2.0, -0.5, 0.5]
    assert part.is_scored.tolist() == [[True]] * 4
    assert batch.num_tokens == part.num_tokens == 10


def test_a_row_without_any_verdict_leaves_the_batch_and_its_denominator() -> None:
    batch = batch_of(make_group([{"a": 1.0}, {"a": None}, {"a": 0.0}, {"a": 0.0}], lengths=[2, 30, 3, 4]))
    assert [row[1][0] // 100 for row in rows_of(batch)] == [3, 2, 0]
    assert batch.num_tokens == 2 + 3 + 4
    # mean over the three verdicts 1/3
    assert {row[1][0] // 100: round(row[3], 6) for row in rows_of(batch)} == {0: 0.666667, 2: -0.333333, 3: -0.333333}
    assert batch.advantages.combined.shape == (1, 4)  # the report still sees all of them


def test_a_row_with_advantage_zero_stays_for_the_kl_and_the_denominator() -> None:
    batch = batch_of(make_group([{"a": 0.5}, {"a": 0.5}], lengths=[2, 3]))
    assert [row[3] for row in rows_of(batch)] == [0.0, 0.0]
    assert batch.num_tokens == 5


def test_the_only_verdict_of_a_group_keeps_its_row_with_advantage_zero() -> None:
    batch = batch_of(make_group([{"a": 1.0}, {"a": None}], lengths=[2, 3]))
    assert [row[3] for row in rows_of(batch)] == [0.0]
    assert batch.num_tokens == 2


def test_a_batch_without_any_verdict_has_no_rows_and_no_tokens() -> None:
    batch = batch_of(make_group([{"a": None}, {"a": None}]))
    assert batch.micro_batches == ()
    assert batch.num_tokens == 0


def test_each_row_knows_which_objectives_scored_it() -> None:
    batch = batch_of(
        make_group([{"a": 1.0, "b": 0.0}, {"a": None, "b": 1.0}], lengths=[3, 2]),
        make_group([{"b": 1.0}, {"b": None}], lengths=[1, 1], number=1),
        weights={"b": 2.0, "a": 0.5},
    )
    assert batch.objectives == ("b", "a")
    assert batch.weights.tolist() == [2.0, 0.5]
    assert [(row[1][0], row[4]) for row in rows_of(batch)] == [
        (1, (True, True)),
        (101, (True, False)),
        (1001, (True, False)),
    ]


def test_scores_are_nan_where_missing_and_where_the_objective_does_not_apply() -> None:
    scores, applies = score_tensor(
        [make_group([{"a": 1.0}, {"a": None}]), make_group([{"a": 2.0, "b": 3.0}, {"a": 4.0, "b": 5.0}])], ("a", "b")
    )
    assert applies.tolist() == [[True, False], [True, True]]
    assert scores.isnan().tolist() == [[[False, True], [True, True]], [[False, False], [False, False]]]
    assert scores.nan_to_num(-1.0).tolist() == [[[1.0, -1.0], [-1.0, -1.0]], [[2.0, 3.0], [4.0, 5.0]]]


def test_a_verdict_of_an_objective_that_the_prompt_does_not_ask_for_does_not_keep_a_row() -> None:
    group = make_group([{"a": None, "b": 1.0}, {"a": 1.0, "b": 0.0}], objectives=("a",), lengths=[4, 3])
    batch = batch_of(group, weights={"a": 1.0, "b": 1.0})
    assert batch.num_tokens == 3
    assert [row[4] for row in rows_of(batch)] == [(True, False)]


def test_a_group_over_the_budget_is_cut_into_as_few_parts_as_it_allows_of_like_cost() -> None:
    # a prompt of 2 once, and completions of 8, 4, 4, 3, 1; budget 14: 2 + 8, for 2 + 2 * 8 is too much; then
    # 2 + 3 * 4 = 14 and 2 + 1 would do, but 2 + 2 * 4 = 10 and 2 + 2 * 3 = 8 (the 1 is padded) cost less at most
    group = make_group([{"a": float(k)} for k in range(5)], lengths=[4, 8, 1, 4, 3])
    batch = batch_of(group, micro_batch_tokens=14)
    assert [list(part.completion_ids.shape) for part in batch.micro_batches] == [[1, 8], [2, 4], [2, 3]]
    assert [part.prompt_ids.tolist() for part in batch.micro_batches] == [[[900, 901]]] * 3


def test_groups_stay_whole_and_are_spread_evenly_over_the_micro_batches() -> None:
    # five groups of 2 + 2 * 3 = 8 tokens, budget 36: four fit, so two micro-batches do: three groups and two, where
    # filling one up first would give four and one
    groups = [make_group([{"a": 1.0}, {"a": 0.0}], lengths=[3, 3], number=number) for number in range(5)]
    batch = batch_of(*groups, micro_batch_tokens=36)
    assert [part.padded_tokens for part in batch.micro_batches] == [24, 16]
    # room for a group and a half: the next one is not torn, for its prompt would be computed twice
    batch = batch_of(*groups, micro_batch_tokens=13)
    assert [part.padded_tokens for part in batch.micro_batches] == [8] * 5


def test_what_tokens_attend_to_counts_beside_their_number() -> None:
    # prompts of 2; budget 9000, so two micro-batches: the row of 4,000 with that of 2,500, or the latter with two more:
    #   2 + 4000 + 2 + 2500 = 6,504 tokens: 6144 * 6504 + 2 * 2^2 + 2 * 4000 * 4002 = 72.0 million query-key pairs
    #   2 + 2500 + 2 + 2 * 2500 = 7,504: 6144 * 7504 + 2 * 2^2 + 3 * 2500 * 2502 = 64.9 million: more tokens, less work
    groups = [
        make_group([{"a": 1.0}] * len(lengths), lengths=lengths, number=number)
        for number, lengths in enumerate([[4000], [2500], [2500, 2500]])
    ]
    batch = batch_of(*groups, micro_batch_tokens=9000)
    assert [list(part.completion_ids.shape) for part in batch.micro_batches] == [[1, 4000], [3, 2500]]


def cost_of(part: MicroBatch) -> int:
    """Pairs of query and key, padding included, and 6,144 of them for each token."""
    (prompts, prompt_width), (rows, width) = part.prompt_ids.shape, part.completion_ids.shape
    tokens = int(part.prompt_mask.sum()) + part.num_tokens
    return 6144 * tokens + prompts * prompt_width * prompt_width + rows * width * (prompt_width + width)


@settings(max_examples=80, deadline=None)
@given(groups=groups_of_rows(), budget=st.integers(1, 120))
def test_no_way_to_join_neighbouring_groups_into_as_few_micro_batches_costs_less_at_most(
    groups: list[ScoredGroup], budget: int
) -> None:
    """Against every way to join them, the greedy one among them."""

    def joined(some: Sequence[ScoredGroup]) -> MicroBatch:
        (part,) = batch_of(*some, micro_batch_tokens=10_000).micro_batches
        return part

    scored = [group for group in groups if any(row["a"].value is not None for row in group.verdicts)]
    alone = sorted(
        scored,
        key=lambda group: (
            -(
                len(group.rollout.prompt_token_ids)
                + max(
                    len(completion.token_ids)
                    for completion, row in zip(group.rollout.completions, group.verdicts, strict=True)
                    if row["a"].value is not None
                )
            )
        ),
    )
    assume(alone and all(joined([group]).padded_tokens <= budget for group in alone))
    ways: list[list[MicroBatch]] = []
    for cuts in itertools.product([False, True], repeat=len(alone) - 1):
        ends = [place + 1 for place, is_cut in enumerate(cuts) if is_cut]
        way = [joined(alone[start:end]) for start, end in zip([0, *ends], [*ends, len(alone)], strict=True)]
        if all(part.padded_tokens <= budget for part in way):
            ways.append(way)
    fewest = min(len(way) for way in ways)
    found = batch_of(*groups, micro_batch_tokens=budget).micro_batches
    assert len(found) == fewest
    least = min(max(cost_of(part) for part in way) for way in ways if len(way) == fewest)
    assert max(cost_of(part) for part in found) == least


@settings(max_examples=50, deadline=None)
@given(groups=groups_of_rows(), budget=st.integers(1, 60))
def test_a_group_that_the_budget_holds_is_in_one_micro_batch(groups: list[ScoredGroup], budget: int) -> None:
    found = [
        {row[0] for row in rows_of_part(part)} for part in batch_of(*groups, micro_batch_tokens=budget).micro_batches
    ]
    for group in groups:
        alone = batch_of(group, micro_batch_tokens=10_000).micro_batches
        if alone and alone[0].padded_tokens <= budget:
            assert sum(group.rollout.prompt_token_ids in prompts for prompts in found) == 1


def test_a_row_longer_than_the_budget_goes_alone() -> None:
    batch = batch_of(make_group([{"a": 1.0}, {"a": 0.0}], lengths=[50, 60]), micro_batch_tokens=10)
    assert [list(part.completion_ids.shape) for part in batch.micro_batches] == [[1, 60], [1, 50]]


@settings(max_examples=50, deadline=None)
@given(groups=groups_of_rows(), budget=st.integers(1, 60))
def test_no_micro_batch_of_several_rows_passes_the_budget(groups: list[ScoredGroup], budget: int) -> None:
    batch = batch_of(*groups, micro_batch_tokens=budget)
    for part in batch.micro_batches:
        assert part.completion_ids.shape[0] == 1 or part.prompt_ids.numel() + part.completion_ids.numel() <= budget
        # no padding that nobody needs: every column has a token, every prompt a row
        assert part.prompt_mask.any(dim=0).all()
        assert part.completion_mask.any(dim=0).all()
        assert set(part.prompt_of_row.tolist()) == set(range(part.prompt_ids.shape[0]))
    assert batch.num_tokens == sum(part.num_tokens for part in batch.micro_batches)
    assert batch.num_tokens == sum(len(row[1]) for row in rows_of(batch))


@settings(max_examples=50, deadline=None)
@given(groups=groups_of_rows(), budget=st.integers(1, 60), data=st.data())
def test_every_scored_row_is_there_once_whatever_the_order_and_the_split(
    groups: list[ScoredGroup], budget: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(groups))
    one_part = batch_of(*groups, micro_batch_tokens=10_000)
    assert sorted(rows_of(batch_of(*order, micro_batch_tokens=budget))) == sorted(rows_of(one_part))
    expected = {
        (group.rollout.prompt_token_ids, completion.token_ids, completion.sampler_logprobs)
        for group in groups
        for completion, verdicts in zip(group.rollout.completions, group.verdicts, strict=True)
        if verdicts["a"].value is not None
    }
    assert {row[:3] for row in rows_of(one_part)} == expected
    assert len(one_part.micro_batches) <= 1


def test_the_sampler_logprobs_are_float32_and_the_ids_int64() -> None:
    (part,) = batch_of(make_group([{"a": 1.0}, {"a": 0.0}])).micro_batches
    assert part.sampler_logprobs.dtype == part.advantages.dtype == torch.float32
    assert part.prompt_ids.dtype == part.completion_ids.dtype == torch.int64
    assert part.completion_mask.dtype == part.is_scored.dtype == torch.bool


def test_a_score_that_is_infinite_stops_the_batch() -> None:
    with pytest.raises(ValueError, match="infinite"):
        batch_of(make_group([{"a": math.inf}, {"a": 0.0}]))


# Ragged groups


def test_groups_of_different_sizes_are_each_centred_over_their_own_rows() -> None:
    batch = batch_of(
        make_group([{"a": 1.0}, {"a": 0.0}]),
        make_group([{"a": 0.0}, {"a": 0.0}, {"a": 3.0}], number=1),
        make_group([{"a": 7.0}], number=2),
    )
    # means 0.5, 1 and none: one row has nobody to be compared with
    found = {row[1][0]: row[3] for row in rows_of(batch)}
    assert found == {1: 0.5, 101: -0.5, 1001: -1.0, 1101: -1.0, 1201: 2.0, 2001: 0.0}
    assert batch.advantages.combined.tolist() == [[0.5, -0.5, 0.0], [-1.0, -1.0, 2.0], [0.0, 0.0, 0.0]]
    assert batch.advantages.valid[..., 0].tolist() == [[True, True, False], [True] * 3, [True, False, False]]
    assert batch.num_rows == 6


def test_an_empty_completion_has_no_loss_row_and_still_counts_in_the_baseline() -> None:
    batch = batch_of(make_group([{"a": 1.0}, {"a": 0.0}, {"a": 0.0}], lengths=[2, 0, 3]))
    assert sorted((row[1][0], row[3]) for row in rows_of(batch)) == [
        (1, pytest.approx(2 / 3)),
        (201, pytest.approx(-1 / 3)),
    ]
    assert (batch.num_rows, batch.num_tokens) == (2, 5)


def test_a_window_of_empty_completions_alone_has_no_rows() -> None:
    batch = batch_of(make_group([{"a": 1.0}, {"a": 0.0}], lengths=[0, 0]))
    assert batch.micro_batches == ()
    assert (batch.num_rows, batch.num_tokens) == (0, 0)


def test_a_completion_that_is_only_an_end_token_is_a_row_of_one_token() -> None:
    batch = batch_of(make_group([{"a": 1.0}, {"a": 0.0}], lengths=[1, 3]))
    assert [len(row[1]) for row in rows_of(batch)] == [3, 1]
    assert batch.num_tokens == 4


# Truncated completions


def cut_at(group: ScoredGroup, *rows: int) -> ScoredGroup:
    """The same group with those completions cut at max_new_tokens."""
    completions = tuple(
        replace(completion, finish_reason="length") if k in rows else completion
        for k, completion in enumerate(group.rollout.completions)
    )
    return replace(group, rollout=replace(group.rollout, completions=completions))


def advantages_by_row(group: ScoredGroup, truncated: TruncatedConfig | None) -> dict[int, float]:
    """Row number -> advantage, of the rows that are trained on."""
    batch = make_batch([group], scale="none", truncated=truncated)
    return {row[1][0] // 100: row[3] for row in rows_of(batch)}


TRUNCATED = cut_at(make_group([{"a": 1.0}, {"a": 0.0}, {"a": 0.5}], lengths=[3, 16, 4]), 1)


def test_truncated_completions_are_kept_by_default() -> None:
    # mean of 1, 0, 0.5
    assert advantages_by_row(TRUNCATED, None) == {0: 0.5, 1: -0.5, 2: 0.0}


def test_a_masked_completion_leaves_the_loss_and_its_denominators_and_stays_in_the_baseline() -> None:
    masked = TruncatedMask(type="mask")
    assert advantages_by_row(TRUNCATED, masked) == {0: 0.5, 2: 0.0}
    batch = make_batch([TRUNCATED], truncated=masked)
    assert (batch.num_rows, batch.num_tokens) == (2, 7)


def test_a_masked_completion_leaves_the_baseline_too_where_asked() -> None:
    masked = TruncatedMask(type="mask", in_baseline=False)
    assert advantages_by_row(TRUNCATED, masked) == {0: 0.25, 2: -0.25}  # mean of 1 and 0.5
    batch = make_batch([TRUNCATED], truncated=masked)
    assert batch.advantages.valid[0, :, 0].tolist() == [True, False, True]


@pytest.mark.parametrize("in_baseline", [True, False])
def test_a_group_that_is_all_cut_leaves_a_masked_update(in_baseline: bool) -> None:
    group = cut_at(make_group([{"a": 1.0}, {"a": 0.0}], lengths=[16, 16]), 0, 1)
    batch = make_batch([group], truncated=TruncatedMask(type="mask", in_baseline=in_baseline))
    assert batch.micro_batches == ()
    assert (batch.num_rows, batch.num_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("num_tokens", "penalty"), [(0, 0.0), (11, 0.0), (12, 0.0), (13, -0.25), (14, -0.5), (15, -0.75), (16, -1.0)]
)
def test_the_overlong_penalty_falls_over_the_buffer_from_0_to_1(num_tokens: int, penalty: float) -> None:
    # L_max 16, buffer 4: 0 up to 12, then (12 - length) / 4
    assert overlong_penalty(num_tokens, max_new_tokens=16, buffer_tokens=4) == penalty


def test_the_overlong_penalty_is_added_to_the_score_before_the_baseline() -> None:
    truncated = TruncatedPenalty(type="penalty", buffer_tokens=4, weight=0.8)
    group = cut_at(make_group([{"a": 1.0}, {"a": 0.0}, {"a": 0.5}], lengths=[3, 16, 14]), 1)
    # scores 1, 0 - 0.8, 0.5 - 0.4: mean 0.1
    expected = {0: pytest.approx(0.9), 1: pytest.approx(-0.9), 2: pytest.approx(0.0, abs=1e-6)}
    assert advantages_by_row(group, truncated) == expected


def test_the_overlong_penalty_makes_no_verdict_of_a_missing_one() -> None:
    truncated = TruncatedPenalty(type="penalty", buffer_tokens=4)
    group = make_group([{"a": 1.0}, {"a": None}, {"a": 1.0}], lengths=[3, 16, 16])
    # 1 and 1 - 1: mean 0.5
    assert advantages_by_row(group, truncated) == {0: 0.5, 2: -0.5}


# Shares


@st.composite
def scored_by_several(draw: st.DrawFn) -> list[ScoredGroup]:
    names = ("a", "b", "c")[: draw(st.integers(1, 3))]
    value = st.sampled_from([None, 0.0, 0.25, 0.5, 1.0])
    groups: list[ScoredGroup] = []
    for number in range(draw(st.integers(1, 3))):
        asked = tuple(name for name in names if draw(st.booleans())) or names
        size = draw(st.integers(1, 4))
        scores = [{name: draw(value) for name in asked} for _ in range(size)]
        groups.append(make_group(scores, number=number, objectives=asked))
    return groups


@pytest.mark.parametrize("combine", ["decoupled", "summed"])
@settings(max_examples=60, deadline=None)
@given(groups=scored_by_several(), weights=st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, 3.0])] * 3))
def test_the_shares_of_a_row_add_up_to_its_advantage(
    combine: Combine, groups: list[ScoredGroup], weights: tuple[float, ...]
) -> None:
    batch = make_batch(groups, weights=dict(zip("abc", weights, strict=True)), combine=combine)
    for part in batch.micro_batches:
        assert part.shares.shape == (len(part.advantages), 3)
        # opposite shares nearly cancel, and what is left is scaled up with their rounding
        off = (part.shares.sum(dim=1) - part.advantages).abs()
        assert (off <= 1e-5 + 1e-6 * part.shares.abs().sum(dim=1)).all()
        assert part.shares[~part.is_scored].count_nonzero() == 0  # who gave no verdict has no share


def test_shares_worked_out_by_hand() -> None:
    groups = [make_group([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.5}])]
    batch = make_batch(groups, weights={"a": 2.0, "b": 1.0}, combine="summed", scale="none")
    (part,) = batch.micro_batches
    # r = 2 * 1 + 0 and 0 + 0.5: mean 1.25; of a: 2 * (1 - 0.5), of b: 0 - 0.25
    assert part.shares.tolist() == [[1.0, -0.25], [-1.0, 0.25]]
    assert part.advantages.tolist() == [0.75, -0.75]
    decoupled = make_batch(groups, weights={"a": 2.0, "b": 1.0}, scale="none").micro_batches[0]
    # x = +-0.75 over two rows: std 1.0606602, and every share is divided by it plus 1e-4
    torch.testing.assert_close(decoupled.shares, part.shares / 1.0607602)


# What leaves the update, and what is another rank's


@pytest.mark.parametrize("combine", ["decoupled", "summed"])
def test_flat_groups_leave_by_option_and_what_cancels_is_not_flat(combine: Combine) -> None:
    flat = make_group([{"a": 0.5, "b": 1.0}, {"a": 0.5, "b": 1.0}], number=1)
    groups = [make_group([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.5}]), flat]
    kept = make_batch(groups, combine=combine)
    dropped = make_batch(groups, combine=combine, drops_flat_groups=True)
    assert (kept.num_rows, dropped.num_rows) == (4, 2)
    assert all(row[1][0] < 1000 for row in rows_of(dropped))
    # the advantages of the others are those of the whole batch all the same
    assert torch.equal(kept.advantages.combined, dropped.advantages.combined)


def test_a_group_whose_opposite_shares_cancel_is_not_dropped() -> None:
    cancels = make_group([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}])
    other = make_group([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.0}], number=1)
    batch = make_batch([cancels, other], drops_flat_groups=True)
    rows = {row[1][0]: row[3] for row in rows_of(batch)}
    assert (rows[1], rows[101]) == (0.0, 0.0)
    assert len(rows) == 4
    assert teaches_something(cancels)


def test_a_batch_of_flat_groups_alone_keeps_them_for_their_kl() -> None:
    batch = make_batch([make_group([{"a": 1.0}, {"a": 1.0}])], drops_flat_groups=True)
    assert batch.num_rows == 2


def test_a_group_with_one_verdict_or_equal_ones_teaches_nothing() -> None:
    assert not teaches_something(make_group([{"a": 1.0}, {"a": None}]))
    assert not teaches_something(make_group([{"a": 0.3}, {"a": 0.3}]))
    assert not teaches_something(make_group([{"a": None}, {"a": None}]))
    assert teaches_something(make_group([{"a": 0.3, "b": 1.0}, {"a": 0.3, "b": 0.0}]))


@settings(max_examples=40, deadline=None)
@given(groups=groups_of_rows(), num_ranks=st.integers(1, 3))
def test_ranks_share_out_the_rows_and_agree_on_the_advantages(groups: list[ScoredGroup], num_ranks: int) -> None:
    whole = make_batch(groups, scale="batch")
    places = list(range(len(groups)))
    parts = [make_batch(groups, scale="batch", own=places[rank::num_ranks]) for rank in range(num_ranks)]
    assert sorted(row for part in parts for row in rows_of(part)) == sorted(rows_of(whole))
    assert sum(part.num_tokens for part in parts) == whole.num_tokens
    assert sum(part.num_rows for part in parts) == whole.num_rows
    for rank, part in enumerate(parts):
        assert torch.equal(part.advantages.combined, whole.advantages.combined)
        assert all(row[0][0] // 1000 % num_ranks == rank for row in rows_of(part))  # groups whole on their rank
