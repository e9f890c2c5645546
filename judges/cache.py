"""Verdicts kept between runs, in one SQLite file that several processes may share; and the key they are kept under.

A cache only saves money. So whatever is wrong with it costs one line of warning, never the run: a file that is broken
or somebody else's is moved aside, one that is locked, read-only or full is left alone. Rows are JSON, checked when they
are read; nothing is ever unpickled.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from judges.config import EndpointConfig, ScaleConfig
from judges.identity import canonical_sha256
from judges.strict_json import strict_loads
from judges.types import ChatRequest, Usage, Verdict

logger = logging.getLogger(__name__)

VERDICT_VERSION = 1
"""Raised when the same reply would be read as another verdict: older verdicts are then not found."""

MAX_BYTES = 256 << 20
"""Of the file; beyond it the oldest tenth of the verdicts goes."""
MAX_ROW_CHARS = 4 << 20
"""No honest verdict is longer: a reply has at most 1 MiB."""
BUSY_S = 5.0
"""Longest wait for another process that writes."""
APPLICATION_ID = 0x4752504F
SCHEMA_VERSION = 1
SCHEMA = "CREATE TABLE verdicts (number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, verdict TEXT NOT NULL)"

Result = TypeVar("Result")


def request_key(
    endpoint: EndpointConfig, *, prompt_sha256: str, chat: ChatRequest, scale: ScaleConfig, sample_index: int
) -> str:
    """sha256 of canonical JSON (sorted keys, no spaces; cf. RFC 8785).

    Args:
        endpoint: whom it is asked; of its settings only those that decide the answer enter.
        prompt_sha256: of the prompt without nonce and ids; covers rubric, texts and mode.
        chat: the request; its messages do not enter, since they carry the nonce.
        scale: what the verdict was checked against; a rubric of one's own need not show it.
        sample_index: another index, another independent verdict.
    """
    return canonical_sha256(
        {
            "version": VERDICT_VERSION,
            "dialect": endpoint.dialect,
            "url": endpoint.resolve_url(),
            "model": endpoint.model,
            "prompt": prompt_sha256,
            "max_tokens": chat.max_tokens,
            "temperature": chat.temperature,
            "seed": chat.seed,
            "json_schema": chat.json_schema,
            "scale": scale.model_dump(),
            "sample_index": sample_index,
        }
    )


class SqliteCache:
    """Owns one connection and the thread it lives in. `await cache.aclose()` at the end.

    States: working; read-only, after a write has failed; off, after anything else has. Each change is one warning, and
    none goes back: a cache that comes and goes would cost a wait a call.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = MAX_BYTES,
        busy_s: float = BUSY_S,
        connect: Callable[..., sqlite3.Connection] = sqlite3.connect,
    ) -> None:
        """Args: connect: opens a file, as sqlite3.connect does."""
        self.path = path
        self._max_bytes = max_bytes
        self._busy_s = busy_s
        self._connect = connect
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge-cache")
        self._connection: sqlite3.Connection | None = None
        self._is_closed = False
        self._is_off = False
        self._is_read_only = False

    async def get(self, key: str) -> Verdict | None:
        """The verdict kept under the key; None where there is none, or none that can be trusted."""
        if self._is_off:
            return None
        return await self._in_thread(lambda: self._guarded(lambda: self._get(key)))

    async def put(self, key: str, verdict: Verdict) -> None:
        """Keep a verdict, if it is whole."""
        if self._is_off or self._is_read_only or not verdict.is_complete:
            return
        await self._in_thread(lambda: self._guarded(lambda: self._put(key, verdict), is_write=True))

    async def aclose(self) -> None:
        """Close the file. May be called twice."""
        if not self._is_closed:
            self._is_off = self._is_closed = True
            self._thread.submit(self._disconnect)
            await asyncio.to_thread(self._thread.shutdown)

    async def _in_thread(self, do: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, do)

    # All below runs in the one thread.

    def _guarded(self, do: Callable[[], Result], *, is_write: bool = False) -> Result | None:
        """Do it; what goes wrong is a warning and None."""
        if self._is_off:  # since it was handed in
            return None
        try:
            try:
                return do()
            except sqlite3.DatabaseError as exc:
                if not _is_broken(exc):
                    raise
                self._disconnect()  # opening checks the file, and moves it aside
                return do()
        except (sqlite3.Error, OSError) as exc:
            if is_write and self._connection is not None:
                self._is_read_only = True
                logger.warning("judge cache %s: no more verdicts are kept: %s", self.path, exc)
            else:
                self._is_off = True
                self._disconnect()
                logger.warning("judge cache %s: going on without it: %s", self.path, exc)
            return None

    def _get(self, key: str) -> Verdict | None:
        rows = self._opened().execute(
            "SELECT CAST(verdict AS BLOB) FROM verdicts "
            "WHERE key = ? AND typeof(verdict) = 'text' AND length(verdict) <= ?",
            (key, MAX_ROW_CHARS),
        )
        row = rows.fetchone()
        return None if row is None else _verdict_of(row[0])

    def _put(self, key: str, verdict: Verdict) -> None:
        text = json.dumps(asdict(verdict), ensure_ascii=True, allow_nan=False)
        if len(text) > MAX_ROW_CHARS:
            return
        connection = self._opened()
        connection.execute("INSERT OR REPLACE INTO verdicts (key, verdict) VALUES (?, ?)", (key, text))
        if _used_bytes(connection) > self._max_bytes:
            connection.execute(
                "DELETE FROM verdicts WHERE number IN "
                "(SELECT number FROM verdicts ORDER BY number LIMIT (SELECT count(*) / 10 + 1 FROM verdicts))"
            )

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._alone():  # two processes must not both move the file aside: the second would move a good one
                self._connection = self._open_or_begin_anew()
        return self._connection

    def _open_or_begin_anew(self) -> sqlite3.Connection:
        try:
            return self._open()
        except sqlite3.DatabaseError as exc:
            if not _is_broken(exc):
                raise
            aside = self.path.with_name(f"{self.path.name}.aside-{time.time_ns()}")
            for ending in ("", "-wal", "-shm"):
                file = self.path.with_name(self.path.name + ending)
                if file.exists():
                    file.rename(aside.with_name(aside.name + ending))
            logger.warning("judge cache %s: moved aside to %s, begun anew: %s", self.path, aside.name, exc)
            return self._open()

    def _open(self) -> sqlite3.Connection:
        """Open the file and check it whole; an empty one gets our table.

        Raises:
            sqlite3.DatabaseError: the file cannot be used; `_is_broken` says whether it is worth moving aside.
        """
        connection = self._connect(self.path, timeout=self._busy_s, isolation_level=None)
        try:
            application_id, version = (
                connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            )
            tables = connection.execute("SELECT type, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
            if tables or application_id or version:
                if (application_id, version, tables) != (APPLICATION_ID, SCHEMA_VERSION, [("table", SCHEMA)]):
                    raise sqlite3.NotSupportedError("the file is no verdict cache of this version")
                problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
                if problem != "ok":
                    raise sqlite3.NotSupportedError(problem)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            if not tables:
                connection.executescript(
                    f"BEGIN IMMEDIATE; {SCHEMA}; PRAGMA application_id = {APPLICATION_ID}; "
                    f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT"
                )
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock file, which every process takes while it opens the cache."""
        with self.path.with_name(self.path.name + ".lock").open("a") as lock:
            until = time.monotonic() + self._busy_s
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise
                    time.sleep(0.01)
            yield

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _is_broken(exc: sqlite3.DatabaseError) -> bool:
    """Whether the file itself is unusable, rather than locked, read-only or out of room."""
    if isinstance(exc, sqlite3.NotSupportedError):  # ours
        return True
    return getattr(exc, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _used_bytes(connection: sqlite3.Connection) -> int:
    page_bytes, pages, free = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "page_count", "freelist_count")
    )
    return page_bytes * (pages - free)


def _verdict_of(text: bytes) -> Verdict | None:
    """The row as a verdict; None where it is anything else. Whoever wrote it, nothing in it is believed unchecked."""
    try:
        content = strict_loads(text)
    except ValueError:
        return None
    match content:
        case {"scores": [_, *_] as scores, "raws": [*raws], "endpoint": str(endpoint), "usage": usage, "cost": cost}:
            is_sound = (
                all(_is_finite(score) for score in scores)
                and all(isinstance(raw, str) for raw in raws)
                and len(raws) == len(scores)
                and (usage is None or _is_usage(usage))
                and (cost is None or _is_finite(cost))
            )
            if is_sound:
                return Verdict(
                    scores=tuple(float(score) for score in scores),
                    raws=tuple(raws),
                    endpoint=endpoint,
                    usage=None if usage is None else Usage(**usage),
                    cost=None if cost is None else float(cost),
                )
    return None


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _is_usage(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and set(value) == {"prompt_tokens", "completion_tokens"}
        and all(type(count) is int and count >= 0 for count in value.values())
    )
