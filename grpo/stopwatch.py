"""Wall time by stage, in seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """`with stopwatch("rollout"): ...` adds to that stage's time; `elapsed` is read at the end."""

    def __init__(self) -> None:
        self.elapsed: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - start)

    def add(self, stage: str, seconds: float) -> None:
        """A stage that is timed elsewhere."""
        self.elapsed[stage] = self.elapsed.get(stage, 0.0) + seconds
