"""`grpo score`: a file of completions, scored by a recipe's objectives. Samples and trains nothing; needs no model.

Comes in: JSON lines or CSV with a completion each, a run's completions.jsonl among them. Goes out: the same rows with
verdicts, and means by objective and kind. Imports no torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.completion_rows import group_completions, kind_of, prompt_key, read_completions
from grpo.config import RunConfig
from grpo.durable_files import write_result
from grpo.metrics import bootstrap_mean
from grpo.objectives import build_objectives
from grpo.scoring import Scorer
from grpo.types import Verdict
from rewards.base import RewardContext

MAX_CAUSES = 3
"""Reasons shown for verdicts that are missing; every row has its own with --out."""


def complete_for_scoring(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values with stand-ins for what training needs and scoring never reads: `objectives` alone will do."""
    unread = {
        "model": "none",
        "steps": 1,
        "output_dir": "none",
        "prompts": {"type": "file", "path": "none"},
        "optim": {"learning_rate": 1.0},
    }
    objectives = values.get("objectives")
    if isinstance(objectives, Mapping):
        beta = {"type": "fixed", "value": 0.0}
        objectives = {
            name: {"beta": beta, **objective} if isinstance(objective, Mapping) else objective
            for name, objective in objectives.items()
        }
        return {**unread, **values, "objectives": objectives}
    return {**unread, **values}


def score_file(
    config: RunConfig, path: Path, *, for_evaluation: bool = False, audit_path: Path | None = None
) -> list[dict[str, Any]]:
    """Score every row of a file.

    Args:
        path: JSON lines or CSV with `completion`, `prompt` and what the rewards look at: `reference`, `objectives` (all
            of the recipe's where absent) and further columns. Rows that belong together, as a reward that compares
            completions wants it: see `grpo.completion_rows.group_completions`.
        for_evaluation: ask `eval_rewards` where an objective has them.
        audit_path: where judges write what they were asked and answered.
    Returns:
        The rows in the file's order, each with `verdicts`: objective -> value, parts and reason.
    Raises:
        InputError: the file or a row cannot be used, or a reward is not ready.
    """
    rows = read_completions(path)
    groups = group_completions(rows, objectives=list(config.objectives), path=path)
    objectives = build_objectives(
        config.objectives,
        RewardContext(base_dir=config.base_dir, audit_path=audit_path, replay_path=config.scoring.replay),
        for_evaluation=for_evaluation,
    )
    with Scorer(objectives) as scorer:
        scorer.check()
        futures = [(places, scorer.submit(group)) for places, group in groups]
        scored = [(places, future.result()) for places, future in futures]
    found: dict[int, dict[str, Any]] = {}
    for places, group in scored:
        for place, verdicts in zip(places, group.verdicts, strict=True):
            found[place] = {**rows[place], "verdicts": {name: _entry_of(verdict) for name, verdict in verdicts.items()}}
    return [found[place] for place in range(len(rows))]


def summarise_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """objective -> mean with its 95% bootstrap interval over prompts, n, unscored, and each kind's mean.

    An objective without any verdict has no mean; one with missing verdicts has `causes`, the commonest reasons.
    """
    summary: dict[str, dict[str, Any]] = {}
    for name in sorted({name for row in rows for name in row["verdicts"]}):
        own = [(row, row["verdicts"][name]["value"]) for row in rows if name in row["verdicts"]]
        scored = [(row, value) for row, value in own if value is not None]
        summary[name] = {"n": len(scored), "unscored": len(own) - len(scored)}
        if missing := [str(row["verdicts"][name]["reason"]) for row, value in own if value is None]:
            summary[name]["causes"] = dict(Counter(missing).most_common(MAX_CAUSES))
        if scored:
            by_prompt = _means_by([(prompt_key(row), value) for row, value in scored])
            interval = bootstrap_mean(list(by_prompt.values()))
            summary[name] |= {"mean": interval.mean, "low": interval.low, "high": interval.high}
            summary[name]["kinds"] = _means_by([(kind_of(row), value) for row, value in scored])
    return summary


def min_valid_shortage(summary: Mapping[str, Mapping[str, Any]], config: RunConfig) -> str:
    """Which objective has fewer verdicts than a training step would ask for; empty where none has."""
    for name, own in summary.items():
        wanted = config.objectives[name].min_valid_fraction
        least = config.scoring.min_valid_fraction if wanted is None else wanted
        if own["n"] < least * (own["n"] + own["unscored"]):
            return (
                f"objective {name}: {own['unscored']} of {own['n'] + own['unscored']} completions have no verdict, and "
                f"min_valid_fraction = {least:g} asks for more. The commonest reason: {next(iter(own['causes']))}"
            )
    return ""


def write_scores(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a completion. Raises StorageError."""
    write_result(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def _means_by(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for key, value in pairs:
        values.setdefault(key, []).append(value)
    return {key: sum(own) / len(own) for key, own in sorted(values.items())}


def _entry_of(verdict: Verdict) -> dict[str, Any]:
    return {"value": verdict.value, "parts": dict(verdict.parts), "reason": verdict.reason}
