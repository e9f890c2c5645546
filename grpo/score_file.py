"""`grpo score`: a file of completions, scored by a recipe's objectives. Samples and trains nothing; needs no model.

Comes in: JSON lines with a completion each, a run's completions.jsonl among them. Goes out: the same lines with
verdicts, and means by objective and kind. Imports no torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.config import RunConfig
from grpo.errors import DatasetError
from grpo.metrics import bootstrap_mean, iter_json_lines
from grpo.objectives import build_objectives
from grpo.scoring import Scorer
from grpo.types import Completion, Message, Prompt, RolloutGroup, Verdict
from rewards.base import RewardContext

_OWN_COLUMNS = frozenset(
    {"prompt", "prompt_id", "completion", "reference", "objectives", "finish_reason", "num_tokens"}
)
_WRITTEN_BY_RUNS = frozenset({"step", "index", "verdicts", "advantage"})


def score_file(
    config: RunConfig, path: Path, *, for_evaluation: bool = False, audit_path: Path | None = None
) -> list[dict[str, Any]]:
    """Score every line of a file.

    Args:
        path: JSON lines with `completion`, `prompt` and what the rewards look at: `reference`, `objectives` (all of the
            recipe's where absent) and further columns. Lines of one `prompt_id` and `step` (the `prompt` where there is
            no id) are one group, as a reward that compares completions wants it.
        for_evaluation: ask `eval_rewards` where an objective has them.
        audit_path: where judges write what they were asked and answered.
    Returns:
        The lines in the file's order, each with `verdicts`: objective -> value, parts and reason.
    Raises:
        InputError: the file or a line cannot be used, or a reward is not ready.
    """
    rows = list(iter_json_lines(path))
    if not rows:
        raise DatasetError(f"{path} holds no completion. Expected JSON lines, each with prompt and completion.")
    groups = _groups(rows, config, path)
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

    An objective without any verdict has no mean.
    """
    summary: dict[str, dict[str, Any]] = {}
    for name in sorted({name for row in rows for name in row["verdicts"]}):
        own = [(row, row["verdicts"][name]["value"]) for row in rows if name in row["verdicts"]]
        scored = [(row, value) for row, value in own if value is not None]
        summary[name] = {"n": len(scored), "unscored": len(own) - len(scored)}
        if scored:
            by_prompt = _means_by([(_prompt_key(row), value) for row, value in scored])
            interval = bootstrap_mean(list(by_prompt.values()))
            summary[name] |= {"mean": interval.mean, "low": interval.low, "high": interval.high}
            summary[name]["kinds"] = _means_by([(str(row.get("kind") or "all"), value) for row, value in scored])
    return summary


def min_valid_shortage(summary: Mapping[str, Mapping[str, Any]], config: RunConfig) -> str:
    """Which objective has fewer verdicts than a training step would ask for; empty where none has."""
    for name, own in summary.items():
        wanted = config.objectives[name].min_valid_fraction
        least = config.scoring.min_valid_fraction if wanted is None else wanted
        if own["n"] < least * (own["n"] + own["unscored"]):
            return (
                f"objective {name}: {own['unscored']} of {own['n'] + own['unscored']} completions have no verdict, and "
                f"min_valid_fraction = {least:g} asks for more. The lines' reasons say why (--out FILE)"
            )
    return ""


def write_scores(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a completion."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows), "utf-8")


def _groups(rows: Sequence[Mapping[str, Any]], config: RunConfig, path: Path) -> list[tuple[list[int], RolloutGroup]]:
    """Lines that belong together: (their places, the group)."""
    places_of: dict[tuple[Any, ...], list[int]] = {}
    for place, row in enumerate(rows):
        _check_row(row, config, f"{path} line {place + 1}")
        places_of.setdefault((row.get("step"), _prompt_key(row)), []).append(place)
    repeated = Counter(key for _, key in places_of)
    groups: list[tuple[list[int], RolloutGroup]] = []
    for (step, key), places in places_of.items():
        first = rows[places[0]]
        prompt = Prompt(
            id=f"{key}@{step}" if repeated[key] > 1 else key,
            messages=(Message(role="user", content=first["prompt"]),),
            objectives=tuple(first.get("objectives") or first.get("verdicts") or config.objectives),
            reference=first.get("reference"),
            meta=_meta(first),
        )
        completions = tuple(_completion(rows[place]) for place in places)
        groups.append((places, RolloutGroup(prompt=prompt, prompt_token_ids=(), completions=completions)))
    return groups


def _check_row(row: Mapping[str, Any], config: RunConfig, place: str) -> None:
    for column in ("prompt", "completion"):
        if not isinstance(row.get(column), str):
            raise DatasetError(f"{place} has no text in column {column!r}; it has {sorted(row)}.")
    objectives = row.get("objectives") or row.get("verdicts") or []
    unknown = [name for name in objectives if name not in config.objectives]
    if isinstance(objectives, str) or unknown:
        raise DatasetError(
            f"{place} asks for objectives {objectives!r}; the recipe has {list(config.objectives)}. Name those, as a "
            "list, or leave the column out."
        )


def _meta(row: Mapping[str, Any]) -> dict[str, Any]:
    """What rewards look at beside the texts: a run's lines have it in `meta`, others as columns of their own."""
    if isinstance(row.get("meta"), Mapping):
        return dict(row["meta"])
    return {name: value for name, value in row.items() if name not in _OWN_COLUMNS | _WRITTEN_BY_RUNS}


def _completion(row: Mapping[str, Any]) -> Completion:
    """As a reward sees it: the number of tokens is only known of a run's own completions."""
    return Completion(
        token_ids=(0,) * int(row.get("num_tokens") or 0),
        text=row["completion"],
        sampler_logprobs=(),
        finish_reason="length" if row.get("finish_reason") == "length" else "stop",
    )


def _prompt_key(row: Mapping[str, Any]) -> str:
    return str(row["prompt_id"]) if row.get("prompt_id") is not None else row["prompt"]


def _means_by(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for key, value in pairs:
        values.setdefault(key, []).append(value)
    return {key: sum(own) / len(own) for key, own in sorted(values.items())}


def _entry_of(verdict: Verdict) -> dict[str, Any]:
    return {"value": verdict.value, "parts": dict(verdict.parts), "reason": verdict.reason}
