"""RunConfig -> findings about the run that it would be, from its real model and one real batch. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

from grpo.config import EvalConfig, ObjectiveConfig, RunConfig
from grpo.diagnostics.checks.accumulation import check_accumulation
from grpo.diagnostics.checks.agreement import check_agreement
from grpo.diagnostics.checks.gradient import check_gradient_flow
from grpo.diagnostics.checks.learning import check_learning
from grpo.diagnostics.checks.numbers import check_numbers
from grpo.diagnostics.checks.scope import check_scope
from grpo.diagnostics.checks.signal import check_signal
from grpo.diagnostics.checks.subject import Subject, make_subject
from grpo.diagnostics.findings import Finding, worst_status
from grpo.preflight import RunParts, open_run
from grpo.runtime.policy import dropout_off
from grpo.runtime.seeding import derived_seed
from grpo.scoring import PendingScores
from grpo.types import ScoredGroup

Note = Callable[[str], None]


def verify(config: RunConfig, *, num_prompts: int = 8, note: Note = lambda _: None) -> list[Finding]:
    """Open the run, sample and score its first prompts, and look.

    Args:
        num_prompts: at most so many of the first step's.
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
        found = list(check_scope(subject))
        if worst_status(numbers) == "failed":
            return [*found, *numbers]
        flow = list(check_gradient_flow(subject))
        if all("trainable" not in finding.figures or finding.figures["has_grad_fn"] for finding in flow):
            found += check_accumulation(subject)
            found += check_learning(subject)
        return [*flow, *found, *numbers]


def _scored(config: RunConfig, parts: RunParts, num_prompts: int) -> list[ScoredGroup]:
    """The groups of the first step's first prompts, as the trainer would sample and score them."""
    prompts = parts.prompts.batch(1)[:num_prompts]
    parts.scorer.begin_step(1)
    sampled = parts.engine.sample(
        parts.encode(prompts),
        config.rollout.group_size,
        params=parts.params,
        seed=derived_seed(config.seed, "rollout", 1),
    )
    pending = PendingScores.begin(parts.scorer.submit(group) for group in sampled)
    return pending.results(order=[prompt.id for prompt in prompts])
