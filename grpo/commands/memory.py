"""`grpo plan` and `grpo bench memory`: parse, check, import late, call, print."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from grpo.commands.arguments import Overrides, check_writable, recipe_of
from grpo.runtime.memory_hardware import CARDS

if TYPE_CHECKING:
    from grpo.bench.cases import MemoryCase

bench = typer.Typer(no_args_is_help=True, help="What a machine does: measured, beside what was predicted.")


def plan(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, a YAML file, or a run directory.")],
    overrides: Overrides = None,
    gpu: Annotated[
        str,
        typer.Option(
            "--gpu",
            help=f"The card: {', '.join(CARDS)}; cuda:GIB, another with so much memory; cpu:GIB, no card, and so much "
            "of the host's memory.",
        ),
    ] = "a100-40g",
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of the longest prompt. Left out: read from the recipe's prompts, where they and the model's "
            "tokenizer are at hand; else one is assumed, and told.",
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the plan to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw it: a PNG.")] = None,
) -> None:
    """Say what a recipe will take in memory, phase by phase, and what fits. Loads no weights, needs no GPU.

    It is the memory of one process and its card; with several, each takes at most as much.
    """
    from grpo.diagnostics.memory_tables import show_memory_plan
    from grpo.durable_files import write_result
    from grpo.recipe_loader import load_recipe
    from grpo.runtime.memory import plan as plan_memory
    from grpo.runtime.memory_hardware import hardware_named
    from grpo.runtime.memory_model import read_shape
    from grpo.runtime.prompt_lengths import PromptLength, longest_prompt

    for option, path in (("--json", json_file), ("--plot", plot)):
        check_writable(option, path)
    config = load_recipe(recipe_of(recipe), overrides or [])
    hardware, shape = hardware_named(gpu), read_shape(config.model, config.base_dir)  # what is wrong is told at once
    given = None if prompt_tokens is None else PromptLength(tokens=prompt_tokens, source="as given")
    length = given or longest_prompt(config)
    found = plan_memory(config, hardware, prompt_tokens=length.tokens, shape=shape)
    if json_file is not None:
        figures: dict[str, Any] = {
            **asdict(found),
            "prompt_source": length.source,
            "fits": found.fits,
            "peak_bytes": found.peak_bytes,
            "host_peak_bytes": found.host_peak_bytes,
            "phases": [asdict(phase) | {"peak_bytes": phase.peak_bytes} for phase in found.phases],
        }
        write_result(json_file, json.dumps(figures, indent=1) + "\n")
    if plot is not None:
        from grpo.diagnostics.memory_plots import plan_figure

        write_result(plot, plan_figure(found))
    show_memory_plan(found, prompts=length.source)


@bench.command()
def memory(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Whose memory is measured.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Three cases in place of all.")] = False,
    case: Annotated[list[str] | None, typer.Option(help="Only this one, again; may be given more than once.")] = None,
    limit_s: Annotated[
        float, typer.Option(help="Begin no case after so many seconds; the same command goes on.", min=0)
    ] = math.inf,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file; those that it holds are kept.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them: a PNG.")] = None,
) -> None:
    """Measure a grid of configurations, each in its own process, beside what `grpo plan` says of it.

    Exits 1 where a prediction is off by more than a tenth.
    """
    from grpo.bench.memory import measure_cases
    from grpo.bench.memory_figures import as_json, held_figures, misses
    from grpo.diagnostics.memory_tables import amount, show_memory_bench
    from grpo.durable_files import write_result

    for option, path in (("--json", json_file), ("--plot", plot)):
        check_writable(option, path)
    held = held_figures(json_file, device=device) if json_file is not None else {}
    due = [each for each in _chosen_cases(case, is_quick=quick) if case or each.name not in held]
    end, command = time.monotonic() + limit_s, " ".join(["grpo", *sys.argv[1:]])
    left = {each.name for each in due}
    for measured in measure_cases(due, device=device):
        held[measured.case.name] = measured
        left.remove(measured.case.name)
        done = f"{measured.case.name}: {amount(measured.peak_bytes)}, predicted {amount(measured.predicted_bytes)}"
        print(f"{done} ({measured.error:+.1%})", file=sys.stderr, flush=True)
        _write_figures(as_json(held.values(), device=device, command=command), json_file)
        if time.monotonic() > end:
            break
    figures = as_json(held.values(), device=device, command=command)
    _write_figures(figures, json_file)
    if plot is not None:
        from grpo.diagnostics.memory_plots import bench_figure

        write_result(plot, bench_figure(figures["cases"]))
    show_memory_bench(figures["cases"])
    problems = misses(figures["cases"])
    if left:
        problems.append(f"{len(left)} cases left at --limit-s; the same command goes on")
    if problems:
        print("\n".join(problems), file=sys.stderr)
        raise typer.Exit(1)


def _write_figures(figures: dict[str, Any], path: Path | None) -> None:
    from grpo.durable_files import write_result

    if path is not None:
        write_result(path, json.dumps(figures, indent=1, allow_nan=False) + "\n")


def _chosen_cases(names: list[str] | None, *, is_quick: bool) -> list[MemoryCase]:
    """Those of the grid; where none are named, without what needs a package that is not installed."""
    from grpo.bench.cases import CASES, QUICK
    from grpo.errors import ConfigError

    wanted = names or (QUICK if is_quick else [each.name for each in CASES])
    if unknown := sorted(set(wanted) - {each.name for each in CASES}):
        raise ConfigError(f"--case {unknown[0]!r} is not among: {'; '.join(each.name for each in CASES)}.")
    chosen = [each for each in CASES if each.name in wanted]
    absent = [each for each in chosen if each.needs is not None and find_spec(each.needs) is None]
    if absent and names:
        raise ConfigError(f"--case {absent[0].name!r} needs {absent[0].needs}, which is not installed.")
    if absent:
        print(f"left out, for want of bitsandbytes: {'; '.join(each.name for each in absent)}", file=sys.stderr)
    return [each for each in chosen if each not in absent]
