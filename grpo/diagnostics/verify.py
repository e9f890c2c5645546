"""RunConfig -> findings about the run that it would be, from its real model and one real batch. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from itertools import zip_longest

from grpo.config import EvalConfig, ObjectiveConfig, RunConfig
from grpo.diagnostics.checks.accumulation import check_accumulation
from grpo.diagnostics.checks.agreement import check_agreement
from grpo.diagnostics.checks.gradient import check_gradient_flow
from grpo.diagnostics.checks.learning import check_learning
from grpo.diagnostics.checks.numbers import check_numbers
from grpo.diagnostics.checks.penalty import check_penalty
from grpo.diagnostics.checks.scope import check_scope
from grpo.diagnostics.checks.signal import check_signal
from grpo.diagnostics.checks.subject import Subject, make_subject
from grpo.diagnostics.findings import Finding, worst_status
from grpo.preflight import open_run
from grpo.run_parts import RunParts
from grpo.runtime.policy import dropout_off
from grpo.runtime.seeding import derived_seed
from grpo.scoring import PendingScores
from grpo.types import Prompt, ScoredGroup

Note = Callable[[str], None]

STEPS_LOOKED_AT = 16
"""Steps whose prompts are searched for one of every objective."""


def verify(config: RunConfig, *, num_prompts: int = 8, note: Note = lambda _: None) -> list[Finding]:
    """Open the run, sample and score its first prompts, and look.

    Args:
        num_prompts: at most so many of the first steps', and of each objective if there are any.
        note: is told what is being done.
    Raises:
        InputError: the recipe or what it names cannot be used.
        RunStopped: the engine fails altogether.
    """
    looked_at = without_traces(config)
    note("reading the model")
    with closing(open_run(looked_at)) as parts:
        return verify_parts(looked_at, parts, num_prompts=num_prompts, note=note)


def verify_parts(
    config: RunConfig, parts: RunParts, *, num_prompts: int = 8, note: Note = lambda _: None
) -> list[Finding]:
    """The same of parts that are there already, before their first step; they are afterwards what they were."""
    note("sampling and scoring a batch")
    subject = make_subject(config, parts, _scored(config, parts, num_prompts))
    note("forwards and backwards")
    found = _trainer_checks(subject)
    note("the engine beside the trainer")
    found += check_agreement(subject)
    note("the rewards once more")
    found += check_signal(subject)
    return found


def without_traces(config: RunConfig) -> RunConfig:
    """The recipe without what would write to disk or is not looked at: judges' caches, which would also answer in
    their place when they are asked twice; trackers; evaluation; warm-up."""
    objectives = {name: _without_caches(objective) for name, objective in config.objectives.items()}
    return config.model_copy(
        update={
            "objectives": objectives,
            "eval": EvalConfig(before=False, after=False),
            "trackers": (),
            "warmup": None,
        }
    )


def _without_caches(objective: ObjectiveConfig) -> ObjectiveConfig:
    rewards = tuple(
        spec.model_copy(update={"params": {key: value for key, value in spec.params.items() if key != "cache"}})
        if spec.name == "judged"
        else spec
        for spec in objective.rewards
    )
    return objective.model_copy(update={"rewards": rewards})


def _trainer_checks(subject: Subject) -> list[Finding]:
    """A pass that fails, or that is not finite, leaves nothing for the others to look at."""
    with dropout_off(subject.parts.policy.model):
        numbers = list(check_numbers(subject))
        is_sound = worst_status(numbers) != "failed"
        found = list(check_scope(subject, can_pass=is_sound))
        if not is_sound:
            return [*found, *numbers]
        flow = list(check_gradient_flow(subject))
        if all("trainable" not in finding.figures or finding.figures["has_grad_fn"] for finding in flow):
            found += check_accumulation(subject)
            found += check_learning(subject)
            found += check_penalty(subject)
        return [*flow, *found, *numbers]


def _first_prompts(config: RunConfig, parts: RunParts, num_prompts: int) -> list[Prompt]:
    """In turn from those of each set of objectives, so that a few prompts show all of them."""
    by_objectives: dict[tuple[str, ...], dict[str, Prompt]] = {}
    for step in range(1, STEPS_LOOKED_AT + 1):
        for prompt in parts.prompts.batch(step):
            by_objectives.setdefault(prompt.objectives, {}).setdefault(prompt.id, prompt)
        covered = {name for names in by_objectives for name in names}
        if covered.issuperset(config.objectives) and sum(map(len, by_objectives.values())) >= num_prompts:
            break
    turns = zip_longest(*(own.values() for own in by_objectives.values()))
    return [prompt for turn in turns for prompt in turn if prompt is not None][:num_prompts]


def _scored(config: RunConfig, parts: RunParts, num_prompts: int) -> list[ScoredGroup]:
    """Groups of the first prompts, as the trainer would sample and score them."""
    prompts = _first_prompts(config, parts, num_prompts)
    parts.scorer.begin_step(1)
    sampled = parts.engine.sample(
        parts.encode(prompts),
        config.rollout.group_size,
        params=parts.params,
        seed=derived_seed(config.seed, "rollout", 1),
    )
    pending = PendingScores.begin(parts.scorer.submit(group) for group in sampled)
    return pending.results(order=[prompt.id for prompt in prompts])
