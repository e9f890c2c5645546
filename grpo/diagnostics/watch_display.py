"""The watch as a table that is drawn anew with every look. Imports no torch."""

from __future__ import annotations

from types import TracebackType

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from grpo.diagnostics.watch import Watched, hint
from grpo.runtime.machine import MachineFacts


class WatchDisplay:
    """A live table on a terminal; elsewhere only the last one is printed, at the end."""

    def __init__(self, facts: MachineFacts, console: Console | None = None) -> None:
        """Args: facts: of the machine, which say how much there is."""
        console = console or Console()
        self._host_bytes = min(facts.host_bytes, facts.limit_bytes or facts.host_bytes)
        self._device_bytes = sum(gpu.total_bytes for gpu in facts.gpus) or None
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> WatchDisplay:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, watched: Watched) -> None:
        """One look."""
        table = Table(title=f"after step {watched.step}, now: {watched.phase}", title_justify="left", box=box.SIMPLE)
        for column in ("phase", "host memory, peak", "device memory, peak", "looks"):
            table.add_column(column, justify="left" if column == "phase" else "right")
        for seen in watched.phases.values():
            table.add_row(seen.phase, _gib(seen.peak.host_bytes), _gib(seen.peak.device_bytes), str(seen.samples))
        table.add_row("there is", _gib(self._host_bytes), _gib(self._device_bytes), "", style="dim")
        advice = hint(watched, host_bytes=self._host_bytes, device_bytes=self._device_bytes)
        parts = [table, Text(advice, style="yellow")] if advice else [table]
        self._live.update(Group(*parts), refresh=True)


def _gib(number: int | None) -> str:
    return "-" if number is None else f"{number / 2**30:.2f} GiB"
