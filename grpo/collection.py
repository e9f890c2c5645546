"""Prompts -> P ScoredGroups: sampling, scoring while sampling goes on, and dynamic sampling; on all ranks.

Each rank samples and scores its own prompts; what comes out is the same list of groups on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grpo.batching import teaches_something
from grpo.preflight import RunParts
from grpo.runtime.seeding import derived_seed
from grpo.scoring import PendingScores
from grpo.stopwatch import Stopwatch
from grpo.types import Prompt, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """A step's groups."""

    groups: tuple[ScoredGroup, ...]
    """[P], in the prompts' order, of all ranks."""
    own: tuple[int, ...]
    """Places in `groups` of this rank's."""
    discarded: tuple[ScoredGroup, ...]
    """Groups that dynamic sampling replaced: their scores were all equal, or fewer than two had a verdict."""
    judge_seconds: float
    """From the first submission to the last verdict, over all rounds."""


def collect(
    parts: RunParts, *, step: int, seed: int, group_size: int, resample_rounds: int, stopwatch: Stopwatch
) -> Collected:
    """Sample and score the prompts of a step, counted from 1.

    Args:
        seed: the run's.
        resample_rounds: how often groups that teach nothing are replaced by groups of other prompts. What is still
            flat then stays.
        stopwatch: "rollout" and "judge_wait" are added to.
    """
    parts.scorer.begin_step(step)
    asked = parts.prompts.batch(step)
    groups, judge_seconds = _scored(
        parts, asked, seed=derived_seed(seed, "rollout", step), group_size=group_size, stopwatch=stopwatch
    )
    discarded: list[ScoredGroup] = []
    for round_number in range(1, resample_rounds + 1):
        flat = [place for place, group in enumerate(groups) if not teaches_something(group)]
        spares = parts.prompts.spares(step, round_number, flat)
        if not spares:
            break
        found, seconds = _scored(
            parts,
            list(spares.values()),
            seed=derived_seed(seed, "rollout", step, "round", round_number),
            group_size=group_size,
            stopwatch=stopwatch,
        )
        judge_seconds += seconds
        discarded += _replace(groups, dict(zip(spares, found, strict=True)))
    own_prompts = set(parts.ranks.own(range(len(groups))))
    return Collected(
        groups=tuple(groups),
        own=tuple(place for place in range(len(groups)) if place in own_prompts),
        discarded=tuple(discarded),
        judge_seconds=judge_seconds,
    )


def _replace(groups: list[ScoredGroup], found: Mapping[int, ScoredGroup]) -> list[ScoredGroup]:
    """Put those that teach something in their places; returns all that are left out."""
    left_out: list[ScoredGroup] = []
    for place, group in found.items():
        if teaches_something(group):
            group, groups[place] = groups[place], group
        left_out.append(group)
    return left_out


def _scored(
    parts: RunParts, prompts: Sequence[Prompt], *, seed: int, group_size: int, stopwatch: Stopwatch
) -> tuple[list[ScoredGroup], float]:
    """All ranks' groups in the prompts' order, and the seconds that scoring took on this one."""
    judge_seconds = 0.0

    def scored_here() -> list[ScoredGroup]:
        nonlocal judge_seconds
        own = parts.encode(parts.ranks.own(prompts))
        with stopwatch("rollout"):
            sampled = parts.engine.sample(own, group_size, params=parts.params, seed=seed)
            pending = PendingScores.begin(parts.scorer.submit(group) for group in sampled)
        with stopwatch("judge_wait"):
            scored = pending.results(order=[prompt.prompt.id for prompt in own])
        judge_seconds = pending.seconds
        return scored

    found = {group.rollout.prompt.id: group for group in parts.ranks.gather_from(scored_here)}
    return [found[prompt.id] for prompt in prompts], judge_seconds
