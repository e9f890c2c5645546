"""A tracker shows a run's figures somewhere else; whatever it does, the run and its metrics.jsonl stay as they are."""

from __future__ import annotations

import errno
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from run_builders import Notebook, Runs, metrics_of, tensors_of, what_was_computed

from grpo.errors import ConfigError
from grpo.trackers import BackgroundTrackers, Tracker, check_trackers
from grpo.trackers.ecosystem import FOLDER, flat
from grpo.trainer import Trainer


class Double:
    """A tracker that keeps what it is told, and does something at each call."""

    name = "double"

    def __init__(
        self,
        *,
        at_start: Callable[[], object] = list,
        at_log: Callable[[int], object] = lambda _: None,
        at_finish: Callable[[], object] = list,
    ) -> None:
        self._at_start, self._at_log, self._at_finish = at_start, at_log, at_finish
        self.steps: list[int] = []
        self.figures: list[Mapping[str, float]] = []
        self.is_finished = False

    def start(self) -> None:
        self._at_start()

    def log(self, figures: Mapping[str, float], *, step: int) -> None:
        self._at_log(step)
        self.steps.append(step)
        self.figures.append(figures)

    def finish(self) -> None:
        self._at_finish()
        self.is_finished = True


def fail(*_: object) -> None:
    raise ConnectionError("the server is down")


def disk_is_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def row(step: int, **figures: float | None) -> dict[str, float | None]:
    return {"step": step, "loss": 0.5, **figures}


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    place = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    place.prepare()
    return place


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """An event that a tracker waits for in vain; set after the test, so that no thread stays."""
    event = threading.Event()
    yield event
    event.set()


# --- the queue between a run and its trackers


def test_every_step_reaches_a_tracker_in_order_and_figures_that_are_missing_are_left_out() -> None:
    double = Double()
    trackers = BackgroundTrackers([double])
    for step in (1, 2, 3):
        trackers.log(row(step, absent=None))
    assert trackers.close() == []
    assert double.steps == [1, 2, 3]
    assert double.figures == [{"loss": 0.5}] * 3
    assert double.is_finished


def test_one_that_fails_now_and_then_warns_once_and_its_missing_steps_are_counted() -> None:
    double = Double(at_log=lambda step: fail() if step % 2 else None)
    trackers = BackgroundTrackers([double])
    for step in (1, 2, 3, 4, 5):
        trackers.log(row(step))
    assert trackers.close() == [
        "tracker double failed; it is tried again with every step: ConnectionError: the server is down. "
        "The run goes on",
        "tracker double lacks 3 of 5 steps; metrics.jsonl has them",
    ]
    assert double.steps == [2, 4]


def test_one_that_cannot_be_started_is_left_out_and_the_others_are_not() -> None:
    down, up = Double(at_start=fail), Double()
    trackers = BackgroundTrackers([down, up], max_waiting=1)
    for step in (1, 2, 3):
        trackers.log(row(step))
        while len(up.steps) < step:  # it takes one after the other
            threading.Event().wait(0.001)
    first, second = trackers.close()
    assert first.startswith("tracker double could not be started, and is left out: ConnectionError")
    assert second == "tracker double lacks 3 of 3 steps; metrics.jsonl has them"
    assert (down.steps, up.steps) == ([], [1, 2, 3])


def test_one_that_hangs_holds_back_neither_a_step_nor_the_end_of_the_run(never: threading.Event) -> None:
    taken = threading.Event()

    def hang(_: int) -> None:
        taken.set()
        never.wait()

    trackers = BackgroundTrackers([Double(at_log=hang)], max_waiting=2)
    trackers.log(row(1))
    assert taken.wait(10)
    for step in range(2, 100):  # two of them wait, the others are dropped
        trackers.log(row(step))
    (warning,) = trackers.take_warnings()
    assert warning.startswith("tracker double is 2 steps behind; it misses further ones until it catches up")
    trackers.log(row(100))
    assert trackers.take_warnings() == []  # told once
    assert trackers.close(wait_s=0.05) == ["tracker double lacks 100 of 100 steps; metrics.jsonl has them"]


def test_one_that_is_slow_gets_what_waited_for_it_before_the_run_ends() -> None:
    go_on = threading.Event()
    double = Double(at_log=lambda _: go_on.wait())
    trackers = BackgroundTrackers([double])
    for step in (1, 2, 3):
        trackers.log(row(step))
    threading.Timer(0.05, go_on.set).start()
    assert trackers.close() == []
    assert double.steps == [1, 2, 3]


def test_one_that_fails_at_its_end_is_told() -> None:
    trackers = BackgroundTrackers([Double(at_finish=disk_is_full)])
    trackers.log(row(1))
    (warning,) = trackers.close()
    assert warning.startswith("tracker double failed at its end: OSError: [Errno 28] No space left on device")


# --- in a run


def train(runs: Runs, name: str, *trackers: Tracker, resume: bool = False, **changes: Any) -> tuple[Path, list[str]]:
    """The run directory and the warnings about trackers."""
    told = Notebook()
    trainer = Trainer(runs.config(name, **changes), observer=told, trackers=trackers)
    return trainer.run(resume=resume).run_dir, [text for text in told.warnings if text.startswith("tracker")]


def test_no_tracker_stops_a_run_or_changes_what_it_computes(runs: Runs) -> None:
    plain, _ = train(runs, "plain")
    well, down, full = Double(), Double(at_start=fail), Double(at_log=disk_is_full)
    tracked, warnings = train(runs, "tracked", well, down, full)
    ours, theirs = tensors_of(tracked), tensors_of(plain)
    assert [name for name in theirs if not ours[name].equal(theirs[name])] == []
    assert what_was_computed(tracked) == what_was_computed(plain)
    assert sorted(warning.partition(": ")[0] for warning in warnings) == [
        "tracker double could not be started, and is left out",
        "tracker double failed; it is tried again with every step",
        "tracker double lacks 2 of 2 steps; metrics.jsonl has them",
        "tracker double lacks 2 of 2 steps; metrics.jsonl has them",
    ]
    assert well.steps == [1, 2]
    known = [{name: value for name, value in line.items() if value is not None} for line in metrics_of(tracked)]
    assert [{"step": step, **line} for step, line in zip(well.steps, well.figures, strict=True)] == known


def test_a_tracker_that_hangs_does_not_hold_back_a_ctrl_c(runs: Runs, never: threading.Event) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    hanging = Double(at_start=never.wait)
    trainer = Trainer(runs.config("run"), observer=Notebook(after={1: interrupt}), trackers=[hanging])
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert any(thread.name == "tracker double" for thread in threading.enumerate())  # left behind, not waited for
    assert [line["step"] for line in metrics_of(runs.folder / "run")] == [1]


# --- tensorboard itself


def scalars_of(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of each event, as tensorboard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run_dir / FOLDER / "tensorboard" / run_dir.name))
    shown.Reload()
    return {name: [(event.step, event.value) for event in shown.Scalars(name)] for name in shown.Tags()["scalars"]}


@pytest.fixture
def tensorboard() -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")


@pytest.mark.usefixtures("tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_shows_every_steps_figures_and_a_resumed_run_shows_none_twice(runs: Runs) -> None:
    changes: dict[str, Any] = {"trackers": ["tensorboard"], "checkpoint": {"every": 2}}

    def crash() -> None:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):  # step 3 is shown, but no checkpoint has it
        Trainer(runs.config("run", steps=4, **changes), observer=Notebook(after={3: crash})).run()
    run_dir, warnings = train(runs, "run", resume=True, steps=4, **changes)
    assert warnings == []
    shown = scalars_of(run_dir)
    for name in ("loss/policy", "grad_norm", "time/step_s"):
        expected = [(line["step"], pytest.approx(line[name], rel=1e-6, abs=1e-12)) for line in metrics_of(run_dir)]
        assert shown[name] == expected


@pytest.mark.usefixtures("tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # in its own thread
def test_tensorboard_on_a_full_disk_costs_the_run_nothing_but_its_own_figures(runs: Runs, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no file system may be mounted here")
    try:
        (disk / "filling").write_bytes(b"0" * 60 * 1024)
        changes = {"trackers": [{"type": "tensorboard", "params": {"logging_dir": str(disk)}}]}
        run_dir, warnings = train(runs, "run", steps=4, **changes)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    assert [line["step"] for line in metrics_of(run_dir)] == [1, 2, 3, 4]
    assert any("No space left on device" in warning for warning in warnings), warnings


# --- in a recipe


def test_a_name_alone_is_a_tracker_with_the_defaults(runs: Runs) -> None:
    (short,) = runs.config("run", trackers=["tensorboard"]).trackers
    (long,) = runs.config("run", trackers=[{"type": "tensorboard", "project": "grpo"}]).trackers
    assert short == long


def test_a_tracker_that_is_not_there_is_refused_before_anything_is_written(runs: Runs) -> None:
    runs.check_refused(
        ["trackers", "'wandb'", "'tensorboard'", "nothing_of_the_kind"], trackers=["nothing_of_the_kind"]
    )
    runs.check_refused(["trackers", "names one twice"], trackers=["tensorboard", "tensorboard"])


def test_a_package_that_is_missing_is_named_with_how_to_install_it(runs: Runs) -> None:
    (comet,) = runs.config("run", trackers=["comet_ml"]).trackers
    with pytest.raises(ConfigError, match=r"comet_ml is not installed\. Install it with: pip install comet-ml"):
        check_trackers([comet])


def test_a_recipe_goes_to_a_tracker_as_dotted_names_and_plain_values() -> None:
    recipe = {"optim": {"learning_rate": 0.1}, "on": True, "names": ["a", "b"], "none": None, "empty": {}}
    assert flat(recipe) == {
        "optim.learning_rate": 0.1,
        "on": True,
        "names": "['a', 'b']",
        "none": "None",
        "empty": "{}",
    }
