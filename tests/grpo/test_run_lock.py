"""One process writes into a run directory; a dead one's lock is nobody's."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from kill_harness.file_faults import refuse
from kill_harness.file_operations import watched

from grpo.errors import ConfigError
from grpo.run_lock import Owner, RunLock, this_process

HOLD = """
import sys
from pathlib import Path
from grpo.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
print("taken", flush=True)
sys.stdin.read()
"""
LEAVE_A_CHILD = """
import os, sys, time
from pathlib import Path
from grpo.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
os.kill(os.getpid(), 9)
"""


@contextmanager
def running(script: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the first line that it says."""
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def check_free(folder: Path) -> None:
    lock = RunLock(folder)
    lock.take()
    with pytest.raises(ConfigError, match="another process is running"):
        RunLock(folder).take()
    lock.release()


def test_another_process_is_kept_out_and_told_who_is_there_until_that_one_is_killed(tmp_path: Path) -> None:
    with running(HOLD, tmp_path) as (process, said):
        assert said == "taken"
        with pytest.raises(ConfigError, match=rf"\(process {process.pid} on "):
            RunLock(tmp_path).take()
        process.kill()
        process.wait()
        check_free(tmp_path)


def test_a_child_that_a_killed_run_left_behind_keeps_nobody_out(tmp_path: Path) -> None:
    with running(LEAVE_A_CHILD, tmp_path) as (process, child):
        process.wait()
        try:
            with (tmp_path / ".lock").open() as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the child has the lock indeed
            check_free(tmp_path)
            check_free(tmp_path)
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_a_number_that_another_process_has_by_now_is_not_the_owner() -> None:
    ours = this_process()
    assert ours.may_be_alive
    assert not replace(ours, started="another boot/1").may_be_alive
    assert not Owner(host=ours.host, pid=2**22 + 1, started="").may_be_alive  # above Linux's highest number
    assert replace(ours, host="another machine", pid=2**22 + 1).may_be_alive  # nobody here can know


def test_a_disk_that_refuses_to_empty_the_record_ends_no_run_and_keeps_nobody_out(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.take()
    with watched(tmp_path.resolve(), refuse(errno.ENOSPC)):
        lock.release()
    check_free(tmp_path)


def test_a_record_that_nobody_can_read_keeps_nobody_out(tmp_path: Path) -> None:
    for content in (b"", b"\xff", b'{"pid": 1}', b'{"host": "else', json.dumps(asdict(this_process())).encode()):
        (tmp_path / ".lock").write_bytes(content)
        check_free(tmp_path)
