"""Watches, fails or kills at the n-th file operation below a folder; and what a crash would leave of un-synced writes.

`os` is wrapped for as long as a block runs: the product calls its file operations as `os.<name>`, one at a time, and so
do pathlib and shutil. What safetensors writes goes past this, but every such file is synced by `os.fsync` afterwards.
"""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

WATCHED = ("open", "write", "fsync", "ftruncate", "replace", "rename", "mkdir", "unlink", "rmdir")
"""What can fail for want of space, or leave half of something behind when the machine stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One call of an `os` function below the watched folder."""

    number: int
    """From 1, in the order of the calls."""
    name: str
    """Such as "fsync"."""
    path: Path
    """Of the file or folder; of a rename the new one."""


Around = Callable[[Operation, Callable[..., Any], tuple[Any, ...]], Any]
"""Called in place of each operation: (operation, the real function, its arguments) -> what the caller gets."""


@contextmanager
def watched(root: Path, around: Around) -> Iterator[None]:
    """Have `around` called in place of every file operation below a folder, in whatever thread, until the block ends.

    Args: root: resolved. Operations elsewhere, and those that `around` does itself, are left alone.
    """
    real = {name: getattr(os, name) for name in WATCHED}
    numbers, numbering, inside = count(1), threading.Lock(), threading.local()

    def wrap(name: str) -> Callable[..., Any]:
        function = real[name]

        def wrapped(*arguments: Any, **options: Any) -> Any:
            if getattr(inside, "is_acting", False):
                return function(*arguments, **options)
            inside.is_acting = True
            try:
                path = _path_of(name, arguments, options)
                if path is None or not path.is_relative_to(root):
                    return function(*arguments, **options)
                with numbering:
                    operation = Operation(number=next(numbers), name=name, path=path)
                return around(operation, lambda *given: function(*given, **options), arguments)
            finally:
                inside.is_acting = False

        return wrapped

    try:
        for name in WATCHED:
            setattr(os, name, wrap(name))
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def _path_of(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Path | None:
    """Absolute; None for what has no path, such as a pipe."""
    subject = arguments[1] if name in ("replace", "rename") else arguments[0]
    if isinstance(subject, int):
        found = os.readlink(f"/proc/self/fd/{subject}").removesuffix(" (deleted)")
        return Path(found) if found.startswith("/") else None
    folder = options.get("dir_fd")
    base = Path.cwd() if folder is None else Path(os.readlink(f"/proc/self/fd/{folder}"))
    return base / os.fsdecode(subject)


# --- what survives a crash

Kept = Literal["synced", "all"]
"""What of the names, or of the contents, has reached the disk at the crash: what was synced, or everything."""


class CrashDisk:
    """Knows what of a folder is on the disk for certain: contents that were synced, names whose folder was synced.

        disk = CrashDisk(folder)                        # all that is there now is on the disk
        with watched(folder, disk.around): ...          # synced contents and names are taken note of
        disk.leave(copy, names="synced", contents="all")   # the folder as one crash would leave it

    A file whose content was never synced is empty where its name has survived: what journalling file systems do.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._identities: dict[int, int] = {}
        """Inode -> a number of its own; inodes are used again, these are not."""
        self._numbers = count()
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        for folder, _, files in os.walk(root):
            self._note_folder(Path(folder))
            for name in files:
                self._note_file(Path(folder, name))

    def around(self, operation: Operation, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """For `watched`."""
        gone = self._inode_taken_away(operation)
        result = call(*arguments)
        if gone is not None:
            self._identities.pop(gone, None)
        if operation.name == "fsync":
            (self._note_folder if operation.path.is_dir() else self._note_file)(operation.path)
        return result

    def leave(self, into: Path, *, names: Kept, contents: Kept) -> None:
        """Make a folder what a crash at this moment would leave."""
        files = {self._identity(path): path for path in self._root.rglob("*")}
        self._leave(self._identity(self._root), self._root, into, files, names, contents)

    def _leave(
        self, identity: int, now: Path | None, into: Path, files: dict[int, Path], names: Kept, contents: Kept
    ) -> None:
        if names == "all" and now is not None:
            children = {path.name: self._identity(path) for path in now.iterdir()}
        else:
            children = self._names.get(identity, {})
        into.mkdir()
        for name, child in children.items():
            path = files.get(child)
            if child in self._names or (path is not None and path.is_dir()):
                self._leave(child, path, into / name, files, names, contents)
            elif contents == "all" and path is not None:
                shutil.copyfile(path, into / name)
            else:
                (into / name).write_bytes(self._contents.get(child, b""))

    def _identity(self, path: Path) -> int:
        inode = path.lstat().st_ino
        if inode not in self._identities:
            self._identities[inode] = next(self._numbers)
        return self._identities[inode]

    def _note_file(self, path: Path) -> None:
        self._contents[self._identity(path)] = path.read_bytes()

    def _note_folder(self, path: Path) -> None:
        self._names[self._identity(path)] = {child.name: self._identity(child) for child in path.iterdir()}

    def _inode_taken_away(self, operation: Operation) -> int | None:
        """Of the file or folder that will be gone after the operation."""
        if operation.name not in ("unlink", "rmdir", "replace", "rename"):
            return None
        try:
            found = operation.path.lstat()
        except FileNotFoundError:
            return None
        return found.st_ino if stat.S_ISDIR(found.st_mode) or found.st_nlink == 1 else None
