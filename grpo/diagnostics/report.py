"""A run directory -> report.html: one file without a script or an outside resource. Imports no torch.

Completions are untrusted text: the template escapes everything, and figures enter as data URIs.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from grpo import metrics as names
from grpo.diagnostics.plots import band_of, band_text, objectives_of, run_figures
from grpo.diagnostics.printable import printable
from grpo.durable_files import write_result
from grpo.errors import InputError

_GROUPS_SHOWN = 8
_SAMPLES_SHOWN = 12
_TEXT_SHOWN = 4000  # characters of one prompt or completion

_CAPTIONS = {
    "reward": "Reward of each objective: mean over the step's completions, with one standard deviation around it.",
    "held_out": "Held-out reward during the run: greedy answers, evaluated every eval.every steps.",
    "kl": "KL to the reference. The shaded band, or the grey line, is where the controller holds what it observes.",
    "beta": "Weight of the KL penalty of each objective.",
    "length": "Completion length, in tokens.",
    "truncated": "Share of completions that were cut at rollout.max_new_tokens.",
    "time": "Where a step's time goes. A judge that works beside the rollout costs only its wait.",
    "grad_norm": "Norm of the gradient.",
}


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` of a run, finished or not, and returns its path. Atomic: an older report stays whole.

    Args:
        run_dir: holds config.yaml; metrics.jsonl, completions.jsonl and eval.json where the run came that far.
    Raises:
        InputError: the folder is not a run directory, or one of its files is damaged.
    """
    config_text, config = _read_config(run_dir)
    metrics = names.read_metrics(path) if (path := run_dir / "metrics.jsonl").exists() else []
    completions = _read_completions(run_dir / "completions.jsonl")
    evaluation = _read_eval(run_dir / "eval.json")
    objectives = objectives_of(config)
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=str(config.get("output_dir") or run_dir.name),
            facts=_facts(config, metrics, completions),
            held_out=_held_out(evaluation, list(objectives)),
            examples=evaluation.get("examples") or [],
            last_step=_last_step(metrics, objectives),
            figures=[
                {"name": name, "caption": _CAPTIONS[name], "uri": _data_uri(svg)}
                for name, svg in run_figures(metrics, config).items()
            ],
            objectives=list(objectives),
            completions=completions,
            groups_shown=_GROUPS_SHOWN,
            config_text=config_text,
        )
    )
    path = run_dir / "report.html"
    write_result(path, html.encode("utf-8", errors="replace"))  # JSON may hold half a surrogate pair
    return path


# --- reading ---


def _read_config(run_dir: Path) -> tuple[str, dict[str, Any]]:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise InputError(
            f"{run_dir} is not a run directory: it has no config.yaml. Expected the output_dir of `grpo train` or "
            "`grpo eval`, which holds config.yaml, metrics.jsonl, completions.jsonl and eval.json."
        )
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise InputError(f"{path} cannot be read: {exc}. Expected the resolved config that the run wrote.") from exc
    if not isinstance(config, dict) or not isinstance(config.get("objectives"), dict):
        raise InputError(f"{path} has no `objectives` mapping. Expected the resolved config that the run wrote.")
    return text, config


def _read_eval(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError) as exc:
        raise InputError(f"{path} cannot be read: {exc}. Expected the JSON object that the run wrote.") from exc
    if not isinstance(evaluation, dict):
        raise InputError(f"{path} holds a JSON {type(evaluation).__name__}; expected an object with before or after.")
    return evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionsShown:
    """What the report keeps of completions.jsonl, which may be larger than memory."""

    latest_step: int | None
    """The last step with a completion; None without any."""
    groups: list[list[dict[str, Any]]]
    """Rows of the latest step, one list a prompt, in file order."""
    samples: list[dict[str, Any]]
    """The first completion of steps spread evenly over the run."""
    batch: tuple[int, int] | None
    """(completions, prompts) of the largest step."""


def _read_completions(path: Path) -> CompletionsShown:
    latest_step: int | None = None
    latest: list[list[dict[str, Any]]] = []
    first_of_step: dict[int, dict[str, Any]] = {}
    batch: tuple[int, int] | None = None
    lines = names.iter_json_lines(path) if path.exists() else iter(())
    for step, rows_of_step in groupby(lines, key=lambda row: int(row.get("step") or 0)):
        rows = list(rows_of_step)
        groups = _by_prompt(rows)
        trained_on = [row for row in rows if not _is_replaced(row)]
        if latest_step is None or step >= latest_step:
            latest_step, latest = step, groups
        first_of_step.setdefault(step, rows[0])
        size = (len(trained_on), len(_by_prompt(trained_on)))
        batch = max(batch or (0, 0), size) if trained_on else batch  # a step cut short by a kill is not the largest
    samples = [first_of_step[step] for step in _spread(sorted(first_of_step), _SAMPLES_SHOWN)]
    return CompletionsShown(latest_step=latest_step, groups=latest, samples=samples, batch=batch)


def _is_replaced(row: Mapping[str, Any]) -> bool:
    """Whether dynamic sampling took another group in its place: it was scored, but has no advantage."""
    return "advantage" in row and row["advantage"] is None


def _by_prompt(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row.get("prompt_id"), []).append(row)
    return list(groups.values())


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, first and last among them, evenly apart."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


# --- what the template shows ---


def _facts(
    config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], completions: CompletionsShown
) -> list[tuple[str, str]]:
    done = max((int(row.get(names.STEP, 0)) for row in metrics), default=0)
    planned = config.get("steps")
    steps = str(done) if planned is None else f"{done} of {planned}"
    if planned is not None and done < int(planned):
        steps += " (interrupted, or still running)" if done else " (no training step yet)"
    skipped = sum(bool(row.get(names.SKIPPED)) for row in metrics)
    if skipped:
        steps += f", {skipped} skipped for numbers that were not finite"
    return [
        ("model", str(config.get("model", "missing"))),
        ("grpo-toolkit (this report)", _version()),
        ("steps", steps),
        ("effective batch", _batch_text(completions.batch)),
        ("objectives", ", ".join(objectives_of(config))),
        ("seed", str(config.get("seed", "missing"))),
    ]


def _batch_text(batch: tuple[int, int] | None) -> str:
    if batch is None:
        return "missing (no completions yet)"
    completions, prompts = batch
    if completions % prompts:
        return f"{completions} completions of {prompts} prompts a step"
    return f"{prompts} prompts x {completions // prompts} completions = {completions} a step"


def _held_out(evaluation: Mapping[str, Any], objectives: Sequence[str]) -> list[dict[str, Any]]:
    """A row per objective, each followed by a row per kind."""
    before, after, difference = (evaluation.get(key) or {} for key in ("before", "after", "difference"))
    rows: list[dict[str, Any]] = []
    for objective in [o for o in dict.fromkeys([*objectives, *before, *after]) if o in before or o in after]:
        old, new, change = (phase.get(objective) or {} for phase in (before, after, difference))
        rows.append(
            {"objective": objective, "kind": None, "n": new.get("n", old.get("n"))}
            | {"before": old, "after": new, "difference": change, "direction": _direction(change)}
        )
        old_kinds, new_kinds = old.get("kinds") or {}, new.get("kinds") or {}
        for kind in dict.fromkeys([*old_kinds, *new_kinds]):
            was, now = old_kinds.get(kind), new_kinds.get(kind)
            change = {} if was is None or now is None else {"mean": now - was}
            rows.append(
                {"objective": objective, "kind": kind, "n": None, "direction": None}
                | {"before": {"mean": was}, "after": {"mean": now}, "difference": change}
            )
    return rows


def _direction(difference: Mapping[str, Any]) -> str | None:
    """ "up" or "down" where the 95% interval leaves no change out."""
    low, high = difference.get("low"), difference.get("high")
    if low is None or high is None:
        return None
    return "up" if low > 0 else "down" if high < 0 else None


def _last_step(
    metrics: Sequence[Mapping[str, Any]], objectives: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    if not metrics:
        return None
    row = metrics[-1]
    return {
        "step": row.get(names.STEP),
        "rows": [
            {
                "objective": objective,
                "reward": row.get(names.reward_mean_name(objective)),
                "unscored": row.get(names.unscored_frac_name(objective)),
                "kl": row.get(names.kl_name(objective)),
                "penalty": row.get(names.kl_penalty_name(objective)),
                "band": band_of(section.get("beta")),
                "beta": row.get(names.beta_name(objective)),
                "length": row.get(names.length_mean_name(objective)),
                "truncated": row.get(names.truncated_frac_name(objective)),
            }
            for objective, section in objectives.items()
        ],
    }


# --- rendering ---


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, interval=_interval, shown=_shown, band=band_text)
    environment.tests.update(replaced=_is_replaced)
    return environment


def _number(value: Any, digits: int = 3) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return "missing"
    return f"{value:.{digits}f}"


def _interval(entry: Mapping[str, Any], sign: str = "") -> str:
    mean, low, high = entry.get("mean"), entry.get("low"), entry.get("high")
    if mean is None:
        return "missing"
    if low is None or high is None:
        return f"{mean:{sign}.3f}"
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _shown(text: Any) -> str:
    """Text as a reader can see it: control characters made visible, very long text cut and said to be."""
    if text is None:
        return "missing"
    text = str(text)
    cut = "" if len(text) <= _TEXT_SHOWN else f" … (cut here; {len(text)} characters)"
    return printable(text[:_TEXT_SHOWN]) + cut


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def _version() -> str:
    try:
        return importlib.metadata.version("grpo-toolkit")
    except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
        return "not installed"
