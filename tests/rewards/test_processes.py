"""A call that passes its limit is killed, costs its own outcome only, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewards.processes import MAX_CALLS_PER_WORKER, Finished, ProcessPool, Unfinished
from rewards.worker import ORPHAN_GRACE_S

CATASTROPHE = ("(a+)+$", "a" * 60 + "b")
"""Backtracks 2^60 times, in C, without ever looking at a signal."""


@pytest.fixture(autouse=True)
def local_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "called_in_a_worker.py").write_text(
        "import os, re, signal, time\n"
        "def echo(value): return value\n"
        "def pid(): return os.getpid()\n"
        "def match(pattern, text): return re.match(pattern, text) is not None\n"
        "def power(base, exponent): return (base ** exponent) % 7\n"
        "def allocate(num_bytes): return len(bytearray(num_bytes))\n"
        "def crash(): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "def leave(): os._exit(3)\n"
        "def variable(name): return os.environ.get(name)\n"
        "def chatter(): print('x' * 100_000); return 1\n"
        "def unsayable(): return object()\n"
        "def child_of_child(path):\n"
        "    import subprocess\n"
        "    child = subprocess.Popen(['sleep', '1000'])\n"
        "    open(path, 'w').write(str(child.pid))\n"
        "    time.sleep(1000)\n"
        "def dispatch(name, *args): return globals()[name](*args)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def outcomes(*calls: tuple, timeout_s: float = 20.0, workers: int = 2, **options):
    async def run():
        pool = ProcessPool("called_in_a_worker:dispatch", timeout_s=timeout_s, workers=workers, **options)
        try:
            return await asyncio.gather(*(pool.call(*call) for call in calls))
        finally:
            await pool.aclose()

    return asyncio.run(run())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def test_values_come_back_in_the_order_of_the_calls():
    values = [0, 1.5, "text", None, [1, {"a": "ü\ud800"}]]
    assert outcomes(*(("echo", value) for value in values)) == [Finished(value=value) for value in values]


def test_a_worker_is_used_again():
    pids = {outcome.value for outcome in outcomes(*[("pid",)] * 6, workers=1)}
    assert len(pids) == 1
    assert os.getpid() not in pids


@pytest.mark.parametrize("call", [("match", *CATASTROPHE), ("power", 10, 10**10)], ids=["regex", "10**10**10"])
def test_a_call_without_end_costs_its_own_outcome_only(call):
    first, lost, last = outcomes(("echo", 1), call, ("echo", 2), timeout_s=2.0)
    assert (first, last) == (Finished(value=1), Finished(value=2))
    assert isinstance(lost, Unfinished)
    assert lost.kind in ("timeout", "memory")


def test_a_timed_out_call_says_timeout():
    assert outcomes(("match", *CATASTROPHE), timeout_s=0.5) == [
        Unfinished(kind="timeout", detail="not done after 0.5 s")
    ]


def test_more_memory_than_allowed_is_said_and_the_next_call_works():
    lost, kept = outcomes(("allocate", 1 << 30), ("echo", 1), workers=1, memory_bytes=512 << 20)
    assert lost == Unfinished(kind="memory", detail="more than 512 MiB asked for")
    assert kept == Finished(value=1)


@pytest.mark.parametrize(("call", "how"), [(("crash",), "signal 11"), (("leave",), "exit code 3")])
def test_a_process_that_ends_costs_its_own_outcome_only(call, how):
    lost, kept = outcomes(call, ("echo", 1), workers=1)
    assert lost.kind == "died"
    assert how in lost.detail
    assert kept == Finished(value=1)


def test_an_exception_is_an_outcome_and_the_worker_goes_on():
    before, lost, after = outcomes(("pid",), ("echo",), ("pid",), workers=1)
    assert lost.kind == "raised"
    assert lost.detail.startswith("TypeError: ")
    assert before == after


def test_what_json_cannot_say_is_an_outcome():
    assert outcomes(("unsayable",))[0].kind == "raised"


def test_a_function_that_prints_does_not_disturb_the_line():
    assert outcomes(("chatter",), ("echo", 2), workers=1) == [Finished(value=1), Finished(value=2)]


def test_api_keys_of_the_environment_are_not_handed_on(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "secret")
    assert outcomes(("variable", "SOME_API_KEY")) == [Finished(value=None)]


def test_a_function_that_cannot_be_imported_is_named():
    async def run():
        pool = ProcessPool("called_in_a_worker:no_such", timeout_s=1.0)
        outcome = await pool.call(1)
        await pool.aclose()
        return outcome

    outcome = asyncio.run(run())
    assert outcome.kind == "died"
    assert "no_such" in outcome.detail


def test_the_limit_does_not_count_the_wait_for_a_worker():
    calls = [("echo", 1)] + [("match", *CATASTROPHE)] * 2 + [("echo", 3)]
    assert [type(outcome) for outcome in outcomes(*calls, timeout_s=1.0, workers=1)][-1] is Finished


def test_a_cancelled_call_is_killed_and_the_pool_goes_on():
    async def run():
        pool = ProcessPool("called_in_a_worker:dispatch", timeout_s=60.0, workers=1)
        (pid,) = [(await pool.call("pid")).value]
        task = asyncio.create_task(pool.call("match", *CATASTROPHE))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        after = await pool.call("echo", 1)
        await pool.aclose()
        return pid, after

    pid, after = asyncio.run(run())
    assert not is_alive(pid)
    assert after == Finished(value=1)


def test_a_call_that_is_cancelled_while_it_waits_never_runs(tmp_path):
    mark = tmp_path / "mark"

    async def run():
        pool = ProcessPool("called_in_a_worker:dispatch", timeout_s=1.0, workers=1)
        busy = asyncio.create_task(pool.call("match", *CATASTROPHE))
        waiting = asyncio.create_task(pool.call("child_of_child", str(mark)))
        await asyncio.sleep(0.1)
        waiting.cancel()
        outcome = await busy
        await pool.aclose()
        return outcome

    assert asyncio.run(run()).kind == "timeout"
    assert not mark.exists()


def test_closing_kills_a_running_call_and_refuses_new_ones():
    async def run():
        pool = ProcessPool("called_in_a_worker:dispatch", timeout_s=60.0, workers=1)
        task = asyncio.create_task(pool.call("match", *CATASTROPHE))
        await asyncio.sleep(0.2)
        await pool.aclose()
        await pool.aclose()
        with pytest.raises(RuntimeError, match="closed"):
            await pool.call("echo", 1)
        return await task

    assert asyncio.run(run()).kind == "died"


def test_what_a_worker_has_started_dies_with_it(tmp_path):
    mark = tmp_path / "pid"
    (lost,) = outcomes(("child_of_child", str(mark)), timeout_s=1.0)
    assert lost.kind == "timeout"
    deadline = time.monotonic() + 5
    while is_alive(int(mark.read_text())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(int(mark.read_text()))


def test_a_pool_serves_one_event_loop_after_another():
    pool = ProcessPool("called_in_a_worker:dispatch", timeout_s=20.0, workers=1)
    pids = {asyncio.run(pool.call("pid")) for _ in range(3)}
    assert len(pids) == 1
    asyncio.run(pool.aclose())


def test_a_forgotten_pool_takes_its_workers_along():
    pool = ProcessPool("called_in_a_worker:dispatch", timeout_s=20.0, workers=1)
    pid = asyncio.run(pool.call("pid")).value
    del pool
    gc.collect()
    assert not is_alive(pid)


def test_a_worker_whose_parent_was_killed_is_ended_by_the_kernel(tmp_path):
    script = (
        "import asyncio, sys\n"
        "from rewards.processes import ProcessPool\n"
        "pool = ProcessPool('called_in_a_worker:dispatch', timeout_s=0.5, workers=1)\n"
        "print(asyncio.run(pool.call('pid')).value, flush=True)\n"
        f"asyncio.run(pool.call('match', *{CATASTROPHE!r}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        time.sleep(0.2)  # the call has begun by now, or the closed line ends the worker all the same
        parent.kill()
    deadline = time.monotonic() + 0.5 + ORPHAN_GRACE_S + 10
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)


def test_a_worker_is_replaced_after_many_calls():
    async def run():
        pool = ProcessPool("called_in_a_worker:dispatch", timeout_s=20.0, workers=1)
        first = await pool.call("pid")
        for _ in range(MAX_CALLS_PER_WORKER - 1):
            await pool.call("echo", 0)
        after = await pool.call("pid")
        await pool.aclose()
        return first, after

    first, after = asyncio.run(run())
    assert first.value != after.value
    assert not is_alive(first.value)
