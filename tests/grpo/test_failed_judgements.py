"""The benchmark of failed judgements in its quick form: what it says of TRL's reward path and of ours."""

from __future__ import annotations

import math
from typing import Any

import pytest
from failed_judgements import PATHS, Combine, Schedule, left_out, run

ROWS = run(is_quick=True)


def row(path: str, objectives: int, combine: Combine) -> dict[str, Any]:
    (found,) = [one for one in ROWS if (one["path"], one["objectives"], one["combine"]) == (path, objectives, combine)]
    return found


def test_the_yardstick_is_what_one_works_out_by_hand() -> None:
    # rewards 1, missing, 0, 0: mean 1/3, deviation sqrt(((2/3)^2 + 2 (1/3)^2) / 2) = 0.577350
    by_hand = [(2 / 3) / 0.577450, 0.0, -(1 / 3) / 0.577450, -(1 / 3) / 0.577450]
    for combine in ("summed", "decoupled"):
        assert left_out([[[1.0], [None], [0.0], [0.0]]], combine)[0] == pytest.approx(by_hand, abs=1e-5)
    # two objectives, the second's second score missing: the sum loses that row, which is then the group above
    group = [[0.5, 0.5], [1.0, None], [0.0, 0.0], [0.0, 0.0]]
    assert left_out([group], "summed")[0] == pytest.approx(by_hand, abs=1e-5)
    # apart: the first keeps all four (mean 3/8, deviation sqrt(11/48) = 0.478714), the second is half the group above;
    # their sums are divided by the deviation of the four sums
    first = [(x - 0.375) / 0.478814 for x in (0.5, 1.0, 0.0, 0.0)]
    second = [(x - 1 / 6) / 0.288775 if x is not None else 0.0 for x in (0.5, None, 0.0, 0.0)]
    sums = [a + b for a, b in zip(first, second, strict=True)]
    spread = math.sqrt(sum(one**2 for one in sums) / 3)
    assert left_out([group], "decoupled")[0] == pytest.approx([one / (spread + 1e-4) for one in sums], abs=1e-4)


@pytest.mark.parametrize(("objectives", "combine"), [(1, "summed"), (2, "summed"), (2, "decoupled")])
def test_a_failed_judgement_moves_none_of_our_advantages(objectives: int, combine: Combine) -> None:
    ours = row("ours", objectives, combine)
    assert ours["failed"] > 5 * objectives
    assert ours["worst"] < 1e-5  # float32
    assert ours["turned"] == 0.0
    assert ours["distance"] > 0.1  # what a judge would have said is lost all the same


def test_trl_takes_a_none_for_a_zero_where_it_sums_objectives_and_leaves_it_out_elsewhere() -> None:
    assert row("TRL, None", 2, "summed")["error"] > 0.1
    assert row("TRL, None", 2, "decoupled")["worst"] < 1e-5
    assert row("TRL, None", 1, "summed")["worst"] < 1e-5


def test_a_number_in_place_of_a_failure_moves_advantages_and_an_exception_ends_the_training() -> None:
    for objectives, combine in ((1, "summed"), (2, "summed"), (2, "decoupled")):
        assert row("TRL, 0", objectives, combine)["error"] > 0.1
        assert row("TRL, 0.5", objectives, combine)["error"] > 0.1
        assert row("TRL, the exception", objectives, combine)["ends_the_step"]


def test_without_failures_both_give_the_same_advantages() -> None:
    schedule = Schedule(seed=3, prompts=4, objectives=2, failure_rate=0.0)
    for combine in ("summed", "decoupled"):
        right = left_out(schedule.scores(), combine)
        for path, advantages in PATHS.items():
            found = advantages(schedule, combine)
            for group, expected in zip(found, right, strict=True):
                assert group == pytest.approx(expected, abs=1e-5), path
