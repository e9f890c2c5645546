"""Disks that are full, broken, or forget what was not synced; files that rot; files that somebody put there.

Whatever happens to a save, the checkpoint before it stays whole and is found; whatever happens to a checkpoint's files
is noticed before one of them is used.
"""

from __future__ import annotations

import ast
import errno
import os
import pickle
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_batch, make_group, make_policy, make_updater
from kill_harness.file_faults import FAULTS, failing, operations_of
from kill_harness.file_operations import CrashDisk, Kept, Operation, watched
from real_disks import disk_of

from grpo.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from grpo.errors import CheckpointError, ModelError, StorageError
from grpo.runtime.models import load_model
from grpo.update.beta import BandBeta
from grpo.update.step import Updater

PACKAGES = [Path(__file__).parents[2] / name for name in ("grpo", "rewards", "judges")]


@pytest.fixture
def updater(tiny_model_dir: Path) -> Updater:
    """After one step."""
    made = make_updater(make_policy(tiny_model_dir))
    made.controllers["a"] = BandBeta(initial=0.05, low=0.01, high=0.1)
    train(made, seed=1)
    return made


def train(updater: Updater, *, seed: int) -> None:
    updater.step(make_batch([make_group([{"a": 1.0}, {"a": 0.0}], seed=seed)], budget=64))


@pytest.fixture
def run_dir(tmp_path: Path, updater: Updater) -> Path:
    """With a checkpoint of step 1; the updater has gone on to step 2."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_checkpoint(folder, updater, step=1, keep=1)
    train(updater, seed=2)
    return folder


Content = dict[str, bytes]


def content_of(checkpoint: Checkpoint) -> Content:
    folder = checkpoint.folder
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def saved_undisturbed(updater: Updater, folder: Path) -> Content:
    """What a save of step 2 writes."""
    folder.mkdir()
    return content_of(save_checkpoint(folder, updater, step=2, keep=1))


def check_old_or_new(run_dir: Path, old: Content, new: Content) -> int:
    """The step of the newest usable checkpoint, whose every file is the old one's, or the new one's."""
    checkpoint = latest_checkpoint(run_dir)
    assert content_of(checkpoint) == {1: old, 2: new}[checkpoint.step]
    return checkpoint.step


# --- the n-th file operation fails


def one_of_each(operations: Sequence[Operation]) -> list[Operation]:
    """The first of those that do the same to files of the same kind."""
    return list({(one.name, one.path.suffix, one.path.parent.name[:2]): one for one in reversed(operations)}.values())


@pytest.mark.parametrize(
    ("fault", "choose"),
    [
        ("ENOSPC", one_of_each),
        ("a short write", list),
        ("a short write, then ENOSPC", list),
        pytest.param("ENOSPC", list, marks=pytest.mark.slow),
        pytest.param("EIO", list, marks=pytest.mark.slow),
    ],
)
def test_whichever_file_operation_of_a_save_fails_the_old_checkpoint_or_the_new_one_is_whole(
    fault: str,
    choose: Callable[[Sequence[Operation]], list[Operation]],
    run_dir: Path,
    updater: Updater,
    tmp_path: Path,
) -> None:
    old, new = content_of(latest_checkpoint(run_dir)), saved_undisturbed(updater, tmp_path / "undisturbed")
    rehearsal = Path(shutil.copytree(run_dir, tmp_path / "rehearsal"))
    operations = operations_of(lambda: save_checkpoint(rehearsal, updater, step=2, keep=1), rehearsal)
    names = {operation.name for operation in operations}
    assert {"open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir"} <= names
    steps: list[int] = []
    for planned in choose(operations):
        if "short" in fault and planned.name != "write":
            continue
        trial = Path(shutil.copytree(run_dir, tmp_path / "trial"))
        message = ""
        with failing(trial, planned.number, FAULTS[fault]) as met:
            try:
                save_checkpoint(trial, updater, step=2, keep=1, expected_bytes=54321)
            except StorageError as exc:
                message = str(exc)
        assert [operation.name for operation in met] == [planned.name]
        steps.append(check_old_or_new(trial, old, new))
        if message:  # else it was no matter: a short write is written on, and what was half made may be left
            assert str(trial) in message, planned
            assert "free there" in message, planned
            assert steps[-1] == 2 or "54321 bytes" in message or "bytes were to be written" in message, planned
        else:
            assert steps[-1] == 2, planned
        assert content_of(save_checkpoint(trial, updater, step=2, keep=1)) == new, planned
        assert [path.name for path in (trial / "checkpoints").iterdir()] == ["step-2"], planned  # nothing is left
        shutil.rmtree(trial)
    if fault == "a short write":
        assert set(steps) == {2}
    else:
        assert steps.count(1) >= 2
        assert "short" in fault or 2 in steps  # where the old one was being deleted


def press_ctrl_c(operation: Operation, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    call(*arguments)
    raise KeyboardInterrupt


@pytest.mark.parametrize("choose", [one_of_each, pytest.param(list, marks=pytest.mark.slow)])
def test_a_second_ctrl_c_at_any_file_operation_of_a_save_leaves_the_old_checkpoint_or_the_new_one(
    choose: Callable[[Sequence[Operation]], list[Operation]], run_dir: Path, updater: Updater, tmp_path: Path
) -> None:
    old, new = content_of(latest_checkpoint(run_dir)), saved_undisturbed(updater, tmp_path / "undisturbed")
    rehearsal = Path(shutil.copytree(run_dir, tmp_path / "rehearsal"))
    for planned in choose(operations_of(lambda: save_checkpoint(rehearsal, updater, step=2, keep=1), rehearsal)):
        trial = Path(shutil.copytree(run_dir, tmp_path / "trial"))
        with failing(trial, planned.number, press_ctrl_c), suppress(KeyboardInterrupt):
            save_checkpoint(trial, updater, step=2, keep=1)
        check_old_or_new(trial, old, new)
        shutil.rmtree(trial)


def test_a_full_disk_is_told_with_the_path_and_the_bytes_that_were_needed(run_dir: Path, updater: Updater) -> None:
    seen: list[str] = []

    def full(operation: Operation, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if operation.name != "write":
            return call(*arguments)
        seen.append(f"{len(arguments[1])} bytes were to be written")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with watched(run_dir.resolve(), full), pytest.raises(StorageError) as caught:
        save_checkpoint(run_dir, updater, step=2, keep=1)
    assert seen[0] in str(caught.value)
    assert str(run_dir / "checkpoints") in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert "Make room, then resume." in str(caught.value)


def test_on_a_real_disk_of_256_kb_every_save_is_whole_or_leaves_the_one_before(
    run_dir: Path, updater: Updater, tmp_path: Path
) -> None:
    old, new = content_of(latest_checkpoint(run_dir)), saved_undisturbed(updater, tmp_path / "undisturbed")
    steps: list[int] = []
    with disk_of("256k", tmp_path / "disk") as disk:
        full_run = Path(shutil.copytree(run_dir, disk / "run"))
        room = os.statvfs(disk).f_bavail * 4096
        assert room > 0
        for free in range(0, room, 4096):  # so much that the save fails at another file each time, until it fits
            (disk / "filling").write_bytes(b"0" * (room - free))
            try:
                save_checkpoint(full_run, updater, step=2, keep=1)
            except StorageError as exc:
                assert str(full_run) in str(exc)  # noqa: PT017
                assert "are free there" in str(exc)  # noqa: PT017
            steps.append(check_old_or_new(full_run, old, new))
            (disk / "filling").unlink()
            if steps[-1] == 2:
                break
    assert steps[0] == 1
    assert steps[-1] == 2
    assert len(steps) > 5


# --- un-synced writes are dropped at a crash


def test_a_crash_at_any_file_operation_of_a_save_leaves_the_old_checkpoint_or_the_new_one(
    run_dir: Path, updater: Updater, tmp_path: Path
) -> None:
    old, new = content_of(latest_checkpoint(run_dir)), saved_undisturbed(updater, tmp_path / "undisturbed")
    disk = CrashDisk(tmp_path / "run")
    steps: dict[tuple[Kept, Kept], list[int]] = {kept: [] for kept in product(("synced", "all"), repeat=2)}
    left = tmp_path / "left"

    def crash_then_go_on(operation: Operation, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        result = disk.around(operation, call, arguments)
        for names, contents in steps:
            disk.leave(left, names=names, contents=contents)
            steps[names, contents].append(check_old_or_new(left, old, new))
            shutil.rmtree(left)
        return result

    with watched(run_dir.resolve(), crash_then_go_on):
        save_checkpoint(run_dir, updater, step=2, keep=1)
    for found in steps.values():
        assert found == sorted(found), "the old one came back after the new one was there"
        assert found[0] == 1
        assert found[-1] == 2


def test_the_shim_would_notice_a_save_that_does_not_sync(run_dir: Path, updater: Updater, tmp_path: Path) -> None:
    disk = CrashDisk(tmp_path / "run")

    def forget_to_sync(operation: Operation, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return None if operation.name == "fsync" else disk.around(operation, call, arguments)

    with watched(run_dir.resolve(), forget_to_sync):
        save_checkpoint(run_dir, updater, step=2, keep=1)
    disk.leave(tmp_path / "left", names="all", contents="synced")
    with pytest.raises(CheckpointError, match="manifest"):  # the names are there, and every file is empty
        latest_checkpoint(tmp_path / "left")


# --- files that rot


def two_checkpoints(run_dir: Path, updater: Updater) -> tuple[Checkpoint, Checkpoint]:
    save_checkpoint(run_dir, updater, step=2, keep=2)
    first, second = list_checkpoints(run_dir)
    return first, second


def files_of(checkpoint: Checkpoint) -> list[Path]:
    return sorted(path for path in checkpoint.folder.rglob("*") if path.is_file())


def check_noticed(run_dir: Path, damaged: Checkpoint, before: Checkpoint, updater: Updater) -> None:
    found = latest_checkpoint(run_dir)
    assert found.step == before.step
    assert str(damaged.folder) in "".join(found.passed_over)
    with pytest.raises(CheckpointError):
        load_checkpoint(damaged, updater)


def test_every_flipped_bit_and_every_truncation_of_every_file_is_noticed(run_dir: Path, updater: Updater) -> None:
    first, second = two_checkpoints(run_dir, updater)
    draw = random.Random(0)
    num_tried = 0
    for path in files_of(second):
        content = path.read_bytes()
        ends = {0, 1, len(content) // 2, len(content) - 1} - {len(content)}
        # the manifest has no hash but those that it holds: each of its bytes
        places = range(len(content)) if path.name == "manifest.json" else draw.sample(range(len(content)), k=12)
        spoilt = [content[:end] for end in ends]
        spoilt += [_flipped(content, place, draw.randrange(8)) for place in places]
        spoilt += [content + b"\0"]
        for changed in spoilt if path.name != "manifest.json" else spoilt[:-1]:
            path.write_bytes(changed)
            check_noticed(run_dir, second, first, updater)
            num_tried += 1
        path.unlink()
        check_noticed(run_dir, second, first, updater)
        path.write_bytes(content)
    assert latest_checkpoint(run_dir) == second  # put back as it was
    assert num_tried > 500


def _flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


# --- pickles


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self._sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self._sprung), "w"))


PICKLES = ("optimizer.pt", "policy/pytorch_model.bin", "policy/adapter_model.bin", "rng_state.pth", "scheduler.pt")


def test_a_planted_pickle_is_never_opened(run_dir: Path, updater: Updater, tmp_path: Path) -> None:
    _, second = two_checkpoints(run_dir, updater)
    sprung = tmp_path / "sprung"
    before = content_of(second)
    for name in PICKLES:
        (second.folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    assert load_checkpoint(latest_checkpoint(run_dir), updater) == 2
    for path in files_of(second):  # in the place of a file too
        if path.name != "manifest.json":
            path.write_bytes(pickle.dumps(Trap(sprung)))
    assert latest_checkpoint(run_dir).step == 1
    for name, content in before.items():
        (second.folder / name).write_bytes(content)
    (second.folder / "policy/adapter_model.safetensors").unlink()  # the pickle beside it is no replacement
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        load_checkpoint(second, updater)
    assert not sprung.exists()
    pickle.loads((second.folder / PICKLES[0]).read_bytes()).close()  # noqa: S301  the trap works
    assert sprung.exists()


def test_a_model_that_is_a_pickle_is_refused_and_not_opened(tiny_model_dir: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ModelError, match="safetensors"):
        load_model(str(folder), dtype=torch.float32, base_dir=tmp_path)
    assert not sprung.exists()


READERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
"""Modules whose `load`, `loads` or `open` runs what it reads."""


def test_nothing_in_the_packages_reads_a_pickle_from_a_file() -> None:
    found: set[str] = set()
    for path in (file for package in PACKAGES for file in package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(value=ast.Name(id=module), attr="load" | "open" | "Unpickler") if module in READERS:
                    found.add(f"{path.name}: {module}.{node.attr}")
                case ast.Attribute(value=ast.Name(id=module), attr="loads") if module in READERS:
                    found.add(f"{path.name}: {module}.loads")
                case ast.Attribute(value=ast.Name(id="torch" | "np" | "numpy" as module), attr="load"):
                    found.add(f"{path.name}: {module}.load")
                case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in READERS:
                    found.add(f"{path.name}: from {module} import ...")
                case ast.keyword(arg="allow_pickle" | "weights_only"):
                    found.add(f"{path.name}: {node.arg}")
    # a rank tries out whether others could read an exception of its own: bytes that it has just made
    assert found == {"distributed.py: pickle.loads"}
