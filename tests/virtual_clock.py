"""An event loop whose clock jumps to the next timer instead of waiting: hours of limits pass in milliseconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs timers in their order. For code without sockets and threads: nothing outside can wake it."""

    def __init__(self) -> None:
        self._now = 1000.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        """Let time pass, and a whisker more, so that a timer is never a rounding error early."""
        self._now += seconds + 1e-9


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("every task waits for something that no timer brings: a deadlock")
        if not ready and timeout:
            self._loop.jump(timeout)
        return ready


def run_virtually(main: Coroutine[Any, Any, Result]) -> Result:
    """As `asyncio.run`, on virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
