"""Ways in which a disk fails, one operation at a time."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kill_harness.file_operations import Operation, watched


def refuse(code: int) -> Callable[..., Any]:
    def act(operation: Operation, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        raise OSError(code, os.strerror(code), str(operation.path))

    return act


def write_half(operation: Operation, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What a signal or a nearly full disk does: some bytes are taken, and the caller is told how many."""
    if operation.name != "write":
        return call(*arguments)
    file, content = arguments
    return call(file, bytes(content)[: max(len(content) // 2, 1)])


def write_half_and_then_nothing(operation: Operation, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    if operation.name != "write":
        return call(*arguments)
    file, content = arguments
    call(file, bytes(content)[: len(content) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAULTS: dict[str, Callable[..., Any]] = {
    "ENOSPC": refuse(errno.ENOSPC),
    "EIO": refuse(errno.EIO),
    "a short write": write_half,
    "a short write, then ENOSPC": write_half_and_then_nothing,
}


@dataclass(slots=True)
class Room:
    """What a disk of this many bytes has left, by its own account; nothing refuses a write."""

    num_bytes: int
    folder: Path
    """All that counts on it."""

    def statvfs(self, path: object) -> SimpleNamespace:
        """For `os.statvfs`."""
        taken = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        return SimpleNamespace(f_bavail=max(self.num_bytes - taken, 0), f_frsize=1)


@contextmanager
def disk_of(num_bytes: int, folder: Path) -> Iterator[Room]:
    """Whoever asks how much room there is, is told so, until the block ends; the size may be changed meanwhile."""
    room, real = Room(num_bytes, folder), os.statvfs
    try:
        os.statvfs = room.statvfs  # pyright: ignore[reportAttributeAccessIssue]  all that anybody asks for is there
        yield room
    finally:
        os.statvfs = real


@contextmanager
def failing(root: Path, number: int, act: Callable[..., Any]) -> Iterator[list[Operation]]:
    """The operation with this number, from 1, goes through `act`; gives the list of those that did."""
    met: list[Operation] = []

    def around(operation: Operation, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if operation.number != number:
            return call(*arguments)
        met.append(operation)
        return act(operation, call, arguments)

    with watched(root.resolve(), around):
        yield met


def operations_of(do: Callable[[], object], root: Path) -> list[Operation]:
    """Those that it does below a folder."""
    found: list[Operation] = []

    def note(operation: Operation, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        found.append(operation)
        return call(*arguments)

    with watched(root.resolve(), note):
        do()
    return found
