"""All of the doctor's checks, in the order in which a person reads them."""

from __future__ import annotations

from pathlib import Path

from grpo.config import RunConfig
from grpo.diagnostics.doctor.installation import check_installation
from grpo.diagnostics.doctor.ports import check_ports
from grpo.diagnostics.doctor.recipe import check_recipe
from grpo.diagnostics.doctor.resources import check_resources
from grpo.diagnostics.findings import Finding
from grpo.runtime.machine import Machine


def examine(
    machine: Machine, config: RunConfig | None, *, asks_judges: bool = True, ranks: int = 1, working_dir: Path
) -> list[Finding]:
    """Look at a machine, and at a recipe on it. Reads no weights, trains nothing, writes nothing.

    Args:
        machine: this one, or one that is presented.
        config: None: the machine alone.
        asks_judges: probe each judge, a dozen calls.
        ranks: processes that are going to be launched.
        working_dir: where the command was started.
    """
    facts = machine.facts()
    findings = [*check_installation(machine, facts), *check_resources(machine, facts, config, ranks=ranks)]
    findings += check_ports(machine, config, ranks=ranks)
    if config is not None:
        findings += check_recipe(machine, facts, config, asks_judges=asks_judges, working_dir=working_dir)
    return findings
