"""A run in which one file operation fails: what becomes of it, what it says, which checkpoint is left, how it goes on.

An operation is told by what it does to which file, and how many of these there were before it in the run; so it is the
same one in the next run, though threads take turns in another order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kill_harness.evidence import differences
from kill_harness.file_faults import FAULTS
from kill_harness.file_operations import Operation, watched

from grpo.checkpoint import latest_checkpoint, list_checkpoints
from grpo.errors import CheckpointError, GrpoError, InputError

_RANDOM_NAME = re.compile(r"\.(.+)-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Place:
    """What an operation does, and to which file."""

    file: str
    """Below the run's folder, its numbers as N: "checkpoints/step-N/state.json"."""
    operation: str
    """Such as "fsync"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What came of one failure."""

    place: Place
    fault: str
    """A key of `FAULTS`."""
    exit_code: int
    """That the command would end with; 0: the run went on as if nothing had been."""
    message: str
    crash: str
    """The exception that nobody caught, with a traceback for the person; empty where there was none."""
    names_path: bool
    """Whether the message names the run's folder or a file in it."""
    names_need: bool
    """Whether it says how many bytes are needed, or were to be written."""
    left: str
    """Checkpoint that is left whole: "none yet", or of the last finished step, or of the step before it; "none" where
    there were some."""
    differences: tuple[str, ...]
    """Of the run, resumed, from the undisturbed one."""


def place_of(operation: Operation, run_dir: Path) -> Place:
    """The operation's, in a run."""
    names = [
        _RANDOM_NAME.sub(r"\1 (under a temporary name)", part)
        for part in operation.path.relative_to(run_dir.parent).parts
    ]
    where = "/".join(names[1:] if names[:1] == [run_dir.name] else names)
    where = where or ("the run's folder" if names else "the folder above")
    return Place(file=re.sub(r"\d+", "N", where), operation=operation.name)


def places_of(run: Callable[[Path], object], run_dir: Path) -> Counter[Place]:
    """Place -> how many operations an undisturbed run has there."""
    found: Counter[Place] = Counter()

    def note(operation: Operation, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        found[place_of(operation, run_dir)] += 1
        return call(*arguments)

    with watched(run_dir.parent, note):
        run(run_dir)
    return found


def fail_at(
    place: Place,
    number: int,
    fault: str,
    run: Callable[[Path], object],
    resume: Callable[[Path], object],
    *,
    run_dir: Path,
    undisturbed: Path,
) -> Trial:
    """Fail the operation with this number, from 1, at a place; then resume, or begin anew where nothing was begun.

    Args:
        run: begins a run in this folder, and raises what it ends with.
        resume: goes on with it.
        run_dir: alone in its parent, which is resolved.
    """
    met = 0

    def around(operation: Operation, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal met
        is_here = place_of(operation, run_dir) == place
        met += is_here
        return FAULTS[fault](operation, call, arguments) if is_here and met == number else call(*arguments)

    message, crash, code = "", "", 0
    with watched(run_dir.parent, around):
        try:
            run(run_dir)
        except GrpoError as exc:
            message, code = str(exc), 2 if isinstance(exc, InputError) else 1
        except Exception as exc:  # noqa: BLE001  a finding, not the end of all trials
            crash, code = f"{type(exc).__name__}: {exc}", 1
    left = _left(run_dir)
    if code and run_dir.exists():
        resume(run_dir)
    elif code:
        run(run_dir)
    return Trial(
        place=place,
        fault=fault,
        exit_code=code,
        message=message,
        crash=crash,
        names_path=str(run_dir) in message,
        names_need=re.search(r"\d+ bytes were to be written|need \d+ bytes", message) is not None,
        left=left,
        differences=tuple(differences(undisturbed, run_dir)),
    )


def _left(run_dir: Path) -> str:
    try:
        step = latest_checkpoint(run_dir).step
    except CheckpointError:
        return "none" if list_checkpoints(run_dir) else "none yet"
    lines = (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    return "of the last finished step" if step >= lines else "of the step before"


def table(trials: Sequence[Trial]) -> str:
    """Markdown: a row for each place, and kind of outcome."""
    lines = [
        "| file operation | what fails it | the run | the message names the path, the bytes needed | checkpoint left "
        "| resumed |",
        "|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[str, ...], list[str]] = {}
    for trial in trials:
        outcome = f"stops, exit code {trial.exit_code}" if trial.exit_code else "goes on"
        named = ", ".join("yes" if one else "no" for one in (trial.names_path, trial.names_need))
        resumed = "differs" if trial.differences else "bit for bit" if trial.exit_code else "not needed"
        where = f"{trial.place.operation} `{trial.place.file}`"
        cells = (where, outcome, named if trial.exit_code else "", trial.left, resumed)
        rows.setdefault(cells, []).append(trial.fault)
    for (where, *rest), faults in rows.items():
        lines.append(f"| {where} | {', '.join(faults)} | {' | '.join(rest)} |")
    return "\n".join(lines)
