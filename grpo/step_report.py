"""What one step did -> one row of metrics.jsonl and the step's rows of completions.jsonl. Writes nothing itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo import metrics as names
from grpo.advantages import RANGE_TOLERANCE
from grpo.batching import TrainBatch
from grpo.collection import Collected
from grpo.errors import NonFiniteUpdate
from grpo.types import Completion, ScoredGroup
from grpo.update.step import NonFiniteStep, UpdateStats
from judges.statistics import score_length_correlation


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One finished step."""

    step: int
    """Counted from 1."""
    row: Mapping[str, float | int | None]
    """The line of metrics.jsonl."""
    completions: Sequence[Mapping[str, Any]]
    """The lines of completions.jsonl."""
    warnings: Sequence[str]
    """What a person should know at once."""
    answers: Sequence[Mapping[str, Any]] = ()
    """The lines of evaluations.jsonl; empty where no evaluation followed the step."""
    skipped: NonFiniteStep | None
    """Why no optimizer step was taken; None where one was."""


def report_step(
    step: int,
    collected: Collected,
    batch: TrainBatch,
    stats: UpdateStats,
    *,
    seconds: Mapping[str, float],
    peak_bytes: int,
    judge_figures: Mapping[str, float] | None = None,
    short: str = "",
) -> StepReport:
    """Collect a step's figures, over all ranks.

    Args:
        seconds: stage -> time on this one.
        judge_figures: metric name -> what judges did in this step, on all ranks.
        short: why there was too little to take a step on; empty where one was taken.
    """
    groups = collected.groups
    row: dict[str, float | int | None] = {names.STEP: step, **stats.means}
    row[names.GRAD_NORM] = stats.grad_norm
    row[names.SKIPPED] = int(stats.skipped is not None or bool(short))
    row[names.OUT_OF_MEMORY] = stats.num_halvings
    row["learning_rate"] = stats.learning_rate
    row[names.SAMPLER_RATIO_P99] = stats.sampler_ratio_p99
    row[names.SAMPLER_RATIO_MAX] = stats.sampler_ratio_max
    is_compared = stats.sampler_ratio_p99 is not None
    num_compared = max(stats.num_tokens - stats.num_idle_tokens, 1)
    row["sampler/kept_set_miss_frac"] = stats.num_forced / num_compared if is_compared else None
    row["advantages/scale_factor"] = batch.advantages.scale_factor
    if stats.entropy_coefficient is not None:
        row[names.ENTROPY_COEFFICIENT] = stats.entropy_coefficient
    row.update({names.kl_max_name(name): value for name, value in stats.kl_max.items()})
    row.update({names.beta_name(name): value for name, value in stats.betas.items()})
    row.update({names.gradient_norm_name(name): value for name, value in stats.gradient_norms.items()})
    row.update({names.gradient_cosine_name(*pair): value for pair, value in stats.cosines.items()})
    row.update(_reward_figures(groups, batch))
    row.update(_unscored_figures([*groups, *collected.discarded], batch.objectives))
    row.update(_completion_figures(groups, batch.objectives))
    row[names.RESAMPLED_GROUPS] = len(collected.discarded)
    sampled = [*groups, *collected.discarded]
    row[names.PROMPT_TOKENS] = sum(len(group.rollout.prompt_token_ids) for group in sampled)
    row[names.COMPLETION_TOKENS] = sum(len(c.token_ids) for group in sampled for c in group.rollout.completions)
    row.update({names.time_name(stage): value for stage, value in seconds.items()})
    row[names.IDLE_TOKENS] = stats.num_idle_tokens
    row[names.PEAK_MEMORY_BYTES] = peak_bytes
    row.update(judge_figures or {})
    return StepReport(
        step=step,
        row=row,
        completions=[
            *_completion_rows(step, groups, advantages=batch.advantages.combined.tolist()),
            *_completion_rows(step, collected.discarded, advantages=None),
        ],
        warnings=[*_warnings_of(row, stats), *([f"step {step} took no update: {short}"] if short else [])],
        skipped=stats.skipped,
    )


def _warnings_of(row: Mapping[str, float | int | None], stats: UpdateStats) -> list[str]:
    found: list[str] = []
    if stats.num_halvings:
        found.append(
            f"step {row[names.STEP]} ran out of memory {stats.num_halvings} time{'s' * (stats.num_halvings > 1)} "
            f"({stats.shortage}). Its window was redone in smaller micro-batches, with the same gradient, and "
            f"update.micro_batch_tokens is {stats.micro_batch_tokens} from here on: set it so in the recipe. "
            "`grpo plan` says beforehand what fits"
        )
    if stats.skipped is not None:
        found.append(
            f"step {row[names.STEP]} was skipped, {stats.skipped.in_a_row} in a row: {stats.skipped.cause}. Its batch "
            "lies in non_finite/ in the run directory. Check: grpo verify RECIPE (numbers)"
        )
    return found


def check_can_go_on(report: StepReport, *, max_in_a_row: int) -> None:
    """Stop rather than skip steps without end.

    Raises:
        NonFiniteUpdate: so many steps in a row were skipped; names the first module whose numbers were not finite.
    """
    if report.skipped is not None and report.skipped.in_a_row >= max_in_a_row:
        raise NonFiniteUpdate(
            f"step {report.step}: {report.skipped.in_a_row} steps in a row without a finite gradient "
            f"(update.max_non_finite_steps = {max_in_a_row}). Last cause: {report.skipped.cause}. The parameters are "
            "those of the last good step; the batches lie in non_finite/ in the run directory. "
            "Check: grpo verify RECIPE (numbers)"
        )


def _reward_figures(groups: Sequence[ScoredGroup], batch: TrainBatch) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name in batch.objectives:
        verdicts = [verdicts[name] for group in groups for verdicts in group.verdicts if name in verdicts]
        values = [verdict.value for verdict in verdicts if verdict.value is not None]
        if values:
            mean = sum(values) / len(values)
            spread = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
            figures[names.reward_mean_name(name)] = mean
            figures[names.reward_std_name(name)] = spread**0.5
        flat = _are_flat(groups, name)
        if flat:
            figures[names.zero_variance_frac_name(name)] = sum(flat) / len(flat)
        correlation = score_length_correlation(*_scores_and_lengths(groups, name))
        if correlation is not None:
            figures[names.length_correlation_name(name)] = correlation
    asked = sum(len(group.rollout.prompt.objectives) for group in groups)
    figures[names.ZERO_VARIANCE_FRAC] = float(batch.advantages.is_flat.sum()) / max(asked, 1)
    return figures


def _are_flat(groups: Sequence[ScoredGroup], objective: str) -> list[bool]:
    """Of each group with at least two verdicts of the objective: whether they are equal, as `group_advantages` sees it.

    From the verdicts: the batch's own `is_flat` is, where scores are summed first, that of the sum, behind which an
    objective without any difference hides.
    """
    found: list[bool] = []
    for group in groups:
        values = [v.value for one in group.verdicts if (v := one.get(objective)) is not None and v.value is not None]
        if len(values) >= 2:
            largest = max(1.0, *(abs(value) for value in values))
            found.append(max(values) - min(values) <= RANGE_TOLERANCE * largest)
    return found


def _scores_and_lengths(groups: Sequence[ScoredGroup], objective: str) -> tuple[list[float | None], list[int]]:
    """Of the objective's completions: the values, None where one is missing, and the tokens."""
    pairs = [
        (verdicts[objective].value, len(completion.token_ids))
        for group in groups
        for completion, verdicts in zip(group.rollout.completions, group.verdicts, strict=True)
        if objective in verdicts
    ]
    return [value for value, _ in pairs], [length for _, length in pairs]


def _unscored_figures(groups: Sequence[ScoredGroup], objectives: Sequence[str]) -> dict[str, float]:
    """Of all that was asked: groups without verdicts are replaced first, and a failing judge must not hide there."""
    figures: dict[str, float] = {}
    for name in objectives:
        verdicts = [verdicts[name] for group in groups for verdicts in group.verdicts if name in verdicts]
        if verdicts:
            num_missing = sum(verdict.value is None for verdict in verdicts)
            figures[names.unscored_frac_name(name)] = num_missing / len(verdicts)
    return figures


def _completion_figures(groups: Sequence[ScoredGroup], objectives: Sequence[str]) -> dict[str, float]:
    """Lengths and truncated shares, overall and per objective: one objective's collapse must not average away; and how
    many ended by which token."""
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
    everything = [completion for group in groups for completion in group.rollout.completions]
    ends = Counter(c.token_ids[-1] for c in everything if c.finish_reason == "stop")
    figures.update({names.end_token_frac_name(token): n / len(everything) for token, n in sorted(ends.items())})
    return figures


def _mean_length(completions: Sequence[Completion]) -> float:
    return sum(len(completion.token_ids) for completion in completions) / len(completions)


def _completion_rows(
    step: int, groups: Sequence[ScoredGroup], *, advantages: Sequence[Sequence[float]] | None
) -> list[dict[str, Any]]:
    """Args: advantages: [P, K]; None for groups that were sampled and scored, but not trained on."""
    return [
        {
            "step": step,
            "prompt_id": group.rollout.prompt.id,
            "prompt": group.rollout.prompt.messages[-1].content,
            "reference": group.rollout.prompt.reference,
            "kind": group.rollout.prompt.meta.get("kind"),
            "meta": dict(group.rollout.prompt.meta),
            **({"images": list(group.rollout.prompt.images)} if group.rollout.prompt.images else {}),
            "index": index,
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.token_ids),
            "verdicts": {
                name: {"value": verdict.value, "parts": dict(verdict.parts), "reason": verdict.reason}
                for name, verdict in verdicts.items()
            },
            "advantage": None if advantages is None else advantages[p][index],
        }
        for p, group in enumerate(groups)
        for index, (completion, verdicts) in enumerate(zip(group.rollout.completions, group.verdicts, strict=True))
    ]
