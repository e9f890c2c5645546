"""Findings as a table that ends with a verdict. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo.diagnostics.findings import Finding, worst_status
from grpo.diagnostics.printable import printable

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}
_VERDICTS = {
    "ok": "All is well.",
    "warning": "Nothing stands in the way; look at the warnings.",
    "failed": "Not ready.",
}


def show_findings(findings: Sequence[Finding], *, title: str, console: Console | None = None) -> None:
    """Print one row a finding, what it means and what to do under each that is not ok, and the verdict."""
    console = console or Console()
    table = Table(
        title=Text(printable(title, console.encoding)), title_justify="left", box=box.SIMPLE, show_header=False
    )
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(Text(finding.status, style=_STYLES[finding.status]), finding.check, _text(finding.what, console))
        if finding.status != "ok":
            table.add_row("", "", _text(f"means: {finding.meaning}", console))
            table.add_row("", "", _text(f"do:    {finding.remedy}", console))
    console.print(table)
    verdict = worst_status(findings)
    counts = ", ".join(
        f"{number} {status}" for status in _STYLES if (number := sum(one.status == status for one in findings))
    )
    console.print(Text(f"{_VERDICTS[verdict]} {counts}.", style=_STYLES[verdict]))


def _text(value: str, console: Console) -> Text:
    return Text(printable(value, console.encoding))
