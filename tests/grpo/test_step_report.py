"""A step's figures, and what in them a person is told at once."""

from __future__ import annotations

import pytest
from builders import make_group

from grpo.batching import build_batch
from grpo.step_report import report_step, warnings_of
from grpo.update.step import UpdateStats

STATS = UpdateStats(
    means={"entropy": 1.5},
    grad_norm=0.5,
    learning_rate=1e-4,
    ratio_p99=1.2,
    kl_max={"a": 0.3},
    betas={"a": 0.02, "b": 0.04},
    num_forced=1,
)
GROUPS = [
    make_group([{"a": 1.0}, {"a": 0.0}, {"a": None}], lengths=[2, 4, 6], seed=1),
    make_group([{"b": 1.0}, {"b": 1.0}, {"b": 1.0}], lengths=[1, 1, 4], seed=2),
]


def row_of() -> dict[str, float | int | None]:
    batch = build_batch(GROUPS, {"a": 1.0, "b": 1.0}, combine="decoupled", scale="group", micro_batch_tokens=1000)
    return dict(report_step(3, GROUPS, batch, STATS, seconds={"step": 2.0}, peak_bytes=7).row)


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


def test_the_forced_share_is_of_loss_tokens() -> None:
    assert row_of()["sampler/kept_set_miss_frac"] == pytest.approx(1 / 12)  # 2 + 4 of a, 1 + 1 + 4 of b


def test_an_engine_that_disagrees_with_the_trainer_is_reported() -> None:
    assert warnings_of({"step": 3, "sampler/ratio_p99": 1.3}) == []
    (warning,) = warnings_of({"step": 3, "sampler/ratio_p99": 2.5})
    assert "step 3" in warning
    assert "2.5" in warning
