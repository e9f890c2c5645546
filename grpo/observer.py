"""Who watches a run from outside: the command line's table, a notebook, a test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Observer(Protocol):
    """Sees a run from outside; the command line shows it in a table."""

    def start(self, title_rows: list[tuple[str, str]]) -> None:
        """The run's facts, before its first step."""
        ...

    def step(self, row: Mapping[str, Any], *, total_steps: int, seconds_left: float | None) -> None:
        """A finished step's line of metrics.jsonl."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line."""
        ...

    def warn(self, text: str) -> None:
        """Something to look into."""
        ...
