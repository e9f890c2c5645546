"""The command line: parse, check, import late, call. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from grpo.commands.arguments import Overrides, check_writable, recipe_of
from grpo.commands.doctor import doctor
from grpo.commands.judge import judge
from grpo.commands.memory import bench, plan
from grpo.commands.verify import verify
from grpo.runtime.torch_environment import torch_environment

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
OTHERS_GRACE_S = 5.0
"""Seconds that the main process has to tell an error that all processes of a run meet, before another ends."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="GRPO fine-tuning of language models against several objectives.",
)

app.add_typer(judge, name="judge")
app.add_typer(bench, name="bench")
app.command()(doctor)
app.command()(verify)


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe's name, a YAML file, or with --resume a run directory.")
    ],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run directory's last checkpoint.")] = False,
) -> None:
    """Train a model by a recipe."""
    from grpo.recipe_loader import load_recipe
    from grpo.runtime.launch import start_missing_ranks

    start_missing_ranks()

    config = load_recipe(recipe_of(recipe), [*_output_dir_of(recipe, resume=resume), *(overrides or [])])
    from grpo.diagnostics.display import make_display
    from grpo.diagnostics.report import write_report
    from grpo.errors import InputError, StorageError
    from grpo.metrics import observed_kl_name
    from grpo.objectives import held_kl
    from grpo.trainer import Trainer

    betas = {name: objective.beta for name, objective in config.objectives.items()}
    bands = {name: held_kl(beta) for name, beta in betas.items()}
    observed = {name: observed_kl_name(name, beta.observed) for name, beta in betas.items()}
    with _told_when_stopped(config.output_dir), make_display(bands, observed) as display:
        trainer = Trainer(config, observer=display)
        result = trainer.run(resume=resume)
        if not trainer.is_main:  # one process talks to the person and writes the report
            raise typer.Exit(EXIT_INTERRUPTED if result.was_interrupted else 0)
        paths = [("policy", str(result.checkpoint.folder / "policy")), ("checkpoint", str(result.checkpoint.folder))]
        display.finish(dict(result.evaluation) or None, result.evaluation.get("examples"), paths)
        if result.was_interrupted:
            display.note(
                f"interrupted after step {result.checkpoint.step}; go on with: grpo train {result.run_dir} --resume"
            )
        try:  # last: a report that fails costs nothing of what is above
            display.finish(None, None, [("report", str(write_report(result.run_dir)))])
        except (InputError, StorageError, OSError) as exc:
            print(
                f"error: the report was not written: {exc}\nThe run itself is whole; once this is put right: "
                f"grpo report {result.run_dir}",
                file=sys.stderr,
            )
            raise typer.Exit(EXIT_FAILED) from exc
    if result.was_interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


@app.command("eval")
def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run directory, or a model's name or folder.")
    ],
    overrides: Overrides = None,
    recipe: Annotated[
        str, typer.Option(help="For a model: the recipe whose held-out prompts and rewards are used.")
    ] = "quickstart",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Score a run's newest checkpoint, or a model, on held-out prompts."""
    from grpo.diagnostics.display import make_display
    from grpo.durable_files import write_result
    from grpo.evaluation_run import evaluate_target
    from grpo.runtime.launch import start_missing_ranks

    start_missing_ranks()

    check_writable("--json", json_file)
    with make_display({}, {}) as display:
        result = evaluate_target(target, recipe=recipe, overrides=overrides or [])
        if not _is_main():
            return
        display.finish(result, None, [])
        if json_file is not None:
            write_result(json_file, json.dumps(result, indent=1, allow_nan=False))


@app.command()
def score(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file; objectives alone will do.")],
    completions: Annotated[
        Path, typer.Argument(help="JSON lines or CSV with prompt and completion, such as a run's completions.jsonl.")
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Write every row with its verdicts to this file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the means to this file.")] = None,
    audit: Annotated[Path | None, typer.Option(help="Append what judges were asked and answered to this file.")] = None,
    eval_rewards: Annotated[bool, typer.Option(help="Ask the objectives' eval_rewards.")] = False,
) -> None:
    """Score a file of completions by a recipe's objectives. Trains nothing."""
    from grpo.diagnostics.score_tables import show_scores
    from grpo.durable_files import write_result
    from grpo.recipe_loader import load_recipe
    from grpo.score_file import complete_for_scoring, min_valid_shortage, score_file, summarise_scores, write_scores

    config = load_recipe(recipe_of(recipe), overrides or [], complete=complete_for_scoring)
    for option, path in (("--out", out), ("--json", json_file), ("--audit", audit)):
        check_writable(option, path)
    rows = score_file(config, completions.expanduser().absolute(), for_evaluation=eval_rewards, audit_path=audit)
    summary = summarise_scores(rows)
    show_scores(summary)
    if out is not None:
        write_scores(out, rows)
    if json_file is not None:
        write_result(json_file, json.dumps(summary, indent=1, allow_nan=False))
    if short := min_valid_shortage(summary, config):
        print(f"error: {short}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write a run's report.html again."""
    from grpo.diagnostics.report import write_report

    typer.echo(str(write_report(run.expanduser().absolute())))


app.command()(plan)


def _output_dir_of(name: str, *, resume: bool) -> list[str]:
    """A run directory that was moved or copied is resumed where it lies now, not where it was made."""
    folder = Path(name).expanduser().absolute()
    return (
        [f"output_dir={json.dumps(str(folder), ensure_ascii=False)}"]
        if resume and (folder / "config.yaml").is_file()
        else []
    )


@contextmanager
def _told_when_stopped(run_dir: Path) -> Iterator[None]:
    """A second Ctrl-C ends the command at once, saying what is there; typer alone would end it without a word."""
    try:
        yield
    except KeyboardInterrupt as exc:
        from grpo.keeping import what_is_there

        print(f"stopped at once. {what_is_there(run_dir)}", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from exc


def _is_main() -> bool:
    """Whether this process, of those that a launcher started, is the one that talks to the person."""
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Entry point: errors raised on purpose become one message and an exit code; others keep their traceback."""
    os.environ.update(torch_environment(os.environ))
    from grpo.errors import GrpoError, InputError, RankLost

    try:
        app()
    except GrpoError as exc:
        error = "error"
        if not _is_main():
            # it is raised on every rank, and the main one tells it; a launcher ends that one when another has ended, so
            # this one waits to be ended itself. If nobody does, the error is its own
            if not isinstance(exc, RankLost):  # the main one may be the lost one
                time.sleep(OTHERS_GRACE_S)
            error = f"error in process {os.environ['RANK']}"
        print("\n".join([f"{error}: {exc}", *getattr(exc, "__notes__", [])]), file=sys.stderr)
        if isinstance(exc, RankLost):
            # all is closed and told; taking broken connections down with the interpreter may abort it (SIGABRT)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_FAILED)
        sys.exit(EXIT_BAD_INPUT if isinstance(exc, InputError) else EXIT_FAILED)
    except KeyboardInterrupt:
        print("stopped at once", file=sys.stderr)  # before or after typer, which turns the others into exit code 130
        sys.exit(EXIT_INTERRUPTED)
