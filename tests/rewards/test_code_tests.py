"""Code is run in the sandbox or not at all; 0 only where the tests ran and failed, or the code did under them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Set
from pathlib import Path

import pytest

from rewards import RewardInput, RewardUnavailable, Score
from rewards.code_tests import CodeTests, extract_code, parse_tests
from rewards.sandbox import SandboxLimits, SandboxRun, run_code, system_call_filter, why_unavailable

UNAVAILABLE = why_unavailable()
needs_sandbox = pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE)

ADD = "def add(a, b):\n    return a + b"
ADD_TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]
DOUBLE = {"input": "21\n", "output": "42\n"}


def scores(completions: list[str], *, reference: str | None = None, meta: dict | None = None, **params) -> list[Score]:
    async def run() -> list[Score]:
        reward = CodeTests(**params)
        inputs = [
            RewardInput(prompt_id="p", prompt="", completion=text, reference=reference, meta=meta or {})
            for text in completions
        ]
        try:
            return await reward.score(inputs)
        finally:
            await reward.aclose()

    return asyncio.run(run())


def run(code: str, *, tests: tuple[str, ...] = (), stdin: str = "", timeout_s: float = 20.0, **limits) -> SandboxRun:
    bounds = {"memory_bytes": 512 << 20, "disk_bytes": 4 << 20, "output_bytes": 1 << 16, "site_packages": False}
    return run_code(code, list(tests), stdin, SandboxLimits(timeout_s=timeout_s, **{**bounds, **limits}))


@needs_sandbox
def test_code_is_scored_by_its_tests():
    wrong, half = "def add(a, b):\n    return 3", "def add(a, b):\n    return abs(a) + abs(b)"
    completions = [ADD, f"Here it is:\n```python\n{ADD}\n```\nDone.", wrong, half, "def add(", "", "I cannot."]
    values = [score.value for score in scores(completions, meta={"tests": ADD_TESTS})]
    assert values == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@needs_sandbox
def test_the_share_of_passed_tests_can_be_the_score():
    tests = [*ADD_TESTS, "assert add(2, 2) == 4", "assert add('a', 'b') == 'ab'"]
    answer = scores(["def add(a, b):\n    return abs(a) + abs(b)"], meta={"tests": tests}, credit="share")[0]
    assert answer.value == 0.5  # |1|+|2| and |2|+|2|; neither |-1|+|1| nor abs('a')
    assert "2 of 4" in answer.reason
    assert "test 2: AssertionError" in answer.reason


@needs_sandbox
@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("print(2 * int(input()))", 1.0),
        ("print(2 * int(input()), end='  \\n\\n')", 1.0),
        ("import sys\nprint(42)\nsys.exit(0)", 1.0),
        ("if __name__ == '__main__':\n    print(42)", 1.0),
        ("print(42)\nraise ValueError", 0.0),
        ("print(421)", 0.0),
        ("print(4)\nprint(2)", 0.0),
        ("pass", 0.0),
    ],
)
def test_a_program_is_scored_by_what_it_prints(code, value):
    assert scores([code], reference=json.dumps([DOUBLE]))[0].value == value


@needs_sandbox
@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "import os, signal\nos.kill(os.getpid(), 9)",
    ],
)
def test_leaving_before_the_tests_is_no_success(code):
    answer = scores([code], meta={"tests": ADD_TESTS})[0]
    assert answer.value == 0.0
    assert answer.reason


@needs_sandbox
def test_the_tests_are_out_of_sight_while_the_code_runs():
    spy = "import os\nprint([open(f'/proc/self/fd/{n}').read() for n in os.listdir('/proc/self/fd') if int(n) > 2])"
    seen = run(
        f"try:\n    {spy.splitlines()[0]}\n    {spy.splitlines()[1]}\nexcept OSError: pass", tests=("secret = 1",)
    )
    assert "secret" not in seen.stdout
    assert run("import sys\nprint(sys.argv)").stdout == "['program.py']\n"


@needs_sandbox
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os\nwhile True: os.fork()", "PermissionError"),
        ("import subprocess\nsubprocess.run(['ls'])", "PermissionError"),
        ("import multiprocessing\nmultiprocessing.Process(target=print).start()", "PermissionError"),
        ("bytearray(10 << 30)", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError"),
        ("with open('/tmp/a', 'wb') as f:\n    while True: f.write(bytes(1 << 20))", "File too large"),
        (
            "import itertools\nfor i in itertools.count(): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))",
            "No space left",
        ),
        ("import socket\nsocket.create_connection(('127.0.0.1', 80), 1)", "PermissionError"),
        ("import socket\nsocket.socket(socket.AF_UNIX)", "PermissionError"),
        ("open('/root/.ssh/id_rsa')", "No such file"),
        ("open('/etc/passwd')", "No such file"),
        ("open('/usr/x', 'w')", "Read-only file system"),
        ("open('/x', 'w')", "Read-only file system"),
        ("open('/dev/shm/x', 'w')", "Read-only file system"),
        ("import numpy", "No module named 'numpy'"),
    ],
)
def test_what_code_may_not_do_fails_inside_the_sandbox(code, message):
    ended = run(code)
    assert ended.ending == "exited"
    assert message in ended.message


@needs_sandbox
def test_system_calls_that_go_around_the_limits_are_denied():
    calls = {
        "fork": "57",
        "clone without threads": "56, 17, 0, 0, 0, 0",
        "unshare": "272, 0x10000000",
        "io_uring_setup": "425, 1, 0",
        "socket(AF_VSOCK)": "41, 40, 1, 0",
        "ptrace": "101, 0, 0, 0, 0",
        "keyctl": "250, 0, 0",
        "x32 getpid": "0x40000027",
    }
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers are x86_64's")
    lines = [f"print(libc.syscall({arguments}), ctypes.get_errno())" for arguments in calls.values()]
    ended = run("import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n" + "\n".join(lines))
    assert dict(zip(calls, ended.stdout.splitlines(), strict=True)) == dict.fromkeys(calls, "-1 1")  # EPERM


@needs_sandbox
def test_neither_environment_nor_other_processes_are_seen(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "secret")
    everything = (
        "import os, glob\nprint(dict(os.environ))\nprint([open(p).read() for p in glob.glob('/proc/*/environ')])"
    )
    ended = run(everything)
    assert ended.ending == "finished"
    assert "secret" not in ended.stdout
    assert "SOME_API_KEY" not in ended.stdout
    assert "/proc/1/environ" not in ended.stdout


@needs_sandbox
def test_killing_everything_in_reach_kills_nobody_outside():
    ended = run(
        "import os, signal\nfor pid in (os.getppid(), 1, -1):\n    try: os.kill(pid, 9)\n    except OSError: pass"
    )
    assert ended.ending in ("finished", "exited")


@needs_sandbox
def test_code_without_end_is_stopped_at_the_limit():
    for code in ("while True: pass", "import time\ntime.sleep(1000)", "input()\nwhile True: pass"):
        begun = time.monotonic()
        assert run(code, timeout_s=1.0, stdin="x\n").ending == "timeout"
        assert time.monotonic() - begun < 10


@needs_sandbox
def test_printing_without_end_is_stopped():
    for stream in ("stdout", "stderr"):
        ended = run(f"import sys\nwhile True: print('x' * 1000, file=sys.{stream})")
        assert ended.ending == "output"
        assert len(ended.stdout) < 1 << 18


@needs_sandbox
def test_a_thread_bomb_ends_at_the_memory_limit_or_the_clock():
    ended = run(
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()", timeout_s=3.0
    )
    assert ended.ending in ("exited", "timeout")


@needs_sandbox
@pytest.mark.parametrize(
    "code",
    [
        "import threading\nt = threading.Thread(target=print, args=('ok',))\nt.start()\nt.join()",
        "import asyncio\nasync def main(): print('ok')\nasyncio.run(main())",
        "import heapq, re, collections, math, json, decimal, zlib, hashlib, datetime, random, dataclasses\nprint('ok')",
        "import sys\nsys.setrecursionlimit(10**6)\nf = lambda n: n and f(n - 1)\nf(5000)\nprint('ok')",
        "print('ok', file=open('/tmp/x', 'w'))\nprint(open('/tmp/x').read(), end='')",
    ],
)
def test_ordinary_programs_run(code):
    ended = run(code)
    assert (ended.ending, ended.stdout) == ("finished", "ok\n"), ended.message


@needs_sandbox
def test_installed_packages_can_be_let_in():
    ended = run("import numpy\nprint(numpy.ones(3).sum())", site_packages=True, memory_bytes=2 << 30)
    assert (ended.ending, ended.stdout) == ("finished", "3.0\n"), ended.message


@needs_sandbox
def test_limits_passed_by_one_completion_leave_the_others_alone():
    completions = ["while True: pass", ADD, "while True: print(1)", "bytearray(10 << 30)", ADD]
    answers = scores(completions, meta={"tests": ADD_TESTS}, timeout_s=3.0)
    assert [answer.value for answer in answers] == [0.0, 1.0, 0.0, 0.0, 1.0]


def states_of_descendants(ancestor: int) -> dict[int, str]:
    """Process id -> state letter, for all that this process has started, and they."""
    stats = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            stats[int(folder.name)] = (after_name[0], int(after_name[1]))
    found, parents = {}, {ancestor}
    while parents:
        parents = {pid for pid, (_, parent) in stats.items() if parent in parents}
        found |= {pid: stats[pid][0] for pid in parents}
    return found


def new_descendants(known: Set[int], count: int) -> set[int]:
    """Wait until this process has that many descendants besides the known ones."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        new = set(states_of_descendants(os.getpid())) - known
        if len(new) >= count:
            return new
        time.sleep(0.05)
    raise TimeoutError(f"fewer than {count} processes were started")


@needs_sandbox
def test_giving_up_ends_the_code_that_runs():
    before = states_of_descendants(os.getpid())

    async def give_up() -> set[int]:
        reward = CodeTests(timeout_s=60.0)
        inputs = [RewardInput(prompt_id="p", prompt="", completion="while True: pass", reference="assert 1")]
        task = asyncio.create_task(reward.score(inputs))
        running = await asyncio.to_thread(new_descendants, before.keys(), 4)  # the worker, bwrap twice, the code
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await reward.aclose()
        return running

    started = asyncio.run(give_up())
    deadline = time.monotonic() + 10

    def still_running() -> list[int]:
        return [pid for pid in started if (stat := state_of(pid)) is not None and stat not in "ZX"]

    while still_running() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert still_running() == []


def state_of(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


@needs_sandbox
def test_the_sandbox_passes_its_check():
    async def check() -> None:
        reward = CodeTests()
        await reward.check()
        await reward.aclose()

    asyncio.run(check())


def test_without_bubblewrap_no_code_is_run_and_the_check_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RewardUnavailable, match="apt-get install bubblewrap"):
        asyncio.run(CodeTests().check())
    answer = scores([ADD], meta={"tests": ADD_TESTS})[0]
    assert answer.value is None
    assert "sandbox trouble" in answer.reason


def test_a_sandbox_that_does_not_start_is_missing_not_zero(monkeypatch, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(RewardUnavailable, match="No permissions"):
        asyncio.run(CodeTests().check())
    answer = scores([ADD], meta={"tests": ADD_TESTS})[0]
    assert answer.value is None
    assert "No permissions" in answer.reason


@pytest.mark.parametrize(
    ("meta", "reference", "cause"),
    [
        ({}, None, "found none"),
        ({"tests": []}, None, "found list"),
        ({"tests": [3]}, None, "found '3'"),
        ({"tests": [""]}, None, "expected code"),
        ({"tests": "[1"}, None, "not JSON"),
        ({"tests": {"inputs": ["1"], "outputs": []}}, None, "not lists of one length"),
        ({"tests": [{"input": "1"}]}, None, "expected code"),
    ],
)
def test_unusable_tests_are_missing_not_zero(meta, reference, cause):
    answer = scores([ADD], reference=reference, meta=meta)[0]
    assert answer.value is None
    assert cause in answer.reason


def test_tests_in_the_forms_that_datasets_have():
    assert parse_tests(["assert 1"]) == [{"code": "assert 1"}]
    assert parse_tests("assert 1") == [{"code": "assert 1"}]
    assert parse_tests({"inputs": ["1"], "outputs": ["2"]}) == [{"input": "1", "output": "2"}]
    assert parse_tests('[{"type": "stdin_stdout", "input": "1", "output": "2"}]') == [{"input": "1", "output": "2"}]
    human_eval = "def check(candidate):\n    assert candidate(1)"
    assert parse_tests(human_eval, "solve") == [{"code": human_eval + "\ncheck(solve)\n"}]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nthen\n```python\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\n```\nprints\n```text\n1\n```", "x = 1\n"),
        ("```py title=a\nx = 1", "x = 1"),
        ("```python\ns = '```'\nx = 1\n```", "s = '```'\nx = 1\n"),
    ],
)
def test_the_code_of_a_completion(text, code):
    assert extract_code(text) == code


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_filter_is_whole_instructions_and_no_jump_leaves_it(machine):
    program = system_call_filter(machine)
    count = len(program) // 8
    assert len(program) == 8 * count
    for position in range(count):
        code, if_true, if_false = program[8 * position], program[8 * position + 2], program[8 * position + 3]
        if code & 0x07 == 0x05:
            assert position + 1 + max(if_true, if_false) < count
