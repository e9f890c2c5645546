"""Room for two checkpoints: looked for before the first step and at every save, and told by path and bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from kill_harness.file_faults import disk_of
from run_builders import Notebook, Runs, lines_of

from grpo.checkpoint import bytes_of, latest_checkpoint, list_checkpoints
from grpo.errors import ConfigError, StorageError

pytestmark = pytest.mark.faults

STEPS = 4


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    made = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    made.prepare()
    return made


@pytest.fixture
def checkpoint_bytes(runs: Runs) -> int:
    """What one takes."""
    return bytes_of(latest_checkpoint(runs.run("measured", steps=1)))


def test_without_room_for_two_no_first_step_is_taken_and_nothing_is_written(runs: Runs, checkpoint_bytes: int) -> None:
    run_dir = runs.folder / "run"
    with disk_of(2 * checkpoint_bytes - 1, run_dir), pytest.raises(ConfigError) as caught:
        runs.run("run", steps=STEPS, checkpoint={"every": 1})
    assert re.match(
        rf"{run_dir}: the next 2 checkpoint\(s\) need \d+ bytes .*, but \d+ bytes are free", str(caught.value)
    )
    assert not run_dir.exists()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_at_any_save_a_checkpoint_that_finds_no_room_is_not_begun_and_the_one_before_stays(
    at: int, runs: Runs, checkpoint_bytes: int
) -> None:
    run_dir = runs.folder / "run"
    with disk_of(100 * checkpoint_bytes, run_dir) as disk:

        def fill() -> None:  # by somebody else, while the step is taken
            disk.num_bytes = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file()) + 1000

        with pytest.raises(StorageError) as caught:
            runs.run("run", steps=STEPS, checkpoint={"every": 1, "keep": 2}, observer=Notebook(after={at: fill}))
    refused = re.match(rf"{run_dir}: the next 1 checkpoint\(s\) need (\d+) bytes", str(caught.value))
    assert refused is not None, caught.value
    assert int(refused[1]) >= checkpoint_bytes
    assert len(lines_of(run_dir / "metrics.jsonl")) == at
    assert [one.step for one in list_checkpoints(run_dir)] == [step for step in (at - 2, at - 1) if step >= 1]


@pytest.mark.parametrize("at", [2, 3])  # at the first, what it will take is not known, and estimated higher
def test_at_any_save_a_checkpoint_that_leaves_no_room_for_the_next_is_saved_and_the_run_ends_with_it(
    at: int, runs: Runs, checkpoint_bytes: int
) -> None:
    run_dir = runs.folder / "run"
    with disk_of(100 * checkpoint_bytes, run_dir) as disk:

        def leave_room_for_one() -> None:
            taken = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file())
            disk.num_bytes = taken + checkpoint_bytes * 9 // 5

        with pytest.raises(StorageError) as caught:
            runs.run(
                "run",
                steps=STEPS,
                checkpoint={"every": 1, "keep": STEPS},
                observer=Notebook(after={at: leave_room_for_one}),
            )
    saved = run_dir / "checkpoints" / f"step-{at}"
    assert f"{saved} was saved, but no other will be: {run_dir}: the next 1 checkpoint(s) need" in str(caught.value)
    assert latest_checkpoint(run_dir).step == at
    runs.run("run", resume=True, steps=STEPS, checkpoint={"every": 1, "keep": STEPS})
    assert len(lines_of(run_dir / "metrics.jsonl")) == STEPS


def test_the_last_save_needs_no_room_for_another(runs: Runs, checkpoint_bytes: int) -> None:
    run_dir = runs.folder / "run"
    with disk_of(100 * checkpoint_bytes, run_dir) as disk:

        def leave_room_for_one() -> None:
            taken = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file())
            disk.num_bytes = taken + checkpoint_bytes * 9 // 5

        runs.run("run", steps=2, checkpoint={"every": 1, "keep": 2}, observer=Notebook(after={2: leave_room_for_one}))
    assert latest_checkpoint(run_dir).step == 2
