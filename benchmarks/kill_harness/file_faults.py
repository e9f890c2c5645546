"""Ways in which a disk fails, one operation at a time."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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
