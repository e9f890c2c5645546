"""It learns: one real step moves parameters, KL and log-probabilities the right way. The step is undone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from grpo.batching import MicroBatch, TrainBatch
from grpo.diagnostics.checks.numbers import judge_resolution
from grpo.diagnostics.checks.subject import Subject, undone
from grpo.diagnostics.findings import Finding
from grpo.runtime.policy import dropout_off
from grpo.update.forward import policy_pass, reference_logprobs
from grpo.update.kl import kl_penalty
from grpo.update.step import UpdateStats

CHECK = "it learns"
LARGER, SMALLER = 10.0, 0.1
"""The same step, so many times as large, is looked at too: the true one may be lost in rounding, or overshoot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEffect:
    """What one step did."""

    num_moved: int
    """Tensors that are not what they were."""
    num_tensors: int
    largest_move: float
    """Of any entry."""
    lost_in_bfloat16: float
    """Share of the entries that moved whose new value bfloat16 could not tell from the old."""
    kl: float
    """Mean k3 to the reference per token, in nats, after the step."""
    gain: float
    """Mean over loss tokens of advantage times change of log-probability, in nats: what the policy gradient raises."""
    gain_if_larger: float
    """The same for a step LARGER times as large."""
    gain_if_smaller: float
    """The same for a step SMALLER times as large."""
    skipped: str
    """Why no step was taken; empty where one was."""


def check_learning(subject: Subject) -> Iterator[Finding]:
    """One step at the recipe's full learning rate."""
    effect = step_effect(subject)
    yield judge_effect(effect, has_made_up_scores=subject.has_made_up_scores)
    if effect.num_moved:
        yield judge_resolution(effect.lost_in_bfloat16)


def step_effect(subject: Subject) -> StepEffect:
    """Take the step, look, and undo it."""
    updater, policy = subject.parts.updater, subject.parts.policy
    batch = subject.batch(subject.teaching)
    parameters = policy.trainable_parameters()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with undone(updater), dropout_off(policy.model):
        old = _logprobs(subject, batch)
        stats = _full_step(subject, batch)
        after = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        moves = {name: after[name] - before[name] for name in parameters}
        kl, gain = _kl(subject, batch), _gain(batch, old, _logprobs(subject, batch))
        others: list[float] = []
        for scale in (LARGER, SMALLER):
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(before[name] + scale * moves[name])
            others.append(_gain(batch, old, _logprobs(subject, batch)))
    moved = [name for name, move in moves.items() if bool(move.any())]
    num_entries = sum(int((moves[name] != 0).sum()) for name in moved)
    num_lost = sum(
        int(((moves[name] != 0) & (before[name].bfloat16() == after[name].bfloat16())).sum()) for name in moved
    )
    return StepEffect(
        num_moved=len(moved),
        num_tensors=len(parameters),
        largest_move=max((float(moves[name].abs().max()) for name in moved), default=0.0),
        lost_in_bfloat16=num_lost / num_entries if num_entries else 0.0,
        kl=kl,
        gain=gain,
        gain_if_larger=others[0],
        gain_if_smaller=others[1],
        skipped=stats.skipped.cause if stats.skipped else "",
    )


def judge_effect(effect: StepEffect, *, has_made_up_scores: bool) -> Finding:
    """Args: has_made_up_scores: no group of the batch had differing ones."""
    source = ", with made-up scores" if has_made_up_scores else ""
    figures = asdict(effect)
    if effect.skipped:
        return Finding(
            check=CHECK,
            status="failed",
            what=f"no step could be taken: {effect.skipped}",
            meaning="the first step of a run would be skipped too",
            remedy="see the row 'numbers' for the first module at fault",
            figures=figures,
        )
    if effect.num_moved == 0:
        return Finding(
            check=CHECK,
            status="failed",
            what=f"one step moved no parameter{source}",
            meaning="nothing would be learned",
            remedy="look at the row 'gradient flow', and that optim.learning_rate is above 0",
            figures=figures,
        )
    what = f"one step{source}: {effect.num_moved} of {effect.num_tensors} tensors moved, by up to "
    what += f"{effect.largest_move:.1e}; KL {effect.kl:.1e} nats; advantage-weighted change of log-probability "
    what += f"{effect.gain:+.1e} nats"
    if effect.gain > 0:
        return Finding(check=CHECK, status="ok", what=what, figures=figures)
    told, meaning, remedy = _why_not(effect)
    is_lost = bool(told)
    return Finding(
        check=CHECK,
        status="warning" if is_lost else "failed",
        what=what + told,
        meaning=meaning,
        remedy=remedy,
        figures=figures,
    )


def _why_not(effect: StepEffect) -> tuple[str, str, str]:
    """(what a step of another size shows, meaning, remedy) of a step that did not raise what was rewarded; the first
    is empty where no size would."""
    if effect.kl <= 0 and effect.gain == 0:
        return (
            "",
            "parameters moved, but the log-probabilities are what they were: what learns is not what is used",
            "look at the row 'gradient flow'; a learning rate below the products' rounding does this too: raise "
            "optim.learning_rate, or set dtype=float32",
        )
    if effect.gain_if_smaller > 0 and effect.gain < -effect.gain_if_smaller:
        return (
            f"; {effect.gain_if_smaller:+.1e} with a step {SMALLER:g} times as large",
            "the step overshoots: it goes the right way, and too far",
            f"lower optim.learning_rate to {SMALLER:g} of what it is",
        )
    if effect.gain_if_larger > LARGER * abs(effect.gain):
        return (
            f"; {effect.gain_if_larger:+.1e} with a step {LARGER:g} times as large",
            "one step is lost in rounding: it takes many to see progress",
            "raise optim.learning_rate (LoRA takes ten times that of full training), or set dtype=float32",
        )
    return (
        "",
        "the step makes what was rewarded less likely, or not more: the loss has another sign, or the KL or entropy "
        "term outweighs the policy's",
        "look at the sign of a loss of one's own (it is minimised), the betas, and update.entropy",
    )


def _full_step(subject: Subject, batch: TrainBatch) -> UpdateStats:
    """A step past the learning rate's warm-up, where the run is long enough to have one."""
    steps, optim = subject.config.steps, subject.config.optim
    return subject.parts.updater.step(batch, step=min(optim.warmup_steps, steps - 1), steps=steps)


@torch.no_grad()
def _logprobs(subject: Subject, batch: TrainBatch) -> list[Tensor]:
    """[B, T] of each micro-batch, on the CPU."""
    policy = subject.parts.policy
    own = (micro_batch.to(policy.device) for micro_batch in batch.micro_batches)
    return [policy_pass(policy, one, subject.parts.params).logprobs.cpu() for one in own]


@torch.no_grad()
def _kl(subject: Subject, batch: TrainBatch) -> float:
    policy, params = subject.parts.policy, subject.parts.params
    total = 0.0
    for one in (micro_batch.to(policy.device) for micro_batch in batch.micro_batches):
        plain = policy_pass(policy, one, params).plain_logprobs
        k3 = kl_penalty(plain, reference_logprobs(policy, one, params), estimator="k3", mask=one.completion_mask)
        total += float(k3.sum())
    return total / batch.num_tokens


def _gain(batch: TrainBatch, old: list[Tensor], new: list[Tensor]) -> float:
    def of(one: MicroBatch, change: Tensor) -> float:
        return float((one.advantages[:, None] * change * one.completion_mask).double().sum())

    pairs = zip(batch.micro_batches, old, new, strict=True)
    return sum(of(one, after - before) for one, before, after in pairs) / batch.num_tokens
