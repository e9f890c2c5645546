"""An event loop in a thread of its own, so that a plain iterator can be fed by requests that run side by side."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Item = TypeVar("Item")


class LoopThread:
    """Owns the thread and the loop. `run` waits for a coroutine; `start` and `end` have one run in the background."""

    def __init__(self) -> None:
        """It runs from here on, until `close`."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-server-engine", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """False once it is closed."""
        return self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, Item]) -> Item:
        """What it returns; an interrupted caller ends it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def start(
        self, work: Coroutine[Any, Any, None], told: Callable[[BaseException | None], None]
    ) -> asyncio.Task[None]:
        """Begin it; `told` hears of its end: None, or what went wrong first."""

        async def begin() -> asyncio.Task[None]:
            task = asyncio.create_task(work)
            task.add_done_callback(lambda ended: told(None if ended.cancelled() else _first(ended.exception())))
            return task

        return self.run(begin())

    def end(self, task: asyncio.Task[None]) -> None:
        """Cancel it, if it still runs, and wait until it has ended."""

        async def cancel() -> None:
            task.cancel()
            await asyncio.wait([task])

        if self.is_running:
            self.run(cancel())

    def close(self) -> None:
        """End what runs, then the thread. May be called twice."""
        if not self.is_running:
            return
        self.run(self._wind_up())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _wind_up(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_default_executor()  # names of hosts are looked up there


def _first(error: BaseException | None) -> BaseException | None:
    """The first error of a group of tasks."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
