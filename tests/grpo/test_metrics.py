"""Claims about the metric names, the sums, the file, and the intervals."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grpo import metrics
from grpo.errors import InputError
from grpo.metrics import (
    MeanAccumulator,
    append_metrics,
    bootstrap_difference,
    bootstrap_mean,
    iter_json_lines,
    read_metrics,
)


def test_names_are_those_of_the_public_surface() -> None:
    names = [
        metrics.reward_mean_name("fairness"),
        metrics.reward_std_name("fairness"),
        metrics.unscored_frac_name("fairness"),
        metrics.kl_name("fairness"),
        metrics.kl_max_name("fairness"),
        metrics.kl_penalty_name("fairness"),
        metrics.beta_name("fairness"),
        metrics.length_mean_name(),
        metrics.length_mean_name("fairness"),
        metrics.truncated_frac_name(),
        metrics.truncated_frac_name("fairness"),
        *[metrics.time_name(stage) for stage in metrics.STAGES],
        metrics.eval_name("fairness"),
        metrics.eval_name("fairness", "scores_changed"),
    ]
    assert names == [
        "reward/fairness/mean",
        "reward/fairness/std",
        "reward/fairness/unscored_frac",
        "kl/fairness",
        "kl/fairness/max",
        "kl/fairness/penalty",
        "beta/fairness",
        "completion/length_mean",
        "completion/fairness/length_mean",
        "completion/truncated_frac",
        "completion/fairness/truncated_frac",
        "time/rollout_s",
        "time/judge_s",
        "time/judge_wait_s",
        "time/update_s",
        "time/sync_s",
        "time/step_s",
        "time/eval_s",
        "eval/fairness/mean",
        "eval/fairness/scores_changed",
    ]


@pytest.mark.parametrize(("observe", "name"), [("penalty", "kl/a/penalty"), ("kl", "kl/a"), (None, "kl/a")])
def test_the_observed_kl_is_the_penalty_only_where_the_controller_says_so(observe: str | None, name: str) -> None:
    assert metrics.observed_kl_name("a", observe) == name


def test_importing_metrics_loads_no_torch() -> None:
    code = "import sys, grpo.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unequal_micro_batches_and_ranks_add_up_to_the_mean_over_all_rows() -> None:
    rank0, rank1 = MeanAccumulator(), MeanAccumulator()
    rank0.add("entropy", 6.0, 3)
    rank0.add("entropy", 1.0, 1)
    rank1.add("entropy", 13.0, 6)
    rank0.merge(rank1.totals())
    assert rank0.means() == {"entropy": 2.0}  # (6 + 1 + 13) / (3 + 1 + 6), where the mean of means is 1.72


def test_a_name_without_values_is_absent_and_never_zero() -> None:
    sums = MeanAccumulator()
    sums.add("kl/fairness", 0.0, 0)
    sums.add("kl/grounding", 0.0, 4)
    assert sums.means() == {"kl/grounding": 0.0}


def test_an_empty_micro_batch_whose_sum_is_nan_does_not_spoil_the_mean() -> None:
    sums = MeanAccumulator()
    sums.add("kl/fairness", math.nan, 0)
    sums.add("kl/fairness", 3.0, 2)
    assert sums.means() == {"kl/fairness": 1.5}


@pytest.mark.parametrize("count", [-1, math.nan, math.inf])
def test_a_count_that_counts_nothing_is_refused(count: float) -> None:
    with pytest.raises(ValueError, match="kl/fairness: count"):
        MeanAccumulator().add("kl/fairness", 1.0, count)


def test_what_is_appended_is_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "entropy": 0.1}, {"step": 2, "entropy": None}]
    for row in rows:
        append_metrics(path, row)
    assert read_metrics(path) == rows
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_is_written_as_null(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"step": 1, "grad_norm": value})
    assert path.read_text() == '{"step": 1, "grad_norm": null}\n'


def test_a_row_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"step": 1})
    with pytest.raises(TypeError):
        append_metrics(path, {"step": 2, "grad_norm": object()})  # pyright: ignore[reportArgumentType]
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("torn", [b'{"step": 2, "rew', b'{"step": 2, "note": "caf\xc3', b"{"])
def test_a_torn_last_line_is_dropped_and_the_next_row_replaces_it(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    assert read_metrics(path) == [{"step": 1}]
    append_metrics(path, {"step": 2})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_a_last_line_that_only_lost_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    append_metrics(path, {"step": 3})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize("bad", [b'{"step": 2, "rew', b"[1, 2]", b"\xff\xfe"])
def test_a_bad_line_elsewhere_is_an_input_error_with_its_number(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: .*Expected one JSON object a line"):
        read_metrics(path)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_line_separator_inside_a_string_does_not_split_the_line(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    path.write_text(json.dumps({"completion": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(iter_json_lines(path)) == [{"completion": "a\u2028b"}]


def test_nan_in_a_foreign_file_reads_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "grad_norm": NaN}\n')
    assert read_metrics(path) == [{"step": 1, "grad_norm": None}]


def test_interval_of_five_ones_in_ten_is_that_of_the_binomial() -> None:
    # Resampled sums are Binomial(10, 1/2): P(<=1) = 11/1024 = 0.011 and P(<=2) = 56/1024 = 0.055 enclose 0.025,
    # so the 2.5th percentile is 2/10, and by symmetry the 97.5th is 8/10.
    interval = bootstrap_mean([0.0, 1.0] * 5)
    assert (interval.mean, interval.low, interval.high) == (0.5, pytest.approx(0.2), pytest.approx(0.8))


def test_bootstrap_matches_the_enumeration_of_every_resample() -> None:
    values = [0.0, 0.3, 0.5, 0.9, 2.0]
    every_mean = [float(np.mean(draw)) for draw in itertools.product(values, repeat=5)]  # 5^5 equally likely
    low, high = np.percentile(every_mean, [2.5, 97.5])
    interval = bootstrap_mean(values, resamples=20_000)
    assert interval.mean == pytest.approx(0.74)  # 3.7 / 5
    assert interval.low == pytest.approx(low, abs=0.03)
    assert interval.high == pytest.approx(high, abs=0.03)


def test_paired_difference_ignores_how_hard_the_prompts_are() -> None:
    before = [0.0, 10.0, 20.0, 30.0]
    after = [0.5, 10.5, 20.5, 30.5]
    interval = bootstrap_difference(before, after)
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.5, 0.5)


def test_difference_is_after_minus_before_and_resamples_pairs() -> None:
    # Differences are five 0s and five -1s: minus the binomial case above.
    interval = bootstrap_difference([1.0, 1.0] * 5, [1.0, 0.0] * 5)
    assert (interval.mean, interval.low, interval.high) == (-0.5, pytest.approx(-0.8), pytest.approx(-0.2))


def test_the_seed_alone_decides_the_resamples() -> None:
    values = list(np.random.default_rng(7).normal(size=40))
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_many_prompts_are_drawn_in_blocks_and_still_fill_every_resample() -> None:
    values = [0.0, 1.0] * 5000  # 10,000 values: 100 resamples a block, 25 of them in the last
    interval = bootstrap_mean(values, resamples=125)
    # standard error of the mean: 0.5 / sqrt(10,000) = 0.005, so the interval is about 0.5 +- 0.0098
    assert interval.low == pytest.approx(0.4902, abs=0.004)
    assert interval.high == pytest.approx(0.5098, abs=0.004)


def test_one_value_has_an_interval_of_no_width() -> None:
    interval = bootstrap_mean([0.25])
    assert (interval.mean, interval.low, interval.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("values", [[], [0.0, math.nan], [math.inf]])
def test_no_value_or_a_missing_one_is_refused_rather_than_averaged(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one finite number"):
        bootstrap_mean(values)


def test_unpaired_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="1 values before and 2 after"):
        bootstrap_difference([1.0], [1.0, 2.0])
