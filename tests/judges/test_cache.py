"""The verdict cache: what it keeps, and that nothing wrong with its file reaches the run."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from judges.cache import SqliteCache, request_key
from judges.config import EndpointConfig, ScaleConfig
from judges.types import ChatRequest, Message, Usage, Verdict


def make_verdict(*scores: float | None, raw: str = "fine") -> Verdict:
    return Verdict(
        scores=scores or (0.1,),
        raws=tuple(raw for _ in scores or (0.1,)),
        endpoint="m",
        usage=Usage(prompt_tokens=3, completion_tokens=2),
        cost=0.25,
    )


def use(path: Path, call: Callable[[SqliteCache], Any], **settings: Any) -> Any:
    async def main() -> Any:
        cache = SqliteCache(path, **settings)
        try:
            return await call(cache)
        finally:
            await cache.aclose()

    return asyncio.run(main())


def keep(path: Path, key: str, verdict: Verdict, **settings: Any) -> None:
    use(path, lambda cache: cache.put(key, verdict), **settings)


def look_up(path: Path, key: str, **settings: Any) -> Verdict | None:
    return use(path, lambda cache: cache.get(key), **settings)


def key_of(**changes: Any) -> str:
    endpoint = {"url": "https://judge.example/v1", "model": "m", **changes.pop("endpoint", {})}
    chat = {"messages": (Message(role="user", content="nonce 1"),), "max_tokens": 5, **changes.pop("chat", {})}
    rest = {"prompt_sha256": "a", "scale": ScaleConfig(), "sample_index": 0, **changes}
    return request_key(EndpointConfig(**endpoint), chat=ChatRequest(**chat), **rest)


def test_a_verdict_comes_back_in_a_later_run_to_the_bit(tmp_path: Path) -> None:
    verdict = make_verdict(0.1 + 0.2, 5e-324, -0.0)
    keep(tmp_path / "cache.db", "k", verdict)
    found = look_up(tmp_path / "cache.db", "k")
    assert repr(found) == repr(verdict)  # repr tells -0.0 from 0.0
    assert look_up(tmp_path / "cache.db", "other") is None


def test_an_incomplete_verdict_is_not_kept(tmp_path: Path) -> None:
    keep(tmp_path / "cache.db", "k", make_verdict(1.0, None))
    assert look_up(tmp_path / "cache.db", "k") is None


def test_the_key_holds_all_that_decides_the_answer_and_nothing_that_does_not() -> None:
    same = [
        key_of(),
        key_of(chat={"messages": (Message(role="user", content="nonce 2"),)}),
        key_of(endpoint={"api_key": "env:KEY", "name": "another", "requests_per_minute": 5.0}),
        key_of(endpoint={"url": "https://judge.example/v1/"}),
    ]
    assert len(set(same)) == 1
    different = [
        key_of(endpoint={"url": "https://judge.example/v2"}),
        key_of(endpoint={"model": "m2"}),
        key_of(endpoint={"dialect": "anthropic_messages"}),
        key_of(chat={"temperature": 0.0}),
        key_of(chat={"temperature": 1.0}),
        key_of(chat={"seed": 1}),
        key_of(chat={"max_tokens": 6}),
        key_of(chat={"json_schema": {"type": "object"}}),
        key_of(prompt_sha256="b"),
        key_of(scale=ScaleConfig(high=10.0)),
        key_of(sample_index=1),
    ]
    assert len({*same, *different}) == 1 + len(different)


def test_verdicts_of_several_processes_are_there_for_all(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    script = (
        "import asyncio, sys; from pathlib import Path; from judges.cache import SqliteCache\n"
        "from judges.types import Verdict\n"
        "async def main():\n"
        "    cache = SqliteCache(Path(sys.argv[1]))\n"
        "    for i in range(50):\n"
        "        verdict = Verdict(scores=(i / 100,), raws=('x',), endpoint='m', usage=None, cost=None)\n"
        "        await cache.put(f'{sys.argv[2]}-{i}', verdict)\n"
        "    await cache.aclose()\n"
        "asyncio.run(main())\n"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", script, str(path), str(i)], stderr=subprocess.PIPE) for i in range(3)
    ]
    assert [worker.communicate()[1] for worker in workers] == [b"", b"", b""]

    async def count(cache: SqliteCache) -> list[float]:
        found = [await cache.get(f"{worker}-{i}") for worker in range(3) for i in range(50)]
        return [verdict.scores[0] for verdict in found if verdict]

    assert use(path, count) == [i / 100 for i in range(50)] * 3


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100:4096] = os.urandom(3996)
    path.write_bytes(content)


def make_foreign(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE verdicts (whatever TEXT)")
    connection.commit()
    connection.close()


def make_newer(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


@pytest.mark.parametrize(
    "spoil",
    [truncate, flip_header, make_foreign, make_newer, lambda path: path.write_text("no database " * 100)],
    ids=["truncated", "garbled", "foreign", "newer", "text"],
)
def test_a_file_that_is_no_cache_of_ours_is_moved_aside_and_the_run_goes_on(
    spoil: Callable[[Path], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache.db"

    async def fill(cache: SqliteCache) -> None:
        for i in range(200):
            await cache.put(str(i), make_verdict(raw="word " * 50))

    use(path, fill)
    spoil(path)
    spoiled = path.read_bytes()

    async def go_on(cache: SqliteCache) -> Verdict | None:
        before = await cache.get("0")
        await cache.put("new", make_verdict(1.0))
        assert before is None
        return await cache.get("new")

    assert use(path, go_on) == make_verdict(1.0)
    (message,) = caplog.messages
    assert "moved aside" in message
    (aside,) = [file for file in tmp_path.glob("cache.db.aside-*") if not file.name.endswith(("-wal", "-shm"))]
    assert aside.read_bytes() == spoiled
    assert look_up(path, "new") == make_verdict(1.0)


def test_a_cache_that_breaks_while_it_is_open_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache.db"

    class Breaking(sqlite3.Connection):
        is_first = True

        def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
            if sql.startswith("SELECT CAST") and Breaking.is_first:
                Breaking.is_first = False
                flip_header(path)  # under its feet
                error = sqlite3.DatabaseError("database disk image is malformed")
                error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
                raise error
            return super().execute(sql, parameters)

    def connect(path: Path, **settings: Any) -> sqlite3.Connection:
        return sqlite3.connect(path, factory=Breaking, **settings)

    keep(path, "k", make_verdict())
    assert look_up(path, "k", connect=connect) is None
    assert len(caplog.messages) == 1
    keep(path, "k", make_verdict())
    assert look_up(path, "k") == make_verdict()


def test_a_file_that_another_program_has_locked_is_bypassed_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache.db"
    keep(path, "k", make_verdict())
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    holder.execute("INSERT INTO verdicts (key, verdict) VALUES ('x', 'y')")

    async def go_on(cache: SqliteCache) -> None:
        for _ in range(3):
            assert await cache.get("k") is None
            await cache.put("k2", make_verdict())

    use(path, go_on, busy_s=0.05)
    holder.close()
    assert ["going on without it" in message for message in caplog.messages] == [True]
    assert look_up(path, "k") == make_verdict()


def test_a_folder_that_cannot_be_written_is_bypassed_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")

    async def go_on(cache: SqliteCache) -> list[Verdict | None]:
        await cache.put("k", make_verdict())
        return [await cache.get("k"), await cache.get("k")]

    assert use(tmp_path / "file" / "cache.db", go_on) == [None, None]
    assert len(caplog.messages) == 1


def test_on_a_full_disk_old_verdicts_are_still_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache.db"
    keep(path, "old", make_verdict())

    def connect_to_full_disk(path: Path, **settings: Any) -> sqlite3.Connection:
        connection = sqlite3.connect(path, **settings)
        connection.execute("PRAGMA max_page_count = 4")
        return connection

    async def go_on(cache: SqliteCache) -> Verdict | None:
        for i in range(3):
            await cache.put(str(i), make_verdict(raw="x" * 100_000))
        return await cache.get("old")

    assert use(path, go_on, connect=connect_to_full_disk) == make_verdict()
    (message,) = caplog.messages
    assert "no more verdicts are kept" in message
    assert "full" in message


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/judge_cache_was_unpickled",)


GOOD = {"scores": [1.0], "raws": ["x"], "endpoint": "m", "usage": None, "cost": None}


@pytest.mark.parametrize(
    "row",
    [
        pickle.dumps(Bomb()),
        "not json",
        "",
        "[1.0]",
        "1.0",
        json.dumps({**GOOD, "scores": []}),
        json.dumps({**GOOD, "scores": ["1.0"]}),
        json.dumps({**GOOD, "scores": [True]}),
        json.dumps({**GOOD, "scores": [None]}),
        json.dumps({**GOOD, "scores": [float("nan")]}),
        json.dumps(GOOD).replace("1.0", "1e999"),
        json.dumps(GOOD).replace("1.0", "9" * 400),
        json.dumps({**GOOD, "raws": ["x", "y"]}),
        json.dumps({**GOOD, "raws": None}),
        json.dumps({**GOOD, "usage": {"prompt_tokens": -1, "completion_tokens": 1}}),
        json.dumps({**GOOD, "usage": {"prompt_tokens": 1, "completion_tokens": 1, "more": 1}}),
        json.dumps({**GOOD, "cost": "cheap"}),
        "[" * 100_000,
        "x" * 5_000_000,
        7,
        None,
    ],
    ids=lambda row: repr(row)[:40],
)
def test_a_row_that_is_no_verdict_is_ignored_and_never_executed(
    row: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache.db"
    keep(path, "k", make_verdict())
    connection = sqlite3.connect(path)
    if row is None:
        connection.execute("UPDATE verdicts SET verdict = CAST(x'fffe00' AS TEXT)")  # not UTF-8
    else:
        connection.execute("UPDATE verdicts SET verdict = ?", (row,))
    connection.commit()
    connection.close()
    assert look_up(path, "k") is None
    keep(path, "k", make_verdict(0.5))
    assert look_up(path, "k") == make_verdict(0.5)
    assert not Path("/tmp/judge_cache_was_unpickled").exists()
    assert caplog.messages == []


def test_beyond_its_size_the_oldest_verdicts_go(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    max_bytes = 200_000

    async def fill(cache: SqliteCache) -> list[bool]:
        for i in range(300):
            await cache.put(str(i), make_verdict(raw="x" * 2000))
        return [await cache.get(str(i)) is not None for i in range(300)]

    is_there = use(path, fill, max_bytes=max_bytes)
    assert is_there[-1]
    assert is_there == sorted(is_there)  # the oldest are gone, the newer ones are there
    assert 40 < sum(is_there) < 49  # a page of 4096 bytes holds one such row, and 48 pages fill it
    assert path.stat().st_size < 1.1 * max_bytes


def test_a_closed_cache_answers_nothing_and_closes_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def main() -> None:
        cache = SqliteCache(tmp_path / "cache.db")
        await cache.put("k", make_verdict())
        await cache.aclose()
        await cache.aclose()
        assert await cache.get("k") is None
        await cache.put("k", make_verdict())

    asyncio.run(main())
