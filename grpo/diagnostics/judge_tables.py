"""What `grpo judge` prints: a plan, a calibration. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo.diagnostics.printable import printable

_MISSING = "-"


def show_plan(plan: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `grpo.judge_runs.plan_judges` gives."""
    console = console or Console()
    columns = ("calls", "tokens in", "tokens out", "cost", "at most")
    table = _table("Judges, for one step (eval: one evaluation)", "judge", "asked", *columns, "s", num_left=2)
    for entry in plan["judges"]:
        judge = entry["objective"] if entry["purpose"] == "train" else f"{entry['objective']} eval"
        table.add_row(
            _text(judge, console),
            _text(f"{entry['endpoint']} {entry['mode']}", console),
            *_amounts(entry),
            f"{entry['seconds']:.1f}",
        )
    console.print(table)
    run = plan["run"]
    totals = _table("The run", *columns, "minutes", num_left=0)
    totals.add_row(*_amounts(run), f"{run['minutes']:.1f}")
    console.print(totals)
    assumed = plan["assumptions"]
    console.print(
        f"Assumed: {assumed['steps']} steps and {assumed['evaluations']} evaluations; completions of "
        f"{assumed['completion_tokens']} tokens; {assumed['reply_tokens']} tokens a verdict; {assumed['latency_s']:g} "
        "s a call; every call made once, and no two completions equal.",
        markup=False,
    )
    if assumed["resample_rounds"]:
        console.print(f"Dynamic sampling may add up to {assumed['resample_rounds']} times a step's calls.")
    for warning in plan["warnings"]:
        console.print(_text(f"warning: {warning}", console))


def show_calibration(result: Mapping[str, Any], *, path: Path | None = None, console: Console | None = None) -> None:
    """Print what `grpo.judge_runs.calibrate_judge` gives. Args: path: where it was written, if it was."""
    console = console or Console()
    table = _table(f"Judge {result['rubric']} by {', '.join(result['models'])}", "", "", num_left=1)
    table.add_row("rows", str(result["num_rows"]))
    table.add_row("with a verdict", str(result["num_scored"]))
    for name in ("agreement", "kappa"):
        one = result[name]
        table.add_row(
            f"{name} [95% interval]",
            _MISSING if one is None else f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]",
        )
    for name, label in (("flip_rate", "flips when asked again"), ("score_length_correlation", "score with length")):
        table.add_row(label, _MISSING if result[name] is None else f"{result[name]:.3f}")
    confusion = result["confusion"]
    for name in ("true_positive", "false_positive", "false_negative", "true_negative"):
        table.add_row(name.replace("_", " "), str(confusion[name]))
    for kind, count in result["failures"].items():
        table.add_row(f"failed: {kind}", str(count))
    table.add_row("cost", _MISSING if result["cost"] is None else f"{result['cost']:.4g}")
    console.print(table)
    written = "" if path is None else f"; written to {path}"
    console.print(_text(f"threshold {result['threshold']:g}{written}", console))


def _amounts(entry: Mapping[str, Any]) -> list[str]:
    money = [_MISSING if entry[key] is None else f"{entry[key]:.4g}" for key in ("cost", "cost_at_most")]
    return [f"{entry[key]:,.0f}" for key in ("calls", "prompt_tokens", "reply_tokens")] + money


def _table(title: str, *columns: str, num_left: int) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < num_left else "right")
    return table


def _text(value: str, console: Console) -> Text:
    return Text(printable(value, console.encoding))
