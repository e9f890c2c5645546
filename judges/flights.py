"""One run of work for all who want its result. Cancelling one of them does not cancel the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")

GRACE_S = 0.1
"""Seconds that a cancelled call may take to end: a client that swallows its cancellation must not hold up a batch."""


class Flight(Generic[Result]):
    """Owns one task. Every waiter has its own deadline; the last one to leave cancels the task.

    Use: `Flight(work, on_end=...)`, then `await flight.wait(deadline)` as often as there are callers.
    """

    def __init__(
        self, work: Callable[[Flight[Result]], Coroutine[Any, Any, Result]], *, on_end: Callable[[], None]
    ) -> None:
        self.deadline = float("-inf")
        """The latest of the waiters' deadlines, on the event loop's clock."""
        self._num_waiting = 0
        self._on_end = on_end
        self._task = asyncio.get_running_loop().create_task(work(self))
        self._task.add_done_callback(self._note_end)

    async def wait(self, deadline: float) -> Result:
        """The result, or what the work raised.

        Raises:
            TimeoutError: the deadline came first.
        """
        self.deadline = max(self.deadline, deadline)
        self._num_waiting += 1
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.shield(self._task)
        finally:
            self._num_waiting -= 1
            if self._num_waiting == 0 and not self._task.done():
                self._on_end()  # at once: nobody may join a flight that is being cancelled
                self._task.cancel()
                await asyncio.wait([self._task], timeout=GRACE_S)

    def _note_end(self, task: asyncio.Task[Result]) -> None:
        self._on_end()
        if not task.cancelled():
            task.exception()  # seen: a waiter that has left must not make the event loop complain
