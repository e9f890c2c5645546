"""The watch as a table that is drawn anew with every look."""

from __future__ import annotations

from types import TracebackType

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from grpo.diagnostics.watch import Watched, hint
from grpo.diagnostics.watch_plan import PlannedRun
from grpo.runtime.machine import MachineFacts

UNNAMED = (
    "nvidia-smi names no process of this run: it has not come to a card yet, runs on the CPU, or has its process ids "
    "in another namespace (start the watch inside its container)"
)


class WatchDisplay:
    """A live table on a terminal; elsewhere only the last one is printed, at the end."""

    def __init__(self, facts: MachineFacts, planned: PlannedRun | None = None, console: Console | None = None) -> None:
        """Args: facts: of the machine, which say how much there is. planned: nothing stands beside it where None."""
        console = console or Console()
        self._host_bytes = min(facts.host_bytes, facts.limit_bytes or facts.host_bytes)
        self._cards = {gpu.uuid: gpu.total_bytes for gpu in facts.gpus}
        self._planned = planned or PlannedRun()
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
        for column in ("phase", "host memory, peak", "planned", "on the fullest card, peak", "planned", "looks"):
            table.add_column(column, justify="left" if column == "phase" else "right")
        for seen in watched.phases.values():
            plan = self._planned.phases.get(seen.phase)
            table.add_row(
                seen.phase,
                _gib(seen.peak.host_bytes),
                _gib(plan and plan.host_bytes),
                _gib(seen.peak.device_bytes),
                _gib(plan and plan.device_bytes),
                str(seen.samples),
            )
        card = next((seen.peak.card for seen in watched.phases.values() if seen.peak.card), "")
        table.add_row("there is", _gib(self._host_bytes), "", _gib(self._cards.get(card)), "", "", style="dim")
        advice = hint(watched, host_bytes=self._host_bytes, cards=self._cards, planned=self._planned.phases)
        notes = [self._planned.note, "" if card or not self._cards else UNNAMED]
        parts = [Text(note, style="dim") for note in notes if note] + ([Text(advice, style="yellow")] if advice else [])
        self._live.update(Group(table, *parts), refresh=True)


def _gib(number: int | None) -> str:
    return "-" if number is None else f"{number / 2**30:.2f} GiB"
