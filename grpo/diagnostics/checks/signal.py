"""Signal: do the scores of a group differ, and does a judge agree with itself?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean, pstdev

from grpo.diagnostics.checks.subject import Subject
from grpo.diagnostics.findings import Finding
from grpo.types import ScoredGroup

CHECK = "signal"
ENOUGH = 32
"""Completions that all score alike within their groups by more than chance."""
FLAT_MOST = 0.5
"""Above this share of groups without any variance most of the sampling is for nothing."""
MISSING_MOST = 0.1
"""Share of completions without a verdict."""
NOISE_MOST = 0.5
"""Of the spread within a group: a judge less steady than that gives advantages by chance."""
NUM_AGAIN = 2
"""Groups of each objective that are scored a second time."""


def check_signal(subject: Subject) -> Iterator[Finding]:
    """Each objective's spread over the batch, then some of its groups scored once more."""
    for name in subject.config.objectives:
        own = [group for group in subject.groups if name in group.rollout.prompt.objectives]
        if not own:
            yield Finding(
                check=CHECK,
                status="warning",
                what=f"{name}: no prompt of the batch asks for it",
                meaning="nothing is known of its rewards",
                remedy="verify more prompts: --prompts 32",
            )
            continue
        yield judge_spread(name, [_values(group, name) for group in own])
        again = own[:NUM_AGAIN]
        futures = [subject.parts.scorer.submit(group.rollout, objectives=[name]) for group in again]
        pairs = [
            (_values(first, name), _values(future.result(), name)) for first, future in zip(again, futures, strict=True)
        ]
        yield judge_steadiness(name, pairs)


def judge_spread(name: str, scores: Sequence[Sequence[float | None]]) -> Finding:
    """Args: scores: [P] of [K] each group's scores of one objective, None without a verdict."""
    valid = [[value for value in group if value is not None] for group in scores]
    spreads = [pstdev(group) if len(group) > 1 else 0.0 for group in valid]
    flat = sum(spread == 0 for spread in spreads)
    count, missing = sum(len(group) for group in scores), sum(value is None for group in scores for value in group)
    everything = [value for group in valid for value in group]
    what = f"{name}: mean {mean(everything):.2f}" if everything else f"{name}: no verdict at all"
    what += f", spread within a group {mean(spreads):.2f}; {flat} of {len(scores)} groups without any"
    what += f"; {missing} of {count} without a verdict" if missing else ""
    figures = {
        "objective": name,
        "within_group_std": spreads,
        "flat_groups": flat,
        "groups": len(scores),
        "unscored": missing,
    }
    if flat == len(scores) and count >= ENOUGH:
        return Finding(
            check=CHECK,
            status="failed",
            what=what,
            meaning="every advantage is 0: this objective teaches nothing until a group's scores differ",
            remedy="look at completions with `grpo score`: if all fail, start from a warm-up or easier prompts; if all "
            "pass, take harder ones; raise rollout.temperature or group_size",
            figures=figures,
        )
    is_mostly_flat = flat > FLAT_MOST * len(scores)
    if is_mostly_flat or missing > MISSING_MOST * count:
        return Finding(
            check=CHECK,
            status="warning",
            what=what,
            meaning="most completions are sampled for nothing" if is_mostly_flat else "verdicts are lost",
            remedy="set rollout.resample_rounds, raise group_size, or give the reward more steps than right and wrong"
            if is_mostly_flat
            else "look at why with `grpo score`, and at a judge's own limits",
            figures=figures,
        )
    return Finding(check=CHECK, status="ok", what=what, figures=figures)


def judge_steadiness(name: str, pairs: Sequence[tuple[Sequence[float | None], Sequence[float | None]]]) -> Finding:
    """Args: pairs: [P] of the same completions' scores, asked for twice."""
    both = [
        (one, other)
        for first, second in pairs
        for one, other in zip(first, second, strict=True)
        if one is not None and other is not None
    ]
    spread = mean([pstdev([v for v in first if v is not None] or [0.0]) for first, _ in pairs])
    gap = mean([abs(one - other) for one, other in both]) if both else 0.0
    changed = sum(one != other for one, other in both)
    what = f"{name}: scored twice, {len(both) - changed} of {len(both)} scores the same"
    what += f"; {gap:.2g} apart on average" if changed else ""
    figures = {
        "objective": name,
        "agreement": 1 - changed / len(both) if both else None,
        "changed": changed,
        "scored_twice": len(both),
        "mean_gap": gap,
        "spread": spread,
    }
    if changed and gap > NOISE_MOST * spread:
        return Finding(
            check=CHECK,
            status="warning",
            what=f"{what}; the spread within a group is {spread:.2g}",
            meaning="the reward's own noise is as large as what it tells completions apart by: advantages are chance",
            remedy="set the judge's temperature to 0, have several votes on each completion, or a rubric with fewer "
            "steps; see grpo judge calibrate --repeats 3",
            figures=figures,
        )
    return Finding(check=CHECK, status="ok", what=what, figures=figures)


def _values(group: ScoredGroup, name: str) -> list[float | None]:
    return [verdicts[name].value for verdicts in group.verdicts]
