"""What a run directory does to the disk, so that a crash at any moment leaves the old state or the new one.

Bytes and paths in; files, or StorageError with the path and the bytes that were needed, out. Knows nothing of runs.
Every operation is called as `os.<name>`, one at a time: a test can count, fail or drop the n-th by wrapping `os`.
Only the weights are written by others (safetensors, transformers); they are synced and read back here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from grpo.errors import StorageError

MANIFEST = "manifest.json"
"""Size and sha256 of every other file of a folder; written last."""
_BLOCK_BYTES = 1 << 16
_LEFTOVER = re.compile(r"\..+-[0-9a-f]{32}")


def write_atomically(path: Path, content: bytes, *, advice: str = "Make room, then resume.") -> None:
    """Whoever reads finds the old file or the new one, after a crash too. Raises StorageError, with the advice."""
    temporary = path.with_name(f".{path.name}.new")  # one writer: what a killed one left is overwritten
    with storage_errors(path, needed_bytes=len(content), advice=advice):
        try:
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                _write_all(file, content)
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        fsync_folder(path.parent)


def write_result(path: Path, content: str | bytes) -> None:
    """Write what a command was asked to leave in a file that a person has named: the old one stays where it fails.

    Raises:
        StorageError: the disk refuses it.
    """
    content = content.encode() if isinstance(content, str) else content
    advice = "Make room, or name another file."
    if path.is_symlink() or (path.exists() and not path.is_file()):  # such as /dev/stdout: nothing may take its place
        with storage_errors(path, needed_bytes=len(content), advice=advice):
            path.write_bytes(content)
    else:
        write_atomically(path, content, advice=advice)


def append_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Append whole lines, each without its newline, and sync them; a half last line is cut off first.

    Raises:
        StorageError: they could not all be written; the file is then as it was, as far as the disk allows.
    """
    lines = list(lines)
    with LineFile(path, needed_bytes=sum(len(line) + 1 for line in lines)) as file:
        file.append(lines)
        file.sync()


class LineFile:
    """Owns one file of lines, open for appending; a context manager.

    `append` hands lines to the kernel, where they outlive this process; after `sync` they outlive the machine too.
    """

    def __init__(self, path: Path, *, needed_bytes: int | None = None) -> None:
        """Open or make the file, and cut off a half last line.

        Args: needed_bytes: what is to be appended first, for the message where there is no room for a file.
        Raises:
            StorageError: it cannot be opened.
        """
        self.path = path
        self._unsynced_bytes = 0
        with storage_errors(path, needed_bytes=needed_bytes):
            is_new = not path.exists()
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                _cut_half_line(self._file)
                if is_new:
                    fsync_folder(path.parent)
            except BaseException:
                os.close(self._file)
                raise

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, lines: Iterable[bytes]) -> None:
        """Write lines, each without its newline: all of them, or StorageError and none."""
        content = b"".join(line + b"\n" for line in lines)
        with storage_errors(self.path, needed_bytes=len(content)):
            size = os.fstat(self._file).st_size
            try:
                _write_all(self._file, content)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, size)
                raise
            self._unsynced_bytes += len(content)

    def sync(self) -> None:
        """Wait until all that was appended is on the disk. Raises StorageError."""
        unsynced = self._unsynced_bytes
        with storage_errors(self.path, needed_bytes=unsynced):  # some disks find out only now that they are full
            os.fsync(self._file)
        self._unsynced_bytes -= unsynced

    def close(self) -> None:
        """Once; does not sync."""
        os.close(self._file)


def cut_last_lines(path: Path, is_kept: Callable[[bytes], bool], *, only_half_line: bool = False) -> int:
    """Cut a file of lines behind the last line that is kept; a file that is not there has none.

    Args:
        is_kept: of one line, without its newline; asked of the last, then of the one before it, until it says yes. A
            half last line that is kept has only lost its newline, and gets it.
        only_half_line: whole lines stay, whatever they are.
    Returns:
        Bytes cut off.
    Raises:
        StorageError: the file cannot be read or cut.
    """
    if not path.exists():
        return 0
    with storage_errors(path):
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(file).st_size
            half = _half_line(file, size)
            if half and is_kept(half):
                os.lseek(file, size, os.SEEK_SET)
                _write_all(file, b"\n")
                os.fsync(file)
                return 0
            end = size - len(half)
            for line in () if only_half_line else _lines_backwards(file, end):
                if is_kept(line):
                    break
                end -= len(line) + 1
            if end < size:
                os.ftruncate(file, end)
                os.fsync(file)
            return size - end
        finally:
            os.close(file)


@contextmanager
def new_folder(
    final: Path,
    *,
    format_version: int,
    before_rename: Callable[[], None] = lambda: None,
    needed_bytes: int | None = None,
) -> Iterator[Path]:
    """A folder that appears under its name only when it is whole: `with new_folder(path) as temporary: ...`.

    What the block wrote into the temporary folder is synced file by file, then the manifest is written and synced, then
    the folder; then it is renamed and its parent synced. A folder that has the name already is taken away.

    Args:
        format_version: of the files, written into the manifest.
        before_rename: called when everything is on the disk under the temporary name.
        needed_bytes: what the folder will take, for the message where the disk has no room for it.
    Raises:
        StorageError: something could not be written; nothing is under the name that was not there before.
    """
    parent = final.parent
    temporary = parent / f".{final.name}-{uuid.uuid4().hex}"
    with storage_errors(final, needed_bytes=needed_bytes):
        make_folder(parent)
        os.mkdir(temporary)
        try:
            yield temporary
            _write_manifest(temporary, format_version)
            before_rename()
            if final.exists():
                remove_folder(final)
            os.rename(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_folder(parent)


def make_folder(path: Path) -> None:
    """Make a folder, and those that it lies in, where they are missing; its name is on the disk. Raises OSError."""
    if not path.parent.is_dir():
        make_folder(path.parent)
    os.makedirs(path, exist_ok=True)
    fsync_folder(path.parent)  # where it was there too: a killed process may have made it and not come to this


def remove_folder(path: Path) -> None:
    """Take its name away at once, then its files: no half folder is ever found under the name. Raises StorageError."""
    with storage_errors(path):
        doomed = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        os.rename(path, doomed)
        fsync_folder(path.parent)
        shutil.rmtree(doomed)


def remove_leftovers(parent: Path) -> None:
    """Delete what killed processes left of `new_folder` and `remove_folder`. Only the one writer there may call it."""
    with storage_errors(parent):
        for leftover in parent.glob(".*"):
            if _LEFTOVER.fullmatch(leftover.name):
                shutil.rmtree(leftover)


def folder_damage(folder: Path, *, format_version: int) -> str | None:
    """What is wrong with a folder that `new_folder` wrote, file by file; None where it is as its manifest says.

    Files that the manifest does not name are no damage; nothing of ours opens them.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] != format_version:
            return f"its format is {manifest['format']!r}, this version reads {format_version}"
        entries = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        return f"its manifest cannot be read ({type(exc).__name__}: {exc})"
    try:
        for name, (num_bytes, digest) in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != num_bytes:
                return f"{name} is damaged: it has {size} bytes, the manifest says {num_bytes}"
            if sha256_of(path) != digest:
                return f"{name} is damaged: its hash is not the manifest's"
    except (OSError, ValueError) as exc:
        return f"it cannot be read ({exc})"
    return None


def free_bytes(path: Path) -> int:
    """What this user may still write where the path is, or will be."""
    while not path.exists():
        path = path.parent
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize


def folder_bytes(folder: Path) -> int:
    """Of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fsync_file(path: Path) -> None:
    """Wait until what was written into the file, by whomever, is on the disk. Raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def fsync_folder(path: Path) -> None:
    """Wait until the names in the folder are on the disk. Raises OSError."""
    fsync_file(path)


def sha256_of(path: Path) -> str:
    """Of the file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def storage_errors(
    path: Path, *, needed_bytes: int | None = None, advice: str = "Make room, then resume."
) -> Iterator[None]:
    """What the disk refuses becomes a StorageError that names the path, what was needed and what is free."""
    try:
        yield
    except (OSError, SafetensorError) as exc:
        wanted = "" if needed_bytes is None else f" {needed_bytes} bytes were to be written,"
        raise StorageError(f"{path} cannot be written: {exc}.{wanted} {_free_text(path)}. {advice}") from exc


def _free_text(path: Path) -> str:
    try:
        return f"{free_bytes(path)} are free there"
    except OSError as exc:
        return f"what is free there is not known ({exc})"


def _write_all(file: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file, rest) :]


def _write_manifest(folder: Path, format_version: int) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        fsync_file(path)
    entries: dict[str, Any] = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        fsync_folder(inner)
    write_atomically(folder / MANIFEST, json.dumps({"format": format_version, "files": entries}, indent=1).encode())


def _cut_half_line(file: int) -> None:
    size = os.fstat(file).st_size
    half = _half_line(file, size)
    if half:
        os.ftruncate(file, size - len(half))


def _half_line(file: int, size: int) -> bytes:
    """What stands behind the last newline before `size`."""
    half = b""
    for block in _blocks_backwards(file, size):
        before, newline, behind = block.rpartition(b"\n")
        half = (behind if newline else before + behind) + half
        if newline:
            break
    return half


def _lines_backwards(file: int, end: int) -> Iterator[bytes]:
    """The lines before `end`, which stands behind a newline, the last one first; without their newlines."""
    while end > 0:
        line = _half_line(file, end - 1)
        yield line
        end -= len(line) + 1


def _blocks_backwards(file: int, end: int) -> Iterator[bytes]:
    while end > 0:
        start = max(end - _BLOCK_BYTES, 0)
        yield os.pread(file, end - start, start)
        end = start
