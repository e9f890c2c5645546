"""A pool of worker processes for CPU-bound rules: a call that passes its limit costs its own verdict only.

A regular expression that backtracks without end, sympy on `10**10**10`, a segmentation fault: the process that runs
it is killed and replaced, and the other calls never notice. Workers are fresh interpreters (`rewards.worker`), never
forks: forking a process that holds torch's threads deadlocks, and the caller's `__main__` is not run again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import Any, Literal, TypeAlias

from rewards.types import Score

MAX_REPLY_BYTES = 1 << 20
MAX_CALLS_PER_WORKER = 2000
"""Then it is replaced: what a library leaks must not push an innocent call over the memory limit."""
START_TIMEOUT_S = 120.0
"""Importing sympy on a busy machine takes long; it is not the completion's fault."""

# Everything else, API keys above all, stays here: sympy evaluates text that a completion wrote.
_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONHOME", "SYSTEMROOT")

UnfinishedKind: TypeAlias = Literal["timeout", "memory", "died", "raised"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The function came back."""

    value: Any
    """What it returned, after a trip through JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """The function did not come back with a value."""

    kind: UnfinishedKind
    """"died": the process ended by itself, or could not be started; "raised": the function did."""
    detail: str
    """The cause, in words."""


Outcome: TypeAlias = Finished | Unfinished


def score_at_limit(outcome: Unfinished, limit_score: float | None) -> Score:
    """A missing score that says why; `limit_score` where the completion passed the time or memory limit."""
    value = limit_score if outcome.kind in ("timeout", "memory") else None
    return Score(value=value, reason=f"{outcome.kind}: {outcome.detail}")


class ProcessPool:
    """Calls one function in worker processes, started when first needed and used again.

    `function` is named `package.module:name`, takes and returns what JSON can say, and is imported in the workers only.
    Safe to call from any thread and event loop. Close it with `aclose()`; one that is forgotten dies with its last
    reference.
    """

    def __init__(
        self,
        function: str,
        *,
        timeout_s: float,
        memory_bytes: int = 2 << 30,
        workers: int | None = None,
        warm_up: Sequence[Any] | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            function: `package.module:name`.
            timeout_s: wall time of one call, from its start in a worker; waiting for one does not count.
            memory_bytes: address space of one worker.
            workers: most processes at a time; as many as the CPUs this process may use, at most 4, where None.
            warm_up: arguments of a call that each new worker makes before its first, without a limit but the start's.
        """
        self._order = {
            "function": function,
            "timeout_s": timeout_s,
            "memory_bytes": memory_bytes,
            "warm_up": None if warm_up is None else list(warm_up),
        }
        self._num_workers = workers or min(4, len(os.sched_getaffinity(0)))
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._alive: set[_Worker] = set()
        self._is_closed = False
        weakref.finalize(self, _kill_all, self._alive)

    async def call(self, *args: Any) -> Outcome:
        """Call the function once. A cancelled call's process is killed.

        Raises:
            RuntimeError: the pool is closed.
            asyncio.CancelledError: the caller gave up.
        """
        ticket = _Ticket()
        future = self._executor().submit(self._call_in_thread, ticket, json.dumps(args).encode())
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            ticket.give_up()
            raise

    async def aclose(self) -> None:
        """Kill the workers and wait until they are gone. A second call does nothing."""
        await asyncio.to_thread(self._close)

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the process pool is closed")
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._num_workers, thread_name_prefix="reward-process")
            return self._threads

    def _call_in_thread(self, ticket: _Ticket, message: bytes) -> Outcome:
        worker = self._take()
        if worker is None:
            return Unfinished(kind="died", detail="the process pool was closed")
        try:
            if not ticket.begin(worker):
                return Unfinished(kind="died", detail="the caller gave up")
            return worker.call(message)
        finally:
            ticket.end()
            self._give_back(worker)

    def _take(self) -> _Worker | None:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.is_usable:
                    return worker
                self._discard(worker)
            if self._is_closed:
                return None
            worker = _Worker(self._order)
            self._alive.add(worker)
            return worker

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            if worker.is_usable and not self._is_closed:
                self._idle.append(worker)
            else:
                self._discard(worker)

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        self._alive.discard(worker)

    def _close(self) -> None:
        with self._lock:
            self._is_closed = True
            for worker in self._alive:
                worker.kill()  # a call that runs on it hears the line go dead and returns
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._idle.clear()
            self._alive.clear()


class _Ticket:
    """Lets the caller of a call kill the worker it runs on, and no other. waiting -> running -> over | given up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._is_given_up = False

    def begin(self, worker: _Worker) -> bool:
        """Whether the call is still wanted."""
        with self._lock:
            if not self._is_given_up:
                self._worker = worker
            return not self._is_given_up

    def end(self) -> None:
        with self._lock:
            self._worker = None

    def give_up(self) -> None:
        with self._lock:
            self._is_given_up = True
            if self._worker is not None:
                self._worker.kill()


class _Worker:
    """One process and the line to it. Used by one thread at a time; `kill` may come from any."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._timeout_s: float = order["timeout_s"]
        self._memory_bytes: int = order["memory_bytes"]
        self._is_ready = False
        self._num_calls = 0
        self._is_spent = False
        self._pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rewards.worker", json.dumps({**order, "fd": theirs.fileno()})],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for the trainer; and one kill reaches the worker's own children
            )

    @property
    def is_usable(self) -> bool:
        """Whether another call may be made."""
        return not self._is_spent and self._num_calls < MAX_CALLS_PER_WORKER and self._process.poll() is None

    def call(self, message: bytes) -> Outcome:
        """Make one call; after anything but a value or an exception the worker is spent."""
        try:
            outcome = self._started() or self._outcome_of(message)
        except (EOFError, OSError):
            outcome = Unfinished(kind="died", detail=f"the worker process ended{self._how_it_ended()}")
        if isinstance(outcome, Unfinished) and outcome.kind != "raised":
            self._is_spent = True
            self.kill()
        return outcome

    def kill(self) -> None:
        """End the process and its children, and wait for it. A second call does nothing."""
        self._is_spent = True
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it may end between the two lines
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _started(self) -> Unfinished | None:
        if self._is_ready:
            return None
        reply = self._reply_within(START_TIMEOUT_S)
        if reply is None:
            return Unfinished(kind="died", detail=f"the worker was not ready after {START_TIMEOUT_S:g} s")
        if "failed" in reply:
            return Unfinished(kind="died", detail=f"the worker cannot start: {reply['detail']}")
        self._is_ready = True
        return None

    def _outcome_of(self, message: bytes) -> Outcome:
        self._num_calls += 1
        self._pipe.send_bytes(message)
        reply = self._reply_within(self._timeout_s)
        if reply is None:
            return Unfinished(kind="timeout", detail=f"not done after {self._timeout_s:g} s")
        if "failed" not in reply:
            return Finished(value=reply["value"])
        if reply["failed"] == "memory":
            return Unfinished(kind="memory", detail=f"more than {self._memory_bytes / 2**20:.0f} MiB asked for")
        return Unfinished(kind="raised", detail=reply["detail"])

    def _reply_within(self, timeout_s: float) -> dict[str, Any] | None:
        if not self._pipe.poll(timeout_s):
            return None
        return json.loads(self._pipe.recv_bytes(MAX_REPLY_BYTES))

    def _how_it_ended(self) -> str:
        deadline = time.monotonic() + 1.0
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)  # the line goes dead a moment before the process does
        code = self._process.returncode
        if code is None:
            return ""
        return f" (signal {-code})" if code < 0 else f" (exit code {code})"


def _kill_all(workers: set[_Worker]) -> None:
    for worker in list(workers):
        worker.kill()


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    return {**kept, **one_thread, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
