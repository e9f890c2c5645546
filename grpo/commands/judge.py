"""`grpo judge plan` and `grpo judge calibrate`: parse, check, import late, call, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from grpo.commands.arguments import Overrides, check_writable, recipe_of

judge = typer.Typer(no_args_is_help=True, help="Judges, looked at without training: what they cost, how good they are.")


@judge.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, a YAML file, or a run directory.")],
    overrides: Overrides = None,
    latency_s: Annotated[float, typer.Option(min=0.0, help="Seconds that one judge call is assumed to take.")] = 2.0,
    reply_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that a judge is assumed to write about one completion.")
    ] = 100,
    completion_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a completion; rollout.max_new_tokens where not given.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the plan to this file.")] = None,
) -> None:
    """Count what a recipe's judges will take: calls, tokens, money, minutes. Asks nobody."""
    from grpo.diagnostics.judge_tables import show_plan
    from grpo.durable_files import write_result
    from grpo.judge_runs import Assumptions, plan_judges
    from grpo.recipe_loader import load_recipe

    check_writable("--json", json_file)
    config = load_recipe(recipe_of(recipe), overrides or [])
    assumed = Assumptions(
        latency_s=latency_s,
        reply_tokens=reply_tokens,
        completion_tokens=completion_tokens or config.rollout.max_new_tokens,
    )
    result = plan_judges(config, assumed)
    show_plan(result)
    if json_file is not None:
        write_result(json_file, json.dumps(result, indent=1, allow_nan=False) + "\n")


@judge.command()
def calibrate(
    source: Annotated[
        str,
        typer.Argument(metavar="RECIPE_OR_CONFIG", help="A recipe with a judge, or a YAML file of a judge's own keys."),
    ],
    gold: Annotated[
        Path, typer.Argument(help="JSON lines: question, completion, reference (optional), label or score.")
    ],
    overrides: Overrides = None,
    format: Annotated[
        Literal["rows", "halueval"], typer.Option(help="halueval: HaluEval's general_data.json, as it is.")
    ] = "rows",
    objective: Annotated[str | None, typer.Option(help="Whose judge, where a recipe has several.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="A score of at least so much is good; the scale's middle where not given.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Verdicts on each row; 2 or more show how steady it is.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Take so many rows, drawn by --seed.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawn rows and the bootstrap.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where the result goes; calibration-<rubric>.json where not given.")
    ] = None,
) -> None:
    """Ask a judge about completions that people have judged, and compare."""
    from grpo.diagnostics.judge_tables import show_calibration
    from grpo.durable_files import write_result
    from grpo.errors import StorageError, TooFewVerdicts
    from grpo.judge_runs import calibrate_judge, find_judge

    check_writable("--json", json_file)
    found = find_judge(recipe_of(source), overrides or [], objective=objective)
    path = json_file or Path(f"calibration-{found.rubric.name}.json")
    check_writable("--json", path)
    result = calibrate_judge(
        found, gold.expanduser(), format=format, threshold=threshold, repeats=repeats, limit=limit, seed=seed
    )
    try:
        write_result(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    except StorageError:
        show_calibration(result)  # paid for already
        raise
    show_calibration(result, path=path)
    if result["num_scored"] == 0:
        raise TooFewVerdicts(f"no row got a verdict: {result['failures']}. The last cause: {result['last_failure']}")
