"""Steps' figures -> trackers, each in a thread of its own: one that fails, hangs or is slow costs its own figures only.

Comes in: rows of metrics.jsonl. Goes out: warnings, for whoever talks to the person. Knows no tracker's protocol.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from grpo.metrics import STEP
from grpo.trackers.base import Tracker

Row: TypeAlias = Mapping[str, float | int | None]

MAX_WAITING = 1000
"""Rows that wait for a slow tracker, about a megabyte; those that come after them are dropped."""
FINISH_S = 10.0
"""Longest that a run's end waits, for all its trackers together."""


class BackgroundTrackers:
    """All trackers of a run. `log` and `take_warnings` never wait and never raise; `close` waits no longer than told.

    Owns the threads: they begin here, and end with `close`, or with the process where a tracker hangs.
    """

    def __init__(self, trackers: Sequence[Tracker], *, max_waiting: int = MAX_WAITING) -> None:
        """Start them, each in its thread. Args: max_waiting: rows that a slow one may be behind."""
        self._workers = [_Worker(tracker, max_waiting) for tracker in trackers]
        for worker in self._workers:
            worker.thread.start()

    def log(self, row: Row) -> None:
        """Hand over a finished step's line; dropped, and counted, where a tracker is too far behind."""
        for worker in self._workers:
            worker.offer(row)

    def take_warnings(self) -> list[str]:
        """What is new since the last call; at most one about failing and one about dropping for each tracker."""
        return [warning for worker in self._workers for warning in worker.take_warnings()]

    def close(self, *, wait_s: float = FINISH_S) -> list[str]:
        """Let the trackers finish, for so long and no longer. A second call does nothing.

        Returns:
            What was not said yet: new warnings, and how many steps each tracker lacks.
        """
        workers, self._workers = self._workers, []
        deadline = time.monotonic() + wait_s
        for worker in workers:
            worker.begin_end()
        for worker in workers:
            worker.thread.join(max(deadline - time.monotonic(), 0.0))
        return [line for worker in workers for line in (*worker.take_warnings(), *worker.lacking())]


class _Worker:
    """One tracker, its thread and what waits for it. All methods but `_work` are the run's thread's."""

    def __init__(self, tracker: Tracker, max_waiting: int) -> None:
        self._tracker = tracker
        self._name, self._max_waiting = tracker.name, max_waiting
        self._waiting: queue.SimpleQueue[Row | None] = queue.SimpleQueue()  # None: the run has ended
        self._warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._num_offered = self._num_delivered = 0
        self._is_out = self._has_failed = self._has_dropped = False
        # a daemon: a tracker that hangs must not keep the process
        self.thread = threading.Thread(target=self._work, name=f"tracker {self._name}", daemon=True)

    def offer(self, row: Row) -> None:
        self._num_offered += 1
        if self._is_out:
            return
        if self._waiting.qsize() < self._max_waiting:
            self._waiting.put(row)
        elif not self._has_dropped:
            self._has_dropped = True
            self._warnings.put(
                f"tracker {self._name} is {self._max_waiting} steps behind; it misses further ones until it catches "
                "up. metrics.jsonl has them all"
            )

    def begin_end(self) -> None:
        self._waiting.put(None)

    def take_warnings(self) -> list[str]:
        return [self._warnings.get() for _ in range(self._warnings.qsize())]  # nobody else takes

    def lacking(self) -> list[str]:
        number = self._num_offered - self._num_delivered
        return (
            [f"tracker {self._name} lacks {number} of {self._num_offered} steps; metrics.jsonl has them"]
            if number
            else []
        )

    def _work(self) -> None:
        try:
            self._tracker.start()
        except Exception as exc:  # noqa: BLE001  a tracker is no part of the run, whatever it raises
            self._is_out = True
            self._failed("could not be started, and is left out", exc)
            return
        while (row := self._waiting.get()) is not None:
            try:
                self._tracker.log(_figures(row), step=int(row[STEP] or 0))
            except Exception as exc:  # noqa: BLE001  the next step may reach it again
                self._failed("failed; it is tried again with every step", exc)
            else:
                self._num_delivered += 1
        try:
            self._tracker.finish()
        except Exception as exc:  # noqa: BLE001  as above
            self._failed("failed at its end", exc)

    def _failed(self, what: str, exc: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._warnings.put(f"tracker {self._name} {what}: {type(exc).__name__}: {exc}. The run goes on")


def _figures(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if value is not None and name != STEP}
