"""What one step did -> one row of metrics.jsonl and the step's rows of completions.jsonl. Writes nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo import metrics as names
from grpo.batching import TrainBatch
from grpo.types import Completion, ScoredGroup
from grpo.update.step import UpdateStats


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One finished step."""

    step: int
    """Counted from 1."""
    row: Mapping[str, float | int | None]
    """The line of metrics.jsonl."""
    completions: Sequence[Mapping[str, Any]]
    """The lines of completions.jsonl."""


def report_step(
    step: int,
    groups: Sequence[ScoredGroup],
    batch: TrainBatch,
    stats: UpdateStats,
    *,
    seconds: Mapping[str, float],
    peak_bytes: int,
) -> StepReport:
    """Collect a step's figures. `seconds`: stage -> time."""
    row: dict[str, float | int | None] = {names.STEP: step, **stats.means}
    row[names.GRAD_NORM] = stats.grad_norm
    row["learning_rate"] = stats.learning_rate
    row[names.SAMPLER_RATIO_P99] = stats.ratio_p99
    row["sampler/kept_set_miss_frac"] = stats.num_forced / max(batch.num_tokens, 1)
    row["advantages/scale_factor"] = batch.advantages.scale_factor
    row.update({names.kl_max_name(name): value for name, value in stats.kl_max.items()})
    row.update({names.beta_name(name): value for name, value in stats.betas.items()})
    row.update(_reward_figures(groups, batch))
    row.update(_completion_figures(groups, batch.objectives))
    row[names.PROMPT_TOKENS] = sum(len(group.rollout.prompt_token_ids) for group in groups)
    row[names.COMPLETION_TOKENS] = sum(len(c.token_ids) for group in groups for c in group.rollout.completions)
    row.update({names.time_name(stage): value for stage, value in seconds.items()})
    row[names.PEAK_MEMORY_BYTES] = peak_bytes
    return StepReport(step=step, row=row, completions=list(_completion_rows(step, groups, batch)))


MAX_SAMPLER_RATIO = 2.0
"""A 99th percentile above this is no rounding any more: bfloat16 alone stays near 1.3."""


def warnings_of(row: Mapping[str, float | int | None]) -> list[str]:
    """What in a step's figures a person should know at once."""
    found: list[str] = []
    ratio = row.get(names.SAMPLER_RATIO_P99)
    if ratio is not None and ratio > MAX_SAMPLER_RATIO:
        found.append(
            f"step {row[names.STEP]}: one token in a hundred has probabilities in engine and trainer that differ by a "
            f"factor of {ratio:.1f} or more; compare them with dtype=float32 before you trust this run"
        )
    return found


def _reward_figures(groups: Sequence[ScoredGroup], batch: TrainBatch) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name in batch.objectives:
        verdicts = [verdicts[name] for group in groups for verdicts in group.verdicts if name in verdicts]
        values = [verdict.value for verdict in verdicts if verdict.value is not None]
        if verdicts:
            figures[names.unscored_frac_name(name)] = 1 - len(values) / len(verdicts)
        if values:
            mean = sum(values) / len(values)
            spread = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
            figures[names.reward_mean_name(name)] = mean
            figures[names.reward_std_name(name)] = spread**0.5
    asked = sum(len(group.rollout.prompt.objectives) for group in groups)
    figures[names.ZERO_VARIANCE_FRAC] = float(batch.advantages.is_flat.sum()) / max(asked, 1)
    return figures


def _completion_figures(groups: Sequence[ScoredGroup], objectives: Sequence[str]) -> dict[str, float]:
    """Lengths and truncated shares, overall and per objective: one objective's collapse must not average away."""
    figures: dict[str, float] = {}
    for name in (None, *objectives):
        own = [
            completion
            for group in groups
            if name is None or name in group.rollout.prompt.objectives
            for completion in group.rollout.completions
        ]
        if own:
            figures[names.length_mean_name(name)] = _mean_length(own)
            figures[names.truncated_frac_name(name)] = sum(c.finish_reason == "length" for c in own) / len(own)
    return figures


def _mean_length(completions: Sequence[Completion]) -> float:
    return sum(len(completion.token_ids) for completion in completions) / len(completions)


def _completion_rows(step: int, groups: Sequence[ScoredGroup], batch: TrainBatch) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "prompt_id": group.rollout.prompt.id,
            "prompt": group.rollout.prompt.messages[-1].content,
            "reference": group.rollout.prompt.reference,
            "kind": group.rollout.prompt.meta.get("kind"),
            "index": index,
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.token_ids),
            "verdicts": {
                name: {"value": verdict.value, "parts": dict(verdict.parts), "reason": verdict.reason}
                for name, verdict in verdicts.items()
            },
            "advantage": float(batch.advantages.combined[p, index]),
        }
        for p, group in enumerate(groups)
        for index, (completion, verdicts) in enumerate(zip(group.rollout.completions, group.verdicts, strict=True))
    ]
