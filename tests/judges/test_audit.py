"""The audit file: whole lines, whatever happens around them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from judges.audit import AuditLog, AuditRecord, Booking, read_audit
from judges.errors import AuditFailed
from judges.types import Call, Usage


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
    log.step = 7
    call = Call(endpoint="big", outcome="overloaded", latency_s=0.25, waited_s=0.5, status=429, cost=0.0)
    asyncio.run(log.append(replace(make_record("a"), calls=(call,), keys=("k",), cost=0.125, origin="asked")))
    log.close()
    line = json.loads(path.read_text())
    assert len(line.pop("session")) == 8
    assert line == {
        "step": 7,
        "id": "a",
        "criterion": "fairness",
        "judgement_sha256": None,
        "prompt_sha256": "0" * 64,
        "rubric_sha256": None,
        "keys": ["k"],
        "raw": "x",
        "outcome": "scored",
        "value": 1.0,
        "detail": "",
        "fault": None,
        "attempts": 1,
        "calls": [
            {
                "endpoint": "big",
                "outcome": "overloaded",
                "latency_s": 0.25,
                "waited_s": 0.5,
                "is_hedge": False,
                "status": 429,
                "cost": 0.0,
            }
        ],
        "origin": "asked",
        "endpoint": "",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        "cost": 0.125,
        "disagreement": None,
        "latency_s": 0.5,
        "time_s": 1.0,
    }


def test_what_a_budget_has_booked_stands_behind_the_record_and_what_is_left_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    booked = [Booking(judge="j", amount=0.5, estimated=0.0), None, Booking(judge="j", amount=0.25, estimated=0.25)]
    log = AuditLog(path, take_booking=lambda: booked.pop(0))
    for id in ("a", "b"):
        asyncio.run(log.append(make_record(id)))
    log.close()
    lines = list(read_audit(path))
    assert [line.get("id") for line in lines] == ["a", None, "b", None]
    assert [line["booking"]["amount"] for line in lines if "booking" in line] == [0.5, 0.25]


def test_reading_leaves_out_what_is_no_whole_record(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b'{"id": "a"}\n{"id": "torn", "ra\n[1]\n\xff\n\n{"id": "b"}')
    assert [line["id"] for line in read_audit(path)] == ["a", "b"]


def test_a_full_disk_stops_the_run(tmp_path: Path) -> None:
    full = Path("/dev/full")  # every write to it fails with "no space left on device"
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    path = tmp_path / "audit.jsonl"
    path.symlink_to(full)
    with pytest.raises(AuditFailed, match=r"No space left.*Free space"):
        asyncio.run(AuditLog(path).append(make_record("a")))


def test_nothing_judged_leaves_no_file(tmp_path: Path) -> None:
    AuditLog(tmp_path / "audit.jsonl").close()
    assert list(tmp_path.iterdir()) == []
