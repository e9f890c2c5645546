"""Tables of scores: of a file of completions, and BBQ's accuracy and bias. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo.diagnostics.printable import printable

_MISSING = "-"


def show_scores(summary: Mapping[str, Mapping[str, Any]], console: Console | None = None) -> None:
    """Print what `grpo.score_file.summarise_scores` gives."""
    console = console or Console()
    table = _table("Scores, mean [95% interval over prompts]", "objective", "scored", "unscored", "mean")
    for name, own in summary.items():
        interval = f"{own['mean']:.3f} [{own['low']:.3f}, {own['high']:.3f}]" if "mean" in own else _MISSING
        table.add_row(_text(name, console), str(own["n"]), str(own["unscored"]), interval)
        for kind, mean in own.get("kinds", {}).items():
            table.add_row(_text(f"  {kind}", console), "", "", f"{mean:.3f}")
    console.print(table)
    for name, own in summary.items():
        for cause, count in own.get("causes", {}).items():
            console.print(_text(f"no verdict for {name}, {count} x: {cause}", console))


def show_bbq(bbq: Mapping[str, Mapping[str, Mapping[str, Any]]], console: Console) -> None:
    """Print eval.json's "bbq": before or after -> category -> scores."""
    figures = ("accuracy_ambiguous", "accuracy_disambiguated", "bias_ambiguous", "bias_disambiguated")
    table = _table(
        "BBQ: accuracy; bias from -1 to 1, where 1 is always the stereotype",
        "category",
        "",
        *(name.replace("_", " ") for name in figures),
        "unread",
    )
    for when, categories in bbq.items():
        for category, scores in categories.items():
            cells = [_MISSING if scores[name] is None else f"{scores[name]:.3f}" for name in figures]
            table.add_row(_text(category, console), when, *cells, str(scores["num_unread"]))
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    return table


def _text(value: object, console: Console) -> Text:
    return Text(printable(value, console.encoding))
