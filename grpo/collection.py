"""Prompts -> P ScoredGroups: sampling, scoring while sampling goes on, and dynamic sampling; on all ranks.

Each rank samples and scores its own prompts; what comes out is the same list of groups on every rank. What the journal
holds of the step is neither sampled nor asked for again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from grpo import metrics as names
from grpo.batching import teaches_something
from grpo.journal import Journal
from grpo.judge_figures import added_up
from grpo.phases import Announce, silent
from grpo.prompts import EncodedPrompt
from grpo.run_parts import RunParts
from grpo.runtime.distributed import Ranks
from grpo.runtime.seeding import derived_seed
from grpo.scoring import PendingScores
from grpo.stopwatch import Stopwatch
from grpo.types import Prompt, RolloutGroup, ScoredGroup


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
    judge_figures: Mapping[str, float] | None = None
    """Metric name -> what judges did for the step, on all ranks; None until it is sealed."""


def collect(
    parts: RunParts,
    journal: Journal,
    *,
    step: int,
    seed: int,
    group_size: int,
    resample_rounds: int,
    stopwatch: Stopwatch,
    announce: Announce = silent,
) -> Collected:
    """Sample and score the prompts of a step, counted from 1.

    Args:
        journal: open at the step.
        seed: the run's.
        resample_rounds: how often groups that teach nothing are replaced by groups of other prompts. What is still
            flat then stays.
        stopwatch: "rollout" and "judge_wait" are added to.
    """
    sealed = parts.ranks.on_main(journal.sealed)
    if sealed is not None:
        for stage in ("rollout", "judge_wait"):
            stopwatch.add(stage, 0.0)  # neither took any time, and a line of metrics has its every key
        return Collected(
            groups=sealed.groups,
            own=_own_places(parts.ranks, len(sealed.groups)),
            discarded=sealed.discarded,
            judge_seconds=0.0,
            judge_figures=sealed.judge_figures,
        )
    sampled = partial(_scored, parts, journal, group_size=group_size, stopwatch=stopwatch, announce=announce)
    parts.scorer.begin_step(step)
    asked = parts.prompts.batch(step)
    groups, judge_seconds = sampled(asked, seed=derived_seed(seed, "rollout", step))
    discarded: list[ScoredGroup] = []
    for round_number in range(1, resample_rounds + 1):
        flat = [place for place, group in enumerate(groups) if not teaches_something(group)]
        spares = parts.prompts.spares(step, round_number, flat)
        if not spares:
            break
        found, seconds = sampled(list(spares.values()), seed=derived_seed(seed, "rollout", step, "round", round_number))
        judge_seconds += seconds
        discarded += _replace(groups, dict(zip(spares, found, strict=True)))
    return Collected(
        groups=tuple(groups),
        own=_own_places(parts.ranks, len(groups)),
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


def seal(collected: Collected, parts: RunParts, journal: Journal) -> Collected:
    """Make what the step learns from durable, on all ranks, before anything is learned from it.

    Raises:
        StorageError: the journal cannot be written.
    """
    if collected.judge_figures is not None:
        return collected
    figures = added_up([*parts.ranks.gather([parts.scorer.take_judge_figures()]), _bought_before(journal)])
    parts.ranks.together(journal.sync)
    parts.ranks.on_main(lambda: journal.seal(collected.groups, collected.discarded, figures))
    return replace(collected, judge_figures=figures)


def _bought_before(journal: Journal) -> dict[str, float]:
    """What processes that were killed in this step had bought of it: it belongs to the step's figures."""
    costs = journal.bought_before()
    if not costs:
        return {}
    return {names.JUDGE_CALLS: float(len(costs)), names.JUDGE_COST: sum(cost or 0.0 for cost in costs.values())}


def _own_places(ranks: Ranks, num_groups: int) -> tuple[int, ...]:
    return tuple(ranks.own(range(num_groups)))


def _scored(
    parts: RunParts,
    journal: Journal,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    group_size: int,
    stopwatch: Stopwatch,
    announce: Announce,
) -> tuple[list[ScoredGroup], float]:
    """All ranks' groups in the prompts' order, and the seconds that scoring took on this one."""
    judge_seconds = 0.0

    def groups_of(own: Sequence[EncodedPrompt]) -> Iterator[RolloutGroup]:
        known = {one.prompt.id: group for one in own if (group := _known(journal, one)) is not None}
        yield from known.values()
        if len(known) < len(own):
            # those that are known, too: in another batch the others' log-probabilities would end in other bits
            for group in parts.engine.sample(own, group_size, params=parts.params, seed=seed):
                if group.prompt.id not in known:
                    journal.add_group(group)
                    yield group

    def scored_here() -> list[ScoredGroup]:
        nonlocal judge_seconds
        own = parts.encode(parts.ranks.own(prompts))
        announce("rollout")
        with stopwatch("rollout"):
            pending = PendingScores.begin(parts.scorer.submit(group) for group in groups_of(own))
        announce("judging")
        with stopwatch("judge_wait"):
            scored = pending.results(order=[prompt.prompt.id for prompt in own])
        judge_seconds = pending.seconds
        return scored

    found = {group.rollout.prompt.id: group for group in parts.ranks.gather_from(scored_here)}
    return [found[prompt.id] for prompt in prompts], judge_seconds


def _known(journal: Journal, prompt: EncodedPrompt) -> RolloutGroup | None:
    """The journal's group for this very prompt, as the data has it now."""
    group = journal.groups.get(prompt.prompt.id)
    if group is None or group.prompt_token_ids != tuple(prompt.token_ids):
        return None
    if group.image_digest != (prompt.images.digest if prompt.images else None):
        return None
    return replace(group, prompt=prompt.prompt)
