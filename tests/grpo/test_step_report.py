"""A step's figures, and what in them a person is told at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders import make_batch, make_group

from grpo.collection import Collected
from grpo.errors import NonFiniteUpdate
from grpo.step_report import StepReport, check_can_go_on, report_step
from grpo.types import ScoredGroup
from grpo.update.step import NonFiniteStep, UpdateStats

STATS = UpdateStats(
    means={"entropy": 1.5},
    grad_norm=0.5,
    learning_rate=1e-4,
    sampler_ratio_p99=1.2,
    sampler_ratio_max=1.5,
    entropy_coefficient=None,
    kl_max={"a": 0.3},
    betas={"a": 0.02, "b": 0.04},
    num_tokens=12,
    num_forced=1,
)
GROUPS = [
    make_group([{"a": 1.0}, {"a": 0.0}, {"a": None}], lengths=[2, 4, 6], seed=1),
    make_group([{"b": 1.0}, {"b": 1.0}, {"b": 1.0}], lengths=[1, 1, 4], seed=2),
]


def row_of() -> dict[str, float | int | None]:
    return dict(report_of(STATS).row)


def report_of(stats: UpdateStats, *, discarded: tuple[ScoredGroup, ...] = ()) -> StepReport:
    collected = Collected(groups=tuple(GROUPS), own=(0, 1), discarded=discarded, judge_seconds=0.0)
    return report_step(3, collected, make_batch(GROUPS), stats, seconds={"step": 2.0}, peak_bytes=7)


def test_a_missing_verdict_is_counted_and_is_no_part_of_the_mean() -> None:
    row = row_of()
    assert row["reward/a/mean"] == 0.5  # (1 + 0) / 2, the third is missing
    assert row["reward/a/unscored_frac"] == pytest.approx(1 / 3)
    assert row["reward/a/std"] == pytest.approx(0.5**0.5)  # squares 1/4 + 1/4, over n - 1 = 1


def test_one_objectives_lengths_do_not_average_away() -> None:
    row = row_of()
    assert (row["completion/a/length_mean"], row["completion/b/length_mean"]) == (4.0, 2.0)
    assert row["completion/length_mean"] == 3.0  # 18 tokens, 6 completions


def test_a_flat_group_is_counted_among_the_groups_that_were_asked() -> None:
    assert row_of()["groups/zero_variance_frac"] == 0.5  # b's one group of the two


def test_an_objective_whose_every_group_is_flat_is_seen_beside_one_that_differs() -> None:
    row = row_of()
    assert row["groups/a/zero_variance_frac"] == 0  # 1 and 0
    assert row["groups/b/zero_variance_frac"] == 1


def test_a_flat_objective_does_not_hide_in_a_sum_with_one_that_differs_nor_behind_missing_verdicts() -> None:
    groups = [
        make_group([{"a": 1.0, "b": 0.5}, {"a": 0.0, "b": 0.5}], lengths=[1, 1], seed=1),
        make_group([{"a": 1.0, "b": 0.5}, {"a": 0.0, "b": None}], lengths=[1, 1], seed=2),  # one verdict of b: no group
    ]
    collected = Collected(groups=tuple(groups), own=(0, 1), discarded=(), judge_seconds=0.0)
    batch = make_batch(groups, combine="summed")
    row = report_step(3, collected, batch, STATS, seconds={"step": 2.0}, peak_bytes=7).row
    assert (row["groups/a/zero_variance_frac"], row["groups/b/zero_variance_frac"]) == (0, 1)
    assert row["groups/zero_variance_frac"] == 0


def test_the_forced_share_is_of_loss_tokens() -> None:
    assert row_of()["sampler/kept_set_miss_frac"] == pytest.approx(1 / 12)  # 2 + 4 of a, 1 + 1 + 4 of b


def test_groups_that_were_replaced_are_written_down_without_an_advantage_and_are_no_part_of_the_means() -> None:
    flat = make_group([{"a": 9.0}, {"a": 9.0}], lengths=[3, 3], seed=3)
    report = report_of(STATS, discarded=(flat,))
    assert report.row["reward/a/mean"] == 0.5
    assert report.row["groups/resampled"] == 1
    assert report.row["tokens/completion"] == 24  # 18 of the groups, 6 of the replaced one: they were sampled
    assert [line["advantage"] for line in report.completions[-2:]] == [None, None]


def test_completions_without_a_verdict_count_as_unscored_though_their_group_was_replaced() -> None:
    unscored = make_group([{"a": None}, {"a": None}, {"a": None}], lengths=[1, 1, 1], seed=3)
    row = report_of(STATS, discarded=(unscored,)).row
    assert row["reward/a/unscored_frac"] == pytest.approx(4 / 6)  # one of three, and all three that were replaced
    assert row["reward/a/mean"] == 0.5


def test_a_step_that_was_skipped_before_engine_and_trainer_were_compared_says_nothing_of_them() -> None:
    row = report_of(replace(STATS, sampler_ratio_p99=None, sampler_ratio_max=None, num_forced=0)).row
    assert [row[f"sampler/{name}"] for name in ("ratio_p99", "ratio_max", "kept_set_miss_frac")] == [None] * 3


def test_a_run_stops_at_the_last_skipped_step_that_it_may_have() -> None:
    skipped = NonFiniteStep(cause="the loss; first in layers.3", micro_batch=0, in_a_row=2)
    report = report_of(replace(STATS, skipped=skipped, grad_norm=None))
    assert report.row["update/skipped"] == 1
    assert "layers.3" in report.warnings[0]
    check_can_go_on(report, max_in_a_row=3)
    with pytest.raises(NonFiniteUpdate, match=r"2 steps in a row .*layers\.3"):
        check_can_go_on(report, max_in_a_row=2)


def test_the_share_that_ended_by_each_token_is_told_and_sums_to_one_with_the_truncated_share() -> None:
    cut = replace(GROUPS[0].rollout.completions[0], finish_reason="length")
    other = replace(GROUPS[0].rollout.completions[1], token_ids=(9, 8, 7, 5))
    rollout = replace(GROUPS[0].rollout, completions=(cut, other, GROUPS[0].rollout.completions[2]))
    groups = (replace(GROUPS[0], rollout=rollout), GROUPS[1])
    collected = Collected(groups=groups, own=(0, 1), discarded=(), judge_seconds=0.0)
    row = report_step(3, collected, make_batch(GROUPS), STATS, seconds={"step": 2.0}, peak_bytes=7).row
    assert row["completion/truncated_frac"] == pytest.approx(1 / 6)
    assert row["completion/end_token/5"] == pytest.approx(1 / 6)
    assert row["completion/end_token/2"] == pytest.approx(4 / 6)


def test_a_reward_that_likes_length_shows_in_the_correlation_of_scores_and_tokens() -> None:
    group = make_group([{"a": 0.1}, {"a": 0.2}, {"a": None}, {"a": 0.9}], lengths=[2, 3, 9, 5], seed=1)
    collected = Collected(groups=(group,), own=(0,), discarded=(), judge_seconds=0.0)
    report = report_step(
        1, collected, make_batch([group]), STATS, seconds={}, peak_bytes=0, judge_figures={"judge/calls": 4}
    )
    assert report.row["reward/a/length_correlation"] == pytest.approx(1.0)  # ranks agree; the missing one is left out
    assert report.row["judge/calls"] == 4
