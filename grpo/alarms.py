"""A watch on the run's own figures: what costs people days is visible in metrics.jsonl within minutes.

Comes in: rows of metrics.jsonl, one a step. Goes out: alarms, each with the command that says more. Knows no tensor; a
resumed run shows it the rows that are there already, so that it goes on counting where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo import metrics as names
from grpo.config import (
    FixedBetaConfig,
    FullTrainable,
    ObjectiveConfig,
    OptimConfig,
    PartsTrainable,
    RunConfig,
    TrainableConfig,
)

Row = Mapping[str, float | int | None]

NO_KL = 1e-9
"""Nats per token. A policy that has moved at all is above; rounding of the log-probabilities alone too."""
SHORT_LENGTH = 1.5
"""Mean tokens of a completion, the end token among them."""
MOST_TRUNCATED = 0.9
MOST_UNSCORED = 0.2
HIGH_KL = 0.3
"""Nats per token. A beta is there to keep the KL at a few hundredths."""
MIN_SCORES = 8
"""Changed answers whose scores may be equal by chance are fewer."""
STILL_EVALUATIONS = 3
"""So many alike, in a row, are no accident, ..."""
STILL_STEPS = 10
"""... if so many steps lie between the first and the last: one step need not change a single greedy answer."""
MAX_SAMPLER_RATIO = 2.0
"""A 99th percentile above this is no rounding any more: bfloat16 alone stays near 1.3."""
MAX_SAMPLER_TAIL = 100.0
"""The same of the largest. 4.6 nats, where bfloat16 rounds a logit below 64 by at most 1/8 nat: the largest of 15,000
tokens of SmolLM2-135M in bfloat16 was 1.54, which is 0.43 nats. One token may be an accident, one in every step is not.
"""
LORA_RATES = (1e-5, 5e-3)
FULL_RATES = (1e-8, 5e-5)
"""Outside of these a learning rate is nearly always one that was meant for the other kind of training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something that a person should look into before more hours are spent."""

    name: str
    text: str
    """What was seen, what it means, what to change, and the command that says more."""


def _alarm(name: str, seen: str, *, check: str, at: str = "") -> Alarm:
    """Args: check: command, and in brackets the rows of what it shows; at: which step it was."""
    return Alarm(name=name, text=f"{name}{at}: {seen}. Check: {check}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Watch:
    """One condition on a row, for the whole run or for one objective."""

    name: str
    patience: int
    """Rows in a row that meet it before the alarm."""
    is_met: Callable[[Row], bool | None]
    """None: the row does not say (a skipped step, an objective without prompts), and the count stays."""
    text: str
    check: str


class Alarms:
    """Counts, per condition, the rows in a row that meet it; an alarm once, and again after a row that did not."""

    def __init__(
        self, objectives: Sequence[str], *, eval_every: int | None = None, fixed_betas: Sequence[str] = ()
    ) -> None:
        """Args: eval_every: steps between evaluations during the run; None where there are none. fixed_betas:
        objectives whose beta is above 0 and never moves."""
        self._watches = [*_of_the_run(objectives), *(watch for name in objectives for watch in _of_an_objective(name))]
        self._watches += [_of_a_fixed_beta(name) for name in fixed_betas]
        if eval_every is not None:
            self._watches += _of_evaluations(objectives, eval_every)
        self._in_a_row = dict.fromkeys((watch.name for watch in self._watches), 0)

    def observe(self, row: Row) -> list[Alarm]:
        """A finished step's row -> what begins to be alarming with it."""
        found: list[Alarm] = []
        for watch in self._watches:
            met = watch.is_met(row)
            if met is None:
                continue
            count = self._in_a_row[watch.name] = self._in_a_row[watch.name] + 1 if met else 0
            if count == watch.patience:
                since = f" for {count} steps" if count > 1 else ""
                at = f", step {row[names.STEP]}"
                found.append(_alarm(watch.name, watch.text.format(since=since), check=watch.check, at=at))
        return found


def alarms_of(config: RunConfig) -> Alarms:
    """The watch of a recipe's run."""
    fixed_betas = with_fixed_beta(config.objectives)
    return Alarms(list(config.objectives), eval_every=config.eval.every, fixed_betas=fixed_betas)


def with_fixed_beta(objectives: Mapping[str, ObjectiveConfig]) -> list[str]:
    """Those whose beta is above 0 and never moves."""
    return [name for name, one in objectives.items() if isinstance(one.beta, FixedBetaConfig) and one.beta.value > 0]


def unmoved(evaluation: Mapping[str, object]) -> list[Alarm]:
    """Args: evaluation: eval.json. Answers that are all what they were, or an objective's scores though answers are
    others: nothing was learned, or the reward cannot see it."""
    answers = evaluation.get("answers")
    if not isinstance(answers, Mapping) or not {"before", "after"} <= answers.keys():
        return []
    before = {entry["id"]: entry for entry in answers["before"]}
    pairs = [(before[entry["id"]], entry) for entry in answers["after"] if entry["id"] in before]
    if not pairs:
        return []
    if any(first["completion"] != second["completion"] for first, second in pairs):
        return _unmoved_scores(pairs)
    return [
        _alarm(
            "evaluation unmoved",
            f"all {len(pairs)} held-out answers are word for word those before training. The weights that answer are "
            "not those that learned, or none learned",
            check="grpo verify RECIPE (gradient flow, it learns, engine and trainer)",
        )
    ]


def _unmoved_scores(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[Alarm]:
    """Args: pairs: entries of eval.json's answers before and after, of the same prompts."""
    found: list[Alarm] = []
    for objective in dict.fromkeys(name for first, _ in pairs for name in first["scores"]):
        own = [pair for pair in pairs if any(one["scores"].get(objective) is not None for one in pair)]
        changed = [pair for pair in own if pair[0]["completion"] != pair[1]["completion"]]
        if len(changed) < MIN_SCORES or any(
            first["scores"].get(objective) != second["scores"].get(objective) for first, second in own
        ):
            continue
        mean = sum(first["scores"][objective] for first, _ in own) / len(own)
        found.append(
            _alarm(
                f"evaluation of {objective} unmoved",
                f"all {len(own)} held-out scores are what they were before training (mean {mean:.3f}), though "
                f"{len(changed)} answers are others. The reward does not see what changed, or can read none of the "
                "answers: look at the examples in eval.json",
                check="grpo verify RECIPE (signal)",
            )
        )
    return found


def still_metric(name: str, values: Sequence[float], *, patience: int = 3) -> list[Alarm]:
    """The same for a validation metric of a training loop of one's own.

    Args:
        name: as the alarm calls it.
        values: one an evaluation, oldest first.
        patience: so many equal values in a row, to the last digit, are no accident.
    Returns:
        An alarm where the last values are so many equal ones; else nothing.
    Raises:
        ValueError: patience is below 2.
    """
    if patience < 2:
        raise ValueError(f"patience is {patience}, but one value alone cannot stand still. Give 2 or more.")
    count = len(values) - next((n for n in range(len(values) - 1, -1, -1) if values[n] != values[-1]), -1) - 1
    if count < patience:
        return []
    return [
        Alarm(
            name=f"{name} unmoved",
            text=f"{name} unmoved: {values[-1]:.4f} in {count} evaluations in a row, to the last digit. What is "
            "evaluated is not what learns, or nothing learns: grpo.diagnostics.own_model.verify_model names the module",
        )
    ]


def learning_rate_alarms(trainable: TrainableConfig, optim: OptimConfig) -> list[Alarm]:
    """A learning rate that was meant for another kind of training, before the first step."""
    is_full = isinstance(trainable, FullTrainable)
    low, high = FULL_RATES if is_full else LORA_RATES
    if isinstance(trainable, PartsTrainable) and any(entry.type == "full" for entry in trainable.parts):
        low = FULL_RATES[0]  # a pretrained part in full takes small rates, a projector and adapters large ones
    if low <= optim.learning_rate <= high:
        return []
    kind, other = ("full training", "LoRA") if is_full else ("LoRA", "full training")
    is_low = optim.learning_rate < low
    others_low, others_high = LORA_RATES if is_full else FULL_RATES
    usual = f", and usual for {other}" if others_low <= optim.learning_rate <= others_high else ""
    meaning = "nothing may be learned" if is_low else "the policy may fall apart within a few steps"
    return [
        _alarm(
            "learning rate",
            f"optim.learning_rate = {optim.learning_rate:g} is {'low' if is_low else 'high'} for "
            f"{kind}{usual}: {meaning}. {low:g} to {high:g} is where {kind} is mostly done",
            check="grpo verify RECIPE (it learns)",
        )
    ]


def _of_the_run(objectives: Sequence[str]) -> list[_Watch]:
    return [
        _Watch(
            name="no gradient",
            patience=3,
            is_met=lambda row: _unless_skipped(row, lambda: row.get(names.GRAD_NORM) == 0),
            text="the gradient's norm has been exactly 0{since}. Every group may be without differences (see "
            "groups/zero_variance_frac), or the graph is cut",
            check="grpo verify RECIPE (gradient flow, accumulation, signal)",
        ),
        _Watch(
            name="no KL",
            patience=5,
            is_met=lambda row: _unless_skipped(row, lambda: _kl_is_zero(row, objectives)),
            text="the KL of every objective has been 0.000{since}, so the policy is its reference: gradients do not "
            "reach it, or are zeroed or overwritten before the optimizer",
            check="grpo verify RECIPE (accumulation, it learns)",
        ),
        _Watch(
            name="no signal",
            patience=5,
            is_met=lambda row: _at_least(row.get(names.ZERO_VARIANCE_FRAC), 1.0),
            text="every completion of a group has had the same score, in every group{since}, so there is nothing to "
            "learn from: easier or harder prompts, a larger rollout.group_size, a higher rollout.temperature, or a "
            "reward with more than two values",
            check="grpo verify RECIPE (signal)",
        ),
        _Watch(
            name="sampler ratio",
            patience=1,
            is_met=lambda row: _above(row.get(names.SAMPLER_RATIO_P99), MAX_SAMPLER_RATIO),
            text="one token in a hundred has probabilities in engine and trainer that differ by a factor of more than "
            f"{MAX_SAMPLER_RATIO:g} (sampler/ratio_p99): dtype=float32 tells rounding from a defect, "
            "update.correction bounds its effect",
            check="grpo verify RECIPE (engine and trainer)",
        ),
        _Watch(
            name="sampler tail",
            patience=3,
            is_met=_tail_alone_is_far,
            text="single tokens have had probabilities in engine and trainer that differ by a factor of more than "
            f"{MAX_SAMPLER_TAIL:g}{{since}} (sampler/ratio_max), where 99 in 100 agree. Something is different for few "
            "tokens, such as the first or the end token, or a mixture's routing; update.correction bounds its effect",
            check="grpo verify RECIPE (engine and trainer)",
        ),
    ]


def _of_an_objective(objective: str) -> list[_Watch]:
    return [
        _Watch(
            name=f"no signal of {objective}",
            patience=10,  # an objective may have one group a step, and easy prompts are all right a few times by chance
            is_met=lambda row: _alone_is_flat(row, objective),
            text="every completion of a group has had the same score, in every group that this objective scored"
            "{since}, so it teaches nothing. All are right, all are wrong, or the reward does not see what differs: "
            "look at completions.jsonl",
            check="grpo verify RECIPE (signal)",
        ),
        _Watch(
            name=f"one-token completions of {objective}",
            patience=3,
            is_met=lambda row: _at_most(row.get(names.length_mean_name(objective)), SHORT_LENGTH),
            text="the mean completion has been no longer than its end token{since}: the policy has found that saying "
            "nothing pays. Look at completions.jsonl; a reward must score an empty answer as wrong",
            check="grpo verify RECIPE (accumulation, signal)",
        ),
        _Watch(
            name=f"truncated completions of {objective}",
            patience=5,
            is_met=lambda row: _at_least(row.get(names.truncated_frac_name(objective)), MOST_TRUNCATED),
            text=f"at least {MOST_TRUNCATED:.0%} of the completions have been cut at rollout.max_new_tokens{{since}}: "
            "raise it, or see whether the end tokens are the chat template's (the first lines of the run name them)",
            check="grpo doctor RECIPE (end tokens), grpo verify RECIPE (engine and trainer)",
        ),
        _Watch(
            name=f"unscored completions of {objective}",
            patience=3,
            is_met=lambda row: _above(row.get(names.unscored_frac_name(objective)), MOST_UNSCORED),
            text=f"more than {MOST_UNSCORED:.0%} of the completions have had no verdict{{since}}; "
            "judge_audit.jsonl says why each failed",
            check="grpo doctor RECIPE (judges), grpo verify RECIPE (signal)",
        ),
    ]


def _of_evaluations(objectives: Sequence[str], every: int) -> list[_Watch]:
    """Each evaluation is compared with the one before it, so that n in a row that are alike are n - 1 rows."""
    patience = max(STILL_EVALUATIONS - 1, math.ceil(STILL_STEPS / every))
    alike = f"at {patience + 1} evaluations in a row"
    run = _Watch(
        name="evaluation unmoved",
        patience=patience,
        is_met=lambda row: _answers_are_still(row, objectives),
        text=f"all held-out answers have been word for word the same {alike}. The weights that answer are not those "
        "that learn, or none learn (at the end of a falling schedule, none need to)",
        check="grpo verify RECIPE (gradient flow, it learns, engine and trainer)",
    )
    return [run, *(_of_evaluated(name, alike, patience) for name in objectives)]


def _of_evaluated(objective: str, alike: str, patience: int) -> _Watch:
    return _Watch(
        name=f"evaluation of {objective} unmoved",
        patience=patience,
        is_met=lambda row: _scores_alone_are_still(row, objective),
        text=f"all held-out scores have been the same {alike}, though each time {MIN_SCORES} answers or more were "
        "others. The reward does not see what changes, or can read none of the answers, or all of them are as good as "
        "they can be: look at evaluations.jsonl",
        check="grpo verify RECIPE (signal)",
    )


def _answers_are_still(row: Row, objectives: Sequence[str]) -> bool | None:
    changed = [n for name in objectives if (n := row.get(names.eval_name(name, "answers_changed"))) is not None]
    return not any(changed) if changed else None


def _scores_alone_are_still(row: Row, objective: str) -> bool | None:
    """None too where so few answers changed that their scores may be equal by chance; that none changed at all is told
    as "evaluation unmoved"."""
    scores = row.get(names.eval_name(objective, "scores_changed"))
    if scores is None or scores > 0:
        return None if scores is None else False
    return True if (row.get(names.eval_name(objective, "answers_changed")) or 0) >= MIN_SCORES else None


def _of_a_fixed_beta(objective: str) -> _Watch:
    return _Watch(
        name=f"KL of {objective} not held",
        patience=3,
        is_met=lambda row: _above(row.get(names.kl_name(objective)), HIGH_KL),
        text=f"it has been above {HIGH_KL} nats a token{{since}}, and a fixed beta does not answer: take one that "
        "moves (type: band), and update.kl.estimator=clamped where single tokens make it (kl/<objective>/max), or a "
        "lower learning rate",
        check="grpo verify RECIPE (KL penalty)",
    )


def _unless_skipped(row: Row, is_met: Callable[[], bool | None]) -> bool | None:
    return None if row.get(names.SKIPPED) else is_met()


def _kl_is_zero(row: Row, objectives: Sequence[str]) -> bool | None:
    kls = [kl for name in objectives if (kl := row.get(names.kl_name(name))) is not None]
    return all(abs(kl) <= NO_KL for kl in kls) if kls else None


def _alone_is_flat(row: Row, objective: str) -> bool | None:
    """None too where no group of any objective differs: "no signal" is told of that."""
    if row.get(names.ZERO_VARIANCE_FRAC) == 1:
        return None
    return _at_least(row.get(names.zero_variance_frac_name(objective)), 1.0)


def _tail_alone_is_far(row: Row) -> bool | None:
    """None where the 99th percentile is far off too: "sampler ratio" is told of that."""
    if _above(row.get(names.SAMPLER_RATIO_P99), MAX_SAMPLER_RATIO):
        return None
    return _above(row.get(names.SAMPLER_RATIO_MAX), MAX_SAMPLER_TAIL)


def _above(value: float | None, bound: float) -> bool | None:
    return None if value is None else value > bound


def _at_least(value: float | None, bound: float) -> bool | None:
    return None if value is None else value >= bound


def _at_most(value: float | None, bound: float) -> bool | None:
    return None if value is None else value <= bound
