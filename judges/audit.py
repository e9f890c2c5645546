"""Every judge call -> one line of JSON, appended. Knows no secrets: nobody hands it any."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from judges.errors import AuditFailed
from judges.types import FailureKind, Usage

_WRITING = threading.Lock()  # of the process, not of a log: two logs may share a file


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One judged completion."""

    id: str
    """The request's."""
    criterion: str
    """What was judged."""
    prompt_sha256: str | None
    """Of the last prompt sent, without its nonce; None where none was."""
    raw: str | None
    """The last reply, valid or not; None where none came."""
    outcome: Literal["scored"] | FailureKind
    """"scored", or what went wrong."""
    value: float | None
    """The score; None where there is none."""
    detail: str
    """The cause of a failure; "" for a score."""
    attempts: int
    """Calls made."""
    usage: Usage | None
    """Tokens of all calls that answered."""
    latency_s: float
    """From the batch's start to the outcome, waiting and retries included."""
    time_s: float
    """Unix time of the outcome."""


class AuditLog:
    """Owns one JSONL file, opened at the first line. Lines are whole: one write each, none after a torn one.

    Use: `await audit.append(record)` as often as you like, from many tasks; `audit.close()` at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    async def append(self, record: AuditRecord) -> None:
        """Write one line, off the event loop.

        Raises:
            AuditFailed: the line could not be written.
        """
        await asyncio.to_thread(self._write, record)

    def close(self) -> None:
        """Sync and close; the next line would open the file again."""
        with _WRITING:
            file, self._file = self._file, None
            if file is not None:
                try:
                    os.fsync(file)
                finally:
                    os.close(file)

    def _write(self, record: AuditRecord) -> None:
        line = json.dumps(asdict(record), ensure_ascii=True, allow_nan=False).encode() + b"\n"
        try:
            with _WRITING:
                if self._file is None:
                    self._file = _open_at_line_start(self.path)
                while line:
                    line = line[os.write(self._file, line) :]
        except OSError as exc:
            raise AuditFailed(
                f"the audit {self.path} cannot be written: {exc}. Free space, or choose another path."
            ) from exc


def _open_at_line_start(path: Path) -> int:
    """Open for appending; a line that a crash has torn is ended, so that it spoils no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")
    except OSError:
        os.close(file)
        raise
    return file
