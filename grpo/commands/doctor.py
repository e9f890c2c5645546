"""`grpo doctor`: parse, check, import late, call, print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grpo.commands.arguments import Overrides, check_writable, recipe_of

if TYPE_CHECKING:
    from grpo.runtime.machine import Machine


def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A shipped recipe's name, a YAML file, or a run directory; the machine alone without one."),
    ] = None,
    overrides: Overrides = None,
    judges: Annotated[bool, typer.Option(help="Probe each judge, with a dozen calls that may cost money.")] = True,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that are going to be launched.")] = 1,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="RECIPE is a run directory: show its memory by phase, beside the plan, until the run ends."
        ),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the findings to this file.")] = None,
) -> None:
    """Find what is wrong with this machine, and with a recipe on it, in seconds. Trains nothing, reads no weights."""
    from grpo.runtime.machine import ThisMachine

    check_writable("--json", json_file)
    if watch:
        _watch(recipe, json_file)
        return
    examine_and_show(ThisMachine(), recipe, overrides or [], asks_judges=judges, ranks=ranks, json_file=json_file)


def examine_and_show(
    machine: Machine,
    recipe: str | None,
    overrides: Sequence[str] = (),
    *,
    asks_judges: bool = True,
    ranks: int = 1,
    json_file: Path | None = None,
) -> None:
    """The command on any machine: this one, or one that is presented. Raises typer.Exit(1) where something failed."""
    from grpo.diagnostics.doctor.examination import examine
    from grpo.diagnostics.finding_tables import show_findings
    from grpo.diagnostics.findings import findings_as_json, worst_status
    from grpo.durable_files import write_result
    from grpo.recipe_loader import load_recipe

    config = load_recipe(recipe_of(recipe), list(overrides)) if recipe is not None else None
    findings = examine(machine, config, asks_judges=asks_judges, ranks=ranks, working_dir=Path.cwd())
    show_findings(findings, title=f"Doctor: {recipe or 'this machine'}")
    if json_file is not None:
        write_result(json_file, json.dumps(findings_as_json(findings), indent=1) + "\n")
    if worst_status(findings) == "failed":
        raise typer.Exit(1)


def _watch(run: str | None, json_file: Path | None) -> None:
    from dataclasses import asdict

    from grpo.diagnostics.watch import watch
    from grpo.diagnostics.watch_display import WatchDisplay
    from grpo.diagnostics.watch_plan import planned_run
    from grpo.durable_files import write_result
    from grpo.errors import ConfigError
    from grpo.runtime.machine import ThisMachine

    if run is None or not Path(run).expanduser().is_dir():
        raise ConfigError("--watch needs the directory of a run that is going on: grpo doctor --watch runs/mine")
    run_dir, facts, last = Path(run).expanduser().absolute(), ThisMachine().facts(), None
    planned = planned_run(run_dir, facts)
    with WatchDisplay(facts, planned) as display:
        for last in watch(run_dir):
            display.show(last)
    if json_file is not None and last is not None:
        write_result(json_file, json.dumps(asdict(last) | {"planned": asdict(planned)}, indent=1) + "\n")
