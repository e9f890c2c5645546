"""What a run prints: a live table on a terminal, one plain line a step elsewhere. Imports no torch.

Comes in: rows of metrics.jsonl and eval.json. The trainer does not know this module; the cli hands a display to it.
Model output is untrusted text: it is never read as markup, and its control characters never reach the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo import metrics as names
from grpo.diagnostics.printable import printable
from grpo.diagnostics.score_tables import show_bbq

Band = tuple[float, float]
Row = Mapping[str, Any]

_PLAIN_WIDTH = 160  # a log file has no width of its own
_EXAMPLES_SHOWN = 3
_TEXT_SHOWN = 600  # characters of one completion in the table at the end
_MISSING = "-"


class Display(Protocol):
    """Shows one run. A context manager, so that the terminal is given back when the run raises.

    start -> step, note, warn in any order -> finish.
    """

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def start(self, title_rows: list[tuple[str, str]]) -> None:
        """Prints the facts of the run, one (name, value) a line."""
        ...

    def step(self, row: Row, *, total_steps: int, seconds_left: float | None) -> None:
        """Shows a row of metrics.jsonl; any name but "step" may be missing from it."""
        ...

    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def finish(self, eval: Row | None, examples: Sequence[Row] | None, paths: list[tuple[str, str]]) -> None:
        """Prints the held-out table, three completions before and after, and where everything is.

        Args:
            eval: eval.json; None without one. Only one of "before" and "after" need be there.
            examples: each with "prompt" and "before", "after" or both.
            paths: (name, path).
        """
        ...


def make_display(
    bands: Mapping[str, Band | None], observed: Mapping[str, str], console: Console | None = None
) -> Display:
    """The display that fits where the output goes: live on a terminal, plain in a pipe, a file or a dumb terminal.

    Args:
        bands: objective -> (low, high) its beta controller holds the KL in, a target being both; None where it holds
            nothing; in display order.
        observed: objective -> name of the metric that its controller observes (`metrics.observed_kl_name`).
        console: where to print; standard output by default.
    """
    if console is None:
        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, _PLAIN_WIDTH)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(bands, observed, console)
    return PlainDisplay(bands, observed, console)


def band_position(kl: float | None, band: Band | None) -> str | None:
    """ "lo" (below the band), "in" or "hi" (above it); None where one of the two is missing, and for a target."""
    if kl is None or kl != kl or band is None or band[0] == band[1]:  # NaN is in no band; nothing is inside a target
        return None
    return "lo" if kl < band[0] else "hi" if kl > band[1] else "in"


class _Printed:
    """What both displays share: facts, notes, and the tables at the end. Owns the console."""

    def __init__(self, bands: Mapping[str, Band | None], observed: Mapping[str, str], console: Console) -> None:
        self._bands = dict(bands)
        self._observed = dict(observed)
        self._console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def note(self, text: str) -> None:
        self._line(Text(self._safe(text)))

    def warn(self, text: str) -> None:
        self._line(Text.assemble(("warning: ", "bold yellow"), self._safe(text)))

    def finish(self, eval: Row | None, examples: Sequence[Row] | None, paths: list[tuple[str, str]]) -> None:
        self._stop()
        if eval and (eval.get("before") or eval.get("after")):
            self._console.print(self._held_out_table(eval))
        if eval and eval.get("bbq"):
            show_bbq(eval["bbq"], self._console)
        if examples:
            self._console.print(self._examples_table(examples[:_EXAMPLES_SHOWN]))
        for name, path in paths:
            self._line(Text.assemble((f"{self._safe(name)}: ", "bold"), self._safe(path)))

    def _stop(self) -> None:
        """Gives the terminal back; called again it does nothing."""

    def _line(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)  # a path that is broken over two lines cannot be copied

    def _safe(self, text: object) -> str:
        return printable(text, self._console.encoding)

    def _observed_kl(self, row: Row, objective: str) -> float | None:
        return row.get(self._observed.get(objective, names.kl_name(objective)))

    def _held_out_table(self, eval: Row) -> Table:
        phases = [phase for phase in ("before", "after") if eval.get(phase)]
        table = Table(title="Held-out reward, mean [95% interval]", title_justify="left", box=box.SIMPLE)
        table.add_column("objective")
        table.add_column("prompts", justify="right")
        columns = [*phases, "difference"] if len(phases) == 2 else phases
        for column in columns:
            table.add_column(column, justify="right")
        for objective in dict.fromkeys(o for phase in phases for o in eval[phase]):
            entries = {column: (eval.get(column) or {}).get(objective) or {} for column in columns}
            count = next((e["n"] for e in entries.values() if e.get("n") is not None), None)
            table.add_row(
                Text(self._safe(objective), style="bold"),
                _MISSING if count is None else str(count),
                *[_interval(entry, signed=column == "difference") for column, entry in entries.items()],
            )
            for kind in dict.fromkeys(k for phase in phases for k in entries[phase].get("kinds") or {}):
                means = [(entries[phase].get("kinds") or {}).get(kind) for phase in phases]
                there = [mean for mean in means if mean is not None]
                change = there[1] - there[0] if len(there) == 2 else None
                cells = [_number(mean, ".3f") for mean in means] + [_number(change, "+.3f")] * (len(phases) - 1)
                table.add_row(Text("  " + self._safe(kind)), "", *cells)
        return table

    def _examples_table(self, examples: Sequence[Row]) -> Table:
        phases = [phase for phase in ("before", "after") if any(e.get(phase) is not None for e in examples)]
        table = Table(
            title="The same prompts" + (", before and after" if len(phases) == 2 else ""),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_lines=True,
        )
        for column in ("prompt", *phases):
            table.add_column(column, ratio=1, overflow="fold")
        for example in examples:
            prompt = Text(self._safe(_cut(example.get("prompt"))))
            if example.get("reference") is not None:
                prompt.append(f"\nreference: {self._safe(example['reference'])}", style="dim")
            table.add_row(prompt, *[Text(self._safe(_cut(example.get(phase)))) for phase in phases])
        return table


class PlainDisplay(_Printed):
    """One line a step without control characters: `step=12/30 left=4m10s | fairness reward=0.512 kl=0.0310:in ...`.

    The columns keep their order and width, so that a log can be read down and cut by a script.
    """

    def start(self, title_rows: list[tuple[str, str]]) -> None:
        width = max((len(name) for name, _ in title_rows), default=0)
        for name, value in title_rows:
            self._line(Text(f"{self._safe(name):<{width}}  {self._safe(value)}"))

    def step(self, row: Row, *, total_steps: int, seconds_left: float | None) -> None:
        progress = f"{row.get(names.STEP, _MISSING)}/{total_steps}"
        blocks = [f"step={progress:<{2 * len(str(total_steps)) + 1}} left={_duration(seconds_left):<6}"]
        for objective, band in self._bands.items():
            kl = self._observed_kl(row, objective)
            position = band_position(kl, band)
            kl_text = _number(kl, ".4f") + (f":{position}" if position else "")
            blocks.append(
                f"{self._safe(objective)} reward={_number(row.get(names.reward_mean_name(objective)), '.3f'):<6} "
                f"kl={kl_text:<{9 if band else 6}} "
                f"beta={_number(row.get(names.beta_name(objective)), '.4f'):<6} "
                f"len={_number(row.get(names.length_mean_name(objective)), '.0f'):<4}"
            )
        blocks.append(f"tok/s={_number(_tokens_per_s(row), '.0f'):<5} grad={_number(row.get(names.GRAD_NORM), '.2g')}")
        if held_out := _held_out_means(row, self._bands):  # last: the other columns keep their places
            means = (f"{self._safe(objective)}={mean:.3f}" for objective, mean in held_out.items())
            blocks.append(f"held out {' '.join(means)}")
        self._line(Text(" | ".join(blocks)))


class LiveDisplay(_Printed):
    """A table that is drawn anew in place at each step; notes scroll by above it.

    `start` opens it, `finish` or leaving the context closes it and leaves the last state in view.
    """

    def __init__(self, bands: Mapping[str, Band | None], observed: Mapping[str, str], console: Console) -> None:
        super().__init__(bands, observed, console)
        self._live: Live | None = None
        self._held_out: dict[str, float] = {}  # means of the last evaluation

    def start(self, title_rows: list[tuple[str, str]]) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, value in title_rows:
            table.add_row(Text(self._safe(name)), Text(self._safe(value)))
        self._console.print(table)
        self._show(Text("waiting for the first step", style="dim"))

    def step(self, row: Row, *, total_steps: int, seconds_left: float | None) -> None:
        self._show(self._step_view(row, total_steps, seconds_left))

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, view: Group | Text) -> None:
        if self._live is None:
            # Drawn when a step ends and only then: no thread of its own beside the training.
            self._live = Live(view, console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(view, refresh=True)

    def _step_view(self, row: Row, total_steps: int, seconds_left: float | None) -> Group:
        step = row.get(names.STEP) or 0
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"step {step}/{total_steps}", style="bold"),
            ProgressBar(total=max(total_steps, 1), completed=step, width=24),
            f"{_duration(seconds_left)} left",
            f"{_number(_tokens_per_s(row), ',.0f')} tokens/s",
            f"grad norm {_number(row.get(names.GRAD_NORM), '.3g')}",
        )
        self._held_out = _held_out_means(row, self._bands) or self._held_out
        table = Table(box=box.SIMPLE)
        table.add_column("objective")
        columns = {"reward": 6, "KL": 13, "band": 4, "beta": 6, "tokens": 6, "unscored": 8}
        for column, width in {**columns, **({"held out": 8} if self._held_out else {})}.items():
            table.add_column(column, justify="right", min_width=width)  # so that it does not jump from step to step
        for objective, band in self._bands.items():
            table.add_row(
                Text(self._safe(objective)),
                _number(row.get(names.reward_mean_name(objective)), ".3f"),
                _kl_cell(self._observed_kl(row, objective), band),
                _band_cell(band),
                _number(row.get(names.beta_name(objective)), ".4f"),
                _number(row.get(names.length_mean_name(objective)), ".0f"),
                _number(row.get(names.unscored_frac_name(objective)), ".0%"),
                *([_number(self._held_out.get(objective), ".3f")] if self._held_out else []),
            )
        return Group(head, table)


def _kl_cell(kl: float | None, band: Band | None) -> Text:
    position = band_position(kl, band)
    if position is None:
        return Text(_number(kl, ".4f"))
    word, style = {"in": ("inside", "green"), "lo": ("below", "cyan"), "hi": ("above", "bold red")}[position]
    return Text(f"{_number(kl, '.4f')} {word}", style=style)  # the word too: colour alone does not reach everyone


def _band_cell(band: Band | None) -> str:
    if band is None:
        return _MISSING
    return f"{band[0]:g} to {band[1]:g}" if band[0] < band[1] else f"target {band[0]:g}"


def _held_out_means(row: Row, objectives: Iterable[str]) -> dict[str, float]:
    """Of the evaluation after this step; empty where there was none."""
    means = {objective: row.get(names.eval_name(objective)) for objective in objectives}
    return {objective: mean for objective, mean in means.items() if mean is not None}


def _tokens_per_s(row: Row) -> float | None:
    """Completion tokens over the whole step's seconds: what the run gets, waiting included."""
    tokens, seconds = row.get(names.COMPLETION_TOKENS), row.get(names.time_name("step"))
    return tokens / seconds if tokens is not None and seconds else None


def _number(value: float | None, format: str) -> str:
    return _MISSING if value is None or value != value else f"{value:{format}}"


def _interval(entry: Row, *, signed: bool) -> str | Text:
    mean, low, high = entry.get("mean"), entry.get("low"), entry.get("high")
    sign = "+" if signed else ""
    if mean is None or mean != mean:
        return _MISSING
    if low is None or high is None:
        return f"{mean:{sign}.3f}"
    style = "green" if signed and low > 0 else "red" if signed and high < 0 else ""
    return Text(f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]", style=style)


def _duration(seconds: float | None) -> str:
    if seconds is None or seconds != seconds:
        return _MISSING
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total % 3600 // 60:02d}m"


def _cut(text: object) -> str:
    if text is None:
        return _MISSING
    text = str(text)
    return text if len(text) <= _TEXT_SHOWN else f"{text[:_TEXT_SHOWN]} ... ({len(text)} characters)"
