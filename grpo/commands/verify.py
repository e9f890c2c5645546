"""`grpo verify`: parse, check, import late, call, print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from grpo.commands.arguments import Overrides, check_writable, recipe_of


def verify(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, a YAML file, or a run directory.")],
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(min=1, help="Sample and score so many.")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the findings to this file.")] = None,
) -> None:
    """Try a recipe out on its real model and one real batch: gradients, step, engine, rewards. Writes nothing."""
    check_writable("--json", json_file)

    from grpo.recipe_loader import load_recipe

    config = load_recipe(recipe_of(recipe), overrides or [])
    from grpo.diagnostics.finding_tables import show_findings
    from grpo.diagnostics.findings import findings_as_json, worst_status
    from grpo.diagnostics.verify import verify as verified
    from grpo.durable_files import write_result

    def note(text: str) -> None:
        print(f"{text} ...", file=sys.stderr)

    findings = verified(config, num_prompts=prompts, note=note)
    show_findings(findings, title=f"Verify: {recipe}")
    if json_file is not None:
        write_result(json_file, json.dumps(findings_as_json(findings), indent=1) + "\n")
    if worst_status(findings) == "failed":
        raise typer.Exit(1)
