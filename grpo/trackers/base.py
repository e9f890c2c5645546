"""What a tracker is to a run. metrics.jsonl is no tracker: it is always written, and the run stands on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Tracker(Protocol):
    """Shows a run's figures somewhere else. All calls come from one thread of its own, in this order: start once,
    log for each step, finish once. Any of them may raise, and may take as long as it likes."""

    @property
    def name(self) -> str:
        """What a warning calls it."""
        ...

    def start(self) -> None:
        """Connect, open files."""
        ...

    def log(self, figures: Mapping[str, float], *, step: int) -> None:
        """A finished step's figures."""
        ...

    def finish(self) -> None:
        """Hand over what is left. Not called where `start` failed."""
        ...
