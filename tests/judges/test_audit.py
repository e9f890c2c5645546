"""The audit file: whole lines, whatever happens around them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from judges.audit import AuditLog, AuditRecord
from judges.types import Usage


def make_record(id: str, *, raw: str = "x") -> AuditRecord:
    return AuditRecord(
        id=id,
        criterion="fairness",
        prompt_sha256="0" * 64,
        raw=raw,
        outcome="scored",
        value=1.0,
        detail="",
        attempts=1,
        usage=Usage(prompt_tokens=3, completion_tokens=2),
        latency_s=0.5,
        time_s=1.0,
    )


def test_lines_written_at_once_by_two_logs_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    logs = [AuditLog(path), AuditLog(path)]

    async def main() -> None:
        raw = "long\n\u2028reply " * 500
        await asyncio.gather(*(logs[i % 2].append(make_record(str(i), raw=raw)) for i in range(200)))

    asyncio.run(main())
    for log in logs:
        log.close()
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert sorted(int(json.loads(line)["id"]) for line in lines) == list(range(200))


def test_a_line_torn_by_a_crash_spoils_no_later_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b'{"id": "old"}\n{"id": "torn", "ra')
    log = AuditLog(path)
    asyncio.run(log.append(make_record("new")))
    log.close()
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"id": "old"}', '{"id": "torn", "ra']
    assert json.loads(lines[2])["id"] == "new"


def test_a_record_holds_every_field_in_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    asyncio.run(log.append(make_record("a")))
    log.close()
    assert json.loads(path.read_text()) == {
        "id": "a",
        "criterion": "fairness",
        "prompt_sha256": "0" * 64,
        "raw": "x",
        "outcome": "scored",
        "value": 1.0,
        "detail": "",
        "attempts": 1,
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        "latency_s": 0.5,
        "time_s": 1.0,
    }


def test_nothing_judged_leaves_no_file(tmp_path: Path) -> None:
    AuditLog(tmp_path / "audit.jsonl").close()
    assert list(tmp_path.iterdir()) == []
