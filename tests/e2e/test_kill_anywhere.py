"""SIGKILL anywhere, `--resume`, and the run is the undisturbed one bit for bit; no verdict is bought twice.

The long form, with a hundred kills and more, is `python benchmarks/kill_anywhere.py`.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from kill_harness.campaign import Campaign
from kill_harness.counting_judge import CountingJudge, count, serve_counting
from kill_harness.evidence import booked, differences, evidence, unaudited
from kill_harness.kills import PHASES, Kill, in_phase
from kill_harness.nursery import AtOperation, Nursery
from kill_harness.recipe import CONCURRENCY, JUDGE_DELAY_S, PRICE, write_recipe
from run_builders import lines_of

from grpo.checkpoint import latest_checkpoint

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def judge() -> Iterator[CountingJudge]:
    with serve_counting(delay_s=JUDGE_DELAY_S) as server:
        yield server


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as started:
        yield started


@pytest.fixture(scope="module")
def campaign(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory, judge: CountingJudge, nursery: Nursery
) -> Campaign:
    folder = tmp_path_factory.mktemp("campaign")
    return Campaign(folder, write_recipe(folder, tiny_model_dir, judge), judge, nursery)


def test_killed_in_every_phase_in_turn_a_run_is_the_undisturbed_one_and_buys_nothing_twice(campaign: Campaign) -> None:
    """One run, killed again and again: each process comes a phase further than the one before it. Each kill comes right
    before the phase's first file operation, or at its end where it has none (backward, optimizer)."""
    phases = ("rollout", "judging", "journal", "backward", "optimizer", "checkpoint_write", "rename", "rotation")
    outcome = campaign.survive([Kill(kind="operation", phase=phase) for phase in phases])
    assert outcome.problems == []
    assert [death.phase for death in outcome.deaths] == list(phases)
    assert outcome.num_repeated <= 2 * CONCURRENCY  # only the first two were at a time when calls were in flight


def test_a_question_that_was_in_flight_at_a_kill_is_asked_again_and_its_answer_audited(
    campaign: Campaign, judge: CountingJudge
) -> None:
    kill = Kill(kind="operation", phase="", named="write judge_audit.jsonl")  # the first answer is there: 3 are not
    outcome = campaign.survive([kill])
    assert outcome.problems == []
    assert 1 <= outcome.num_repeated <= CONCURRENCY
    assert outcome.unaudited == []


# --- money


def test_what_was_received_before_a_kill_is_booked_once_though_no_judgement_was_audited_yet(
    tiny_model_dir: Path, tmp_path: Path, judge: CountingJudge, nursery: Nursery
) -> None:
    recipe = write_recipe(tmp_path, tiny_model_dir, judge, **ONE_GROUP)
    judge.take_asked()
    assert run(nursery, recipe, tmp_path / "whole") == (0, "")
    bill = sum(one.cost(PRICE) for one in judge.take_asked())
    assert bill > 0
    assert booked(tmp_path / "whole") == pytest.approx(bill)
    killed = tmp_path / "killed"
    code, _ = run(nursery, recipe, killed, kill=before_the_first_record_of(tmp_path / "whole"))
    num_verdicts = (killed / "journal" / "step-1.rank-0.jsonl").read_bytes().count(b'{"kind": "verdict"')
    kinds = ["booking" in line for line in lines_of(killed / "judge_audit.jsonl")]
    assert (code, kinds) == (-signal.SIGKILL, [True] * num_verdicts)  # all calls of the step, and no judgement
    assert run(nursery, recipe, killed, resume=True) == (0, "")
    asked = judge.take_asked()
    assert max(count(asked).values()) == 1
    assert sum(one.cost(PRICE) for one in asked) == pytest.approx(bill)
    assert booked(killed) == pytest.approx(bill)


def test_what_was_received_before_a_kill_counts_towards_the_cap_of_the_resumed_run(
    tiny_model_dir: Path, tmp_path: Path, judge: CountingJudge, nursery: Nursery
) -> None:
    """The cap is met in the second step, where the first one's calls count: none of them was audited at the kill."""
    recipe = write_recipe(tmp_path, tiny_model_dir, judge, cap=1e-9, **ONE_GROUP)
    code, said = run(nursery, recipe, tmp_path / "poor")
    upper_bound = re.search(r"and the next may cost ([\d.e-]+); the cap is 1e-09", said)
    assert (code, judge.take_asked()) == (1, [])
    assert upper_bound is not None, said
    recipe = write_recipe(tmp_path, tiny_model_dir, judge, **ONE_GROUP)
    assert run(nursery, recipe, tmp_path / "whole") == (0, "")
    bills = [one.cost(PRICE) for one in judge.take_asked()]
    assert len(bills) == 8
    cap = 0.7 * sum(bills) + float(upper_bound[1])  # the second step's four alone, half of all, would fit
    capped = write_recipe(tmp_path, tiny_model_dir, judge, cap=cap, **ONE_GROUP)
    killed = tmp_path / "killed"
    assert run(nursery, capped, killed, kill=before_the_first_record_of(tmp_path / "whole"))[0] == -signal.SIGKILL
    code, said = run(nursery, capped, killed, resume=True)
    bill = sum(one.cost(PRICE) for one in judge.take_asked())
    assert code == 1
    assert "budget.per_run is reached" in said
    assert f"what is left of {cap:.6g}" in said
    assert bill <= cap
    assert booked(killed) == pytest.approx(bill)


ONE_GROUP = {
    "prompts": {"type": "file", "path": "train.jsonl", "held_out_path": "test.jsonl", "per_step": 1},
    "rollout": {"group_size": 4, "max_new_tokens": 8},
    "eval": {"before": False, "after": False, "num_prompts": 2},
    "scoring": {"min_valid_fraction": 1.0},
    "steps": 2,
}
"""A step's calls are all those of one group, so that none is in flight when its judgements are written down."""


def before_the_first_record_of(run_dir: Path) -> AtOperation:
    """When all calls of the first group have been booked; each line is a write."""
    first = next(number for number, line in enumerate(lines_of(run_dir / "judge_audit.jsonl")) if "id" in line)
    return AtOperation(phase="", occurrence=1, operation=first + 1, named="write judge_audit.jsonl")


def run(
    nursery: Nursery, recipe: Path, run_dir: Path, *, resume: bool = False, kill: AtOperation | None = None
) -> tuple[int, str]:
    """Exit code, and what it said on one line where it failed."""
    phases, output = run_dir.parent / f"{run_dir.name}.phases", run_dir.parent / f"{run_dir.name}.output"
    if not phases.exists():
        os.mkfifo(phases)
    arguments = [str(run_dir), "--resume"] if resume else [str(recipe), f"output_dir={json.dumps(str(run_dir))}"]
    reader = os.open(phases, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with nursery.start(["train", *arguments], run_dir=run_dir, output=output, phases=phases, kill=kill) as started:
            code = started.wait()
    finally:
        os.close(reader)
    return code, "" if code == 0 else " ".join(output.read_text().split())


AT_OPERATIONS = {
    "write step-1.rank-0.jsonl": ("", 3),  # the journal, while verdicts come in
    "fsync step-1.rank-0.jsonl": ("journal", 1),  # the seal is written, but not synced
    "write .manifest.json.new": ("checkpoint_write", 1),  # all other files are on the disk
    "replace manifest.json": ("checkpoint_write", 1),
    "rename step-2": ("rename", 1),
    "rmdir policy": ("rotation", 1),  # in the midst of deleting an older checkpoint
    "unlink step-2.rank-0.jsonl": ("rotation", 1),  # and a journal that no checkpoint needs any more
}
"""Operation -> the phase that it belongs to, and the how many-th of its kind in the process or phase."""


def test_killed_right_before_chosen_system_calls_a_run_is_the_undisturbed_one(campaign: Campaign) -> None:
    """One run: each process is killed at a later call than the one before it."""
    kills = [
        Kill(kind="operation", phase=phase, operation=number, named=named)
        for named, (phase, number) in AT_OPERATIONS.items()
    ]
    outcome = campaign.survive(kills)
    assert outcome.problems == []
    assert [death.phase for death in outcome.deaths][1:] == [phase for phase, _ in AT_OPERATIONS.values()][1:]


@pytest.mark.slow
def test_killed_at_any_time_a_run_is_the_undisturbed_one(campaign: Campaign) -> None:
    assert campaign.warm_up() == []
    draw, seconds = random.Random(0), campaign.undisturbed.seconds
    # a resumed process has less to do, and the machine may be faster now
    outcome = campaign.survive([Kill(kind="time", after_s=draw.uniform(0.0, 0.4 * seconds)) for _ in range(3)])
    assert outcome.problems == []
    assert outcome.num_kills >= 1


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_finishes_the_step_and_saves_and_twice_leaves_the_last_checkpoint_valid(
    times: int, campaign: Campaign, judge: CountingJudge
) -> None:
    """In the third step, while verdicts are waited for; the last checkpoint is of the second."""
    usual = judge.settings

    def slow_down() -> None:
        judge.settings = replace(usual, delay_s=0.3)  # so that there is time to press it twice

    occurrence = 1 + [phase for phase, _ in _until_step(campaign, 2)].count("rollout")
    try:
        code, said, run_dir = campaign.interrupt(
            f"ctrl-c-{times}", times=times, phase="rollout", occurrence=occurrence, then=slow_down
        )
    finally:
        judge.settings = usual
    assert code == 130, said
    saved = {1: 3, 2: 2}[times]
    assert latest_checkpoint(run_dir).step == saved
    assert _num_lines(run_dir) == saved
    assert ("stopped at once" in said) == (times == 2)
    assert f"grpo train {run_dir} --resume" in said.replace("\n", "")
    assert campaign.finish(run_dir) == []


def _until_step(campaign: Campaign, step: int) -> list[tuple[str, float]]:
    """Phases of the undisturbed run up to the end of a step: its optimizer's."""
    phases = campaign.undisturbed.phases
    ends = [place for place, (phase, _) in enumerate(phases) if phase == "optimizer"]
    return phases[: ends[step - 1]]


def test_the_comparison_would_notice_a_changed_weight_a_lost_line_and_another_metric(
    campaign: Campaign, tmp_path: Path
) -> None:
    run_dir = campaign.undisturbed.run_dir
    assert differences(run_dir, run_dir) == []
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    lines = (run_dir / "completions.jsonl").read_text().splitlines(keepends=True)
    (other / "completions.jsonl").write_text("".join(lines[1:]))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["beta/fair"] += 1e-12
    rows[-1]["time/step_s"] += 1.0  # times may differ
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert differences(run_dir, other) == [
        "completions.jsonl differs",
        f"metrics step {rows[-1]['step']} beta/fair differs",
    ]


def test_the_disk_is_held_against_the_phase(campaign: Campaign) -> None:
    run_dir = campaign.undisturbed.run_dir  # finished: nothing is sealed, nothing is under way
    assert evidence(run_dir, "between")[1] == ""
    assert evidence(run_dir, "optimizer")[1] == "the step is not sealed in the journal, but the optimizer is at work"


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_killed_many_times_in_one_phase_a_run_is_the_undisturbed_one(phase: str, campaign: Campaign) -> None:
    met = 0
    for number in range(20):
        outcome = campaign.survive([in_phase(random.Random(f"{phase} {number}"), phase, campaign.undisturbed.phases)])
        assert outcome.problems == []
        met += outcome.deaths[0].phase == phase
        if met == 5:
            break
    assert met == 5


@pytest.mark.slow
def test_a_run_that_trains_all_weights_survives_kills_too(
    tiny_model_dir: Path, tmp_path: Path, judge: CountingJudge, nursery: Nursery
) -> None:
    campaign = Campaign(tmp_path, write_recipe(tmp_path, tiny_model_dir, judge, full=True), judge, nursery)
    assert campaign.warm_up() == []
    for phase in ("backward", "checkpoint_write", "rename"):
        outcome = campaign.survive([Kill(kind="operation", phase=phase), Kill(kind="operation", phase="journal")])
        assert outcome.problems == []


@pytest.mark.slow
def test_a_command_of_its_own_process_survives_kills_at_any_time(
    campaign: Campaign, tiny_model_dir: Path, tmp_path: Path, judge: CountingJudge
) -> None:
    """As a person starts it: no fork, another hash seed in each process."""
    recipe = write_recipe(tmp_path, tiny_model_dir, judge)
    run_dir = tmp_path / "run"
    judge.take_asked()
    num_kills = 0
    for number in range(4):
        arguments = ["train", str(run_dir), "--resume"] if run_dir.exists() else ["train", str(recipe)]
        command = [sys.executable, "-m", "grpo", *arguments]
        lines = _num_lines(run_dir)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            while number < 3 and process.poll() is None and _num_lines(run_dir) == lines:
                time.sleep(0.002)
            time.sleep(random.Random(number).uniform(0.0, 0.1))
            if number < 3:
                process.kill()
            _, stderr = process.communicate(timeout=120)
            num_kills += process.returncode == -signal.SIGKILL
    assert process.returncode == 0, stderr.decode()
    assert num_kills >= 2
    assert differences(campaign.undisturbed.run_dir, run_dir) == []
    asked = judge.take_asked()
    assert (campaign.undisturbed.asked - count(asked)).total() == 0
    assert (count(asked) - campaign.undisturbed.asked).total() <= num_kills * CONCURRENCY
    assert unaudited(run_dir, asked, campaign.undisturbed.asked) == []


def _num_lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
