"""Every judgement -> one line of JSON, appended. Knows no secrets: nobody hands it any.

A line may also say how much money a budget has booked since the last such line: that is how a resumed run knows what
has been spent (`judges.budget`). It is written as each call ends, before its verdict is used or kept anywhere: whoever
has the verdict after a kill has its price too, once.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from judges.errors import AuditFailed
from judges.types import Call, FailureKind, Fault, Origin, Usage

_WRITING = threading.Lock()  # of the process, not of a log: two logs may share a file


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One judged completion."""

    id: str
    """The request's."""
    criterion: str
    """What was judged."""
    judgement_sha256: str | None = None
    """What was judged by whom (`judges.identity`): replay finds the judgement by it."""
    prompt_sha256: str | None
    """Of the last prompt sent, without its nonce; None where none was."""
    rubric_sha256: str | None = None
    """The rubric's version."""
    keys: tuple[str, ...] = ()
    """Request keys of the questions asked about it, as the cache has them."""
    raw: str | None
    """The judge's words that hold the verdict; for a failure the last reply, None where none came."""
    outcome: Literal["scored"] | FailureKind
    """"scored", or what went wrong."""
    value: float | None
    """The score; None where there is none. JSON's shortest form reads back to the same bits."""
    detail: str
    """The cause of a failure; "" for a score."""
    fault: Fault | None = None
    """Whose doing a failure was; None for a score."""
    attempts: int
    """Calls made."""
    calls: tuple[Call, ...] = ()
    """Every try; one that asked about several completions stands in the record of each."""
    origin: Origin | None = None
    """Whether anybody was asked for the score; None for a failure."""
    endpoint: str = ""
    """Who gave the score; "" for a failure."""
    usage: Usage | None
    """This completion's share of the tokens of all calls that answered."""
    cost: float | None = None
    """Its share of the money; None where it is unknown."""
    disagreement: float | None = None
    """Standard deviation among an ensemble's judges; None without an ensemble."""
    latency_s: float
    """From the batch's start to the outcome, waiting and retries included."""
    time_s: float
    """Unix time of the outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Booking:
    """Money that a budget has booked since it last said so."""

    judge: str
    """The budget's name."""
    amount: float
    """In the prices' currency, estimates included."""
    estimated: float
    """The part of it that is an upper bound: nobody said what the call has cost, it may even be nothing."""


class AuditLog:
    """Owns one JSONL file, opened at the first line. Lines are whole: one write each, none after a torn one.

    Use: `await audit.append(record)` as often as you like, from many tasks; `audit.append_booking()` as a call ends;
    `audit.close()` at the end.
    """

    def __init__(self, path: Path, *, take_booking: Callable[[], Booking | None] | None = None) -> None:
        """Args: take_booking: a budget's; asked at each line and at the end, so that its money is written down."""
        self.path = path
        self.step: int | None = None
        """The training step that records belong to from now on; None outside of training."""
        self._session = secrets.token_hex(4)  # tells a step that was run again after a crash from its first run
        self._take_booking = take_booking
        self._owed: list[Booking] = []  # taken from the budget, and not yet written down
        self._was_refused = False
        self._file: int | None = None

    async def append(self, record: AuditRecord) -> None:
        """Write one line, off the event loop.

        Raises:
            AuditFailed: the line could not be written.
        """
        await asyncio.to_thread(self._write_lines, [{**self._place(), **asdict(record)}])

    def append_booking(self) -> None:
        """Write down what a budget has booked since the last line, if anything; the kernel has it on return.

        Raises:
            AuditFailed: it could not be written; the next line will say it.
        """
        self._write_lines([])

    def close(self) -> None:
        """Sync and close; the next line would open the file again.

        Raises:
            AuditFailed: what a budget has booked since the last line could not be written, or the lines could not be
                synced; not a second time where a line was refused before.
        """
        was_refused = self._was_refused
        try:
            self.append_booking()
            with _WRITING:
                file, self._file = self._file, None
                if file is not None:
                    try:
                        os.fsync(file)
                    finally:
                        os.close(file)
        except OSError as exc:
            raise AuditFailed(f"the audit {self.path} cannot be written: {exc}. Free space.") from exc
        except AuditFailed:
            if not was_refused:
                raise

    def _place(self) -> dict[str, Any]:
        return {"session": self._session, "step": self.step}

    def _write_lines(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """In one write, with what a budget has booked behind them."""
        with _WRITING:
            booking = self._take_booking() if self._take_booking else None
            self._owed += [booking] if booking is not None else []
            lines = [*lines, *({**self._place(), "booking": asdict(booking)} for booking in self._owed)]
            content = b"".join(json.dumps(line, ensure_ascii=True, allow_nan=False).encode() + b"\n" for line in lines)
            try:
                self._write(content)
            except OSError as exc:
                self._was_refused = True
                raise AuditFailed(
                    f"the audit {self.path} cannot be written: {exc}. {len(content)} bytes were to be written. Free "
                    "space, or choose another path."
                ) from exc
            self._owed = []

    def _write(self, content: bytes) -> None:
        if not content:
            return
        if self._file is None:
            self._file = _open_at_line_start(self.path)
        try:
            while content:
                content = content[os.write(self._file, content) :]
        except OSError:
            file, self._file = self._file, None
            os.close(file)  # a line may be torn: who opens the file again, ends it
            raise


def read_audit(path: Path) -> Iterator[Mapping[str, Any]]:
    """The lines of an audit, oldest first. A line that a crash has torn is left out.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for line in file:
            try:
                content = json.loads(line)
            except ValueError:  # torn, or not UTF-8
                continue
            if isinstance(content, dict):
                yield content


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
