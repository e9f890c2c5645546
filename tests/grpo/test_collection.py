"""Dynamic sampling: groups that teach nothing are replaced by groups of other prompts, bounded and reproducible."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from run_builders import ROWS, Runs, completions_of, make_objective, metrics_of

from grpo.config import TaskPrompts
from grpo.errors import TooFewVerdicts
from grpo.prompts import ListSource, PromptSource, open_prompts
from grpo.types import Message, Prompt


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    place = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    place.prepare()
    return place


def make_source(num_prompts: int, *, per_step: int, seed: int = 0) -> ListSource:
    """Prompts of objectives a, b and both in turn."""
    objectives: Sequence[tuple[str, ...]] = [("a",), ("b",), ("a", "b")]
    prompts = [
        Prompt(id=f"p{n}", messages=(Message(role="user", content=str(n)),), objectives=objectives[n % 3])
        for n in range(num_prompts)
    ]
    return ListSource(prompts, [], per_step=per_step, seed=seed)


# --- spare prompts


SOURCES: dict[str, tuple[PromptSource, int]] = {
    "list": (make_source(60, per_step=6), 6),
    "tasks": (
        open_prompts(
            TaskPrompts(type="tasks", names=("fairness", "grounding"), per_step=4), seed=3, objectives=["fairness"]
        ),
        4,
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_no_prompt_comes_twice_in_a_step_over_all_rounds_and_each_spare_has_its_places_objectives(name: str) -> None:
    source, per_step = SOURCES[name]
    for step in (1, 2, 7):
        batch = source.batch(step)
        seen = [prompt.id for prompt in batch]
        for round_number in (1, 2, 3):
            spares = source.spares(step, round_number, range(per_step))
            assert spares.keys() <= set(range(per_step))
            for place, prompt in spares.items():
                assert prompt.objectives == batch[place].objectives
            seen += [prompt.id for prompt in spares.values()]
        assert len(set(seen)) == len(seen)
        assert len(seen) > 2 * per_step  # there were spares indeed


@pytest.mark.parametrize("name", SOURCES)
def test_spares_depend_on_step_round_and_place_and_on_nothing_else(name: str) -> None:
    source, per_step = SOURCES[name]
    whole = source.spares(2, 1, range(per_step))
    source.batch(9)  # what was asked for in between does not matter
    for place in range(per_step):
        one = source.spares(2, 1, [place])
        assert one == ({place: whole[place]} if place in whole else {})
    assert source.spares(2, 2, range(per_step)) != whole
    assert source.spares(3, 1, range(per_step)) != whole
    assert source.spares(2, 1, []) == {}


def test_a_small_dataset_gives_fewer_spares_and_one_that_is_used_up_gives_none() -> None:
    # 8 prompts, 6 in the step: two are left, each fit for the places that have its objectives
    source = make_source(8, per_step=6)
    in_use = {prompt.id for prompt in source.batch(1)}
    found = [source.spares(1, round_number, range(6)) for round_number in range(1, 5)]
    ids = [prompt.id for spares in found for prompt in spares.values()]
    assert len(ids) == len(set(ids)) <= 2
    assert not set(ids) & in_use
    assert make_source(6, per_step=6).spares(1, 1, range(6)) == {}


# --- through a run

ROLLOUT = {"group_size": 4, "max_new_tokens": 8, "resample_rounds": 2}
FLAT = ["p0", "p2", "p4"]
"""Of the four prompts that `short` scores; only p6 teaches it anything."""


def with_flat(flat: Sequence[str]) -> dict[str, Any]:
    return {"short": make_objective(flat=flat), "long": make_objective()}


def prompts_of(run_dir: Path, step: int) -> tuple[list[str], list[str]]:
    """Ids of the prompts whose groups were trained on, and of those that were sampled in vain."""
    rows = [row for row in completions_of(run_dir) if row["step"] == step]
    trained = dict.fromkeys(row["prompt_id"] for row in rows if row["advantage"] is not None)
    discarded = dict.fromkeys(row["prompt_id"] for row in rows if row["advantage"] is None)
    return list(trained), list(discarded)


def test_flat_groups_are_replaced_by_others_of_the_same_objectives_counted_and_written_down(runs: Runs) -> None:
    objectives = with_flat(FLAT)
    plain = runs.run("plain", steps=4, objectives=objectives)
    run_dir = runs.run("resampled", steps=4, objectives=objectives, rollout=ROLLOUT)
    objectives_of = {row["id"]: row["objectives"] for row in ROWS}
    num_replaced = 0
    for step, row in enumerate(metrics_of(run_dir), start=1):
        trained, discarded = prompts_of(run_dir, step)
        asked, _ = prompts_of(plain, step)
        assert len(trained) == 2
        assert [objectives_of[name] for name in trained] == [objectives_of[name] for name in asked]
        assert not set(trained) & set(discarded)
        assert row["groups/resampled"] == len(discarded) <= 2 * 2  # two places, two rounds
        lines = [line for line in completions_of(run_dir) if line["step"] == step]
        assert len(lines) == 4 * (2 + len(discarded))
        assert row["tokens/completion"] == sum(line["num_tokens"] for line in lines)
        for name in discarded:  # scored all the same
            assert {next(iter(line["verdicts"].values()))["value"] for line in lines if line["prompt_id"] == name}
        for before, after in zip(asked, trained, strict=True):
            if before != after:
                num_replaced += 1
                assert before in discarded
                assert after not in FLAT
            elif before not in FLAT:
                assert before not in discarded
    assert num_replaced > 0
    assert sum(r["groups/zero_variance_frac"] for r in metrics_of(run_dir)) < sum(
        r["groups/zero_variance_frac"] for r in metrics_of(plain)
    )
    assert all(row["groups/resampled"] == 0 for row in metrics_of(plain))


def test_a_run_with_dynamic_sampling_resumes_bit_for_bit(runs: Runs) -> None:
    run_dir = runs.run_in_two_parts(objectives=with_flat(FLAT), rollout=ROLLOUT)
    assert sum(row["groups/resampled"] for row in metrics_of(run_dir)) > 0


def test_missing_verdicts_count_and_stop_the_run_though_their_group_was_replaced(runs: Runs) -> None:
    asked, _ = prompts_of(runs.run("plain", steps=1), 1)
    failing = asked[0]
    objectives = {name: make_objective(missing=[failing]) for name in ("short", "long")}
    (own,) = next(row["objectives"] for row in ROWS if row["id"] == failing)
    lenient = runs.run("lenient", steps=1, objectives=objectives, rollout=ROLLOUT, scoring={"min_valid_fraction": 0})
    trained, discarded = prompts_of(lenient, 1)
    assert failing in discarded
    assert failing not in trained
    (row,) = metrics_of(lenient)
    asked_in_all = sum(own in line["verdicts"] for line in completions_of(lenient))
    assert row[f"reward/{own}/unscored_frac"] == 4 / asked_in_all
    with pytest.raises(TooFewVerdicts, match=f"objective {own}: 4 of {asked_in_all} completions have no verdict"):
        runs.run("strict", steps=1, objectives=objectives, rollout=ROLLOUT, scoring={"min_valid_fraction": 1})


def test_where_every_group_is_flat_the_search_ends_and_the_steps_own_prompts_stay(runs: Runs) -> None:
    everything = [row["id"] for row in ROWS]
    objectives = {name: make_objective(flat=everything) for name in ("short", "long")}
    plain = runs.run("plain", steps=1, objectives=objectives)
    run_dir = runs.run("resampled", steps=1, objectives=objectives, rollout={**ROLLOUT, "resample_rounds": 50})
    trained, discarded = prompts_of(run_dir, 1)
    assert trained == prompts_of(plain, 1)[0]
    assert 0 < len(discarded) <= 6  # of eight prompts, two are the step's own
    (row,) = metrics_of(run_dir)
    assert row["groups/zero_variance_frac"] == 1
    assert row["loss/policy"] == 0


def test_flat_groups_that_are_dropped_leave_the_update_unless_there_are_no_others(runs: Runs) -> None:
    everything = [row["id"] for row in ROWS]
    prompts = {"type": "file", "path": "train.jsonl", "per_step": 8}
    half = {"short": make_objective(flat=everything), "long": make_objective()}
    kept, dropped = (
        metrics_of(runs.run(kind, steps=1, prompts=prompts, objectives=half, update={"flat_groups": kind}))[0]
        for kind in ("kl_only", "drop")
    )
    assert "kl/short" in kept
    assert "kl/short" not in dropped
    assert kept["reward/short/mean"] == dropped["reward/short/mean"] == 0.5
    nothing = {name: make_objective(flat=everything) for name in ("short", "long")}
    (row,) = metrics_of(
        runs.run("nothing", steps=1, prompts=prompts, objectives=nothing, update={"flat_groups": "drop"})
    )
    assert {"kl/short", "kl/long"} <= row.keys()
