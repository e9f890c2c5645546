"""A whole run on a disk that refuses, or forgets at a crash what was not synced: resumed, it is the undisturbed run."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_harness.fault_trials import Place, Trial, fail_at, places_of, table
from kill_harness.file_faults import FAULTS, failing, operations_of
from kill_harness.file_operations import CrashDisk, Kept, Operation, watched
from run_builders import Runs, lines_of, tensors_of, what_was_computed

from grpo.errors import GrpoError

pytestmark = pytest.mark.faults

CHANGES: dict[str, Any] = {"steps": 3, "checkpoint": {"every": 1, "keep": 1}}


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    place = Runs(model_dir=tiny_model_dir, folder=tmp_path.resolve(), monkeypatch=monkeypatch, capsys=capsys)
    place.prepare()
    return place


def check_same(run_dir: Path, whole: Path) -> None:
    ours, theirs = tensors_of(run_dir), tensors_of(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert what_was_computed(run_dir) == what_was_computed(whole)


def finish(runs: Runs, run_dir: Path) -> None:
    """Go on, or begin where nothing was begun."""
    assert run_dir.exists() == (run_dir / "config.yaml").exists(), "a folder in which no run can be started"
    runs.run(run_dir.name, resume=run_dir.exists(), **CHANGES)


def first_writes(operations: Sequence[Operation]) -> list[Operation]:
    """One for each of the run's own files."""
    names = ("metrics.jsonl", "completions.jsonl", "step-2.rank-0.jsonl", ".state.json.new", ".manifest.json.new")
    writes = [one for one in operations if one.name == "write"]
    return [next(one for one in writes if one.path.name == name) for name in names]


def eighth(number: int) -> Callable[[Sequence[Operation]], list[Operation]]:
    """All eight are all operations; each takes half a minute."""
    return lambda operations: list(operations[number::8])


EIGHTHS = [pytest.param(eighth(number), marks=pytest.mark.slow, id=f"eighth-{number}") for number in range(8)]


@pytest.mark.parametrize(
    ("fault", "choose"),
    [
        pytest.param("a short write, then ENOSPC", first_writes, id="first-writes"),
        *(
            pytest.param(fault, *each.values, marks=each.marks, id=f"{fault}-{each.id}")
            for fault in FAULTS
            for each in EIGHTHS
        ),
    ],
)
@pytest.mark.timeout(900)
def test_whichever_file_operation_of_a_run_fails_it_stops_with_the_path_and_resumes_bit_for_bit(
    fault: str, choose: Callable[[Sequence[Operation]], list[Operation]], runs: Runs
) -> None:
    whole = runs.folder / "whole"
    operations = operations_of(lambda: runs.run("whole", **CHANGES), whole)
    stopped = 0
    for planned in choose(operations):
        if "short" in fault and planned.name != "write":
            continue
        run_dir = runs.folder / f"trial-{planned.number}"
        message = ""
        with failing(run_dir, planned.number, FAULTS[fault]):
            try:
                runs.run(run_dir.name, **CHANGES)
            except GrpoError as exc:
                message = str(exc)
        if message:
            stopped += 1
            assert str(run_dir) in message, planned
            assert re.search(r"\d+ bytes were to be written", message) or needs_no_room(planned), (planned, message)
            finish(runs, run_dir)
        check_same(run_dir, whole)
        shutil.rmtree(run_dir)
    assert stopped == 0 if fault == "a short write" else stopped > 0


def needs_no_room(operation: Operation) -> bool:
    """Whether it takes something away, or waits for what was taken away: a folder under the name that it dies by, a
    half line; how much room that needs has no answer."""
    is_dying = re.fullmatch(r"\.step-\d+-[0-9a-f]{32}", operation.path.name) and operation.name == "rename"
    return bool(is_dying) or operation.name in ("unlink", "rmdir", "ftruncate")


def test_each_refused_operation_is_a_row_of_the_table(runs: Runs) -> None:
    """As `benchmarks/file_faults.py` makes it of all of them."""
    places = {
        Place(operation="write", file="metrics.jsonl"): 2,
        Place(operation="fsync", file="checkpoints/step-N (under a temporary name)/state.json"): 2,
        Place(operation="ftruncate", file=".lock"): 2,
    }

    def run(run_dir: Path) -> None:
        runs.run(str(run_dir.relative_to(runs.folder)), **CHANGES)

    def resume(run_dir: Path) -> None:
        runs.run(str(run_dir.relative_to(runs.folder)), resume=True, **CHANGES)

    (runs.folder / "whole").mkdir()
    found = places_of(run, runs.folder / "whole" / "run")
    assert [place for place, number in places.items() if found[place] < number] == []
    trials: list[Trial] = []
    for place, number in places.items():
        folder = runs.folder / place.operation
        folder.mkdir()
        trials.append(
            fail_at(
                place,
                number,
                "ENOSPC",
                run,
                resume,
                run_dir=folder / "run",
                undisturbed=runs.folder / "whole" / "run",
            )
        )
    assert table(trials).splitlines()[2:] == [
        "| write `metrics.jsonl` | ENOSPC | stops, exit code 1 | yes, yes | of the last finished step | bit for bit |",
        "| fsync `checkpoints/step-N (under a temporary name)/state.json` | ENOSPC | stops, exit code 1 | yes, yes "
        "| of the step before | bit for bit |",
        "| ftruncate `.lock` | ENOSPC | goes on |  | of the last finished step | not needed |",
    ]


def some(operations: Sequence[Operation]) -> list[Operation]:
    """Four, in all parts of the run."""
    return list(operations[7::60])


VARIANTS: list[tuple[Kept, Kept]] = list(product(("synced", "all"), repeat=2))


@pytest.mark.parametrize("choose", [pytest.param(some, id="some"), *EIGHTHS])
@pytest.mark.timeout(900)
def test_after_a_crash_at_any_file_operation_a_run_resumes_bit_for_bit_whatever_un_synced_writes_are_lost(
    choose: Callable[[Sequence[Operation]], list[Operation]], runs: Runs
) -> None:
    whole = runs.folder / "whole"
    planned = {one.number for one in choose(operations_of(lambda: runs.run("whole", **CHANGES), whole))}
    root = runs.folder / "disk"
    root.mkdir()
    disk = CrashDisk(root)
    left: dict[str, Path] = {}

    def crash_then_go_on(operation: Operation, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        result = disk.around(operation, call, arguments)
        if operation.number in planned:
            for names, contents in VARIANTS:
                state = runs.folder / f"left-{operation.number}-{names}-{contents}"
                disk.leave(state, names=names, contents=contents)
                if left.setdefault(fingerprint(state), state) != state:
                    shutil.rmtree(state)
        return result

    with watched(root, crash_then_go_on):
        runs.run("disk/run", **CHANGES)
    check_same(root / "run", whole)  # looking on changes nothing
    assert len(left) >= min(len(planned), 4)
    for state in left.values():
        run_dir = runs.folder / f"{state.name}-run"
        if (state / "run").exists():
            (state / "run").rename(run_dir)
        steps = [row["step"] for row in lines_of_whole(run_dir / "metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1)), state
        finish(runs, run_dir)
        check_same(run_dir, whole)
        shutil.rmtree(run_dir)
        shutil.rmtree(state)


def lines_of_whole(path: Path) -> list[dict[str, Any]]:
    """Without a half line at the end."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = path.with_suffix(".whole")
    whole.write_bytes(content[: content.rfind(b"\n") + 1])
    found = lines_of(whole)
    whole.unlink()
    return found


def fingerprint(folder: Path) -> str:
    """Of names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        digest.update(path.read_bytes() if path.is_file() else b"/")
    return digest.hexdigest()
