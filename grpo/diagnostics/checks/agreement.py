"""Engine and trainer: do they mean the same distribution, and does the engine do what it is told?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo.batching import TrainBatch
from grpo.diagnostics.checks.subject import Subject
from grpo.diagnostics.findings import Finding
from grpo.errors import ConfigError, EngineError
from grpo.rollout.base import SamplingParams
from grpo.rollout.canary import check_engine_follows
from grpo.runtime.policy import dropout_off
from grpo.types import RolloutGroup, ScoredGroup, Verdict
from grpo.update.forward import policy_pass, replay_of

CHECK = "engine and trainer"
MAX_GAP = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Mean difference of log-probabilities, in nats, that is rounding."""
ROUNDED_GAP = 0.1
"""The same in dtypes of fewer digits: 0.02 to 0.06 between two programs that are both right."""
FAULTY_TIMES = 3.0
"""A difference so many times as large is no rounding."""
COLD, HOT = 0.5, 1.5
"""Temperatures that are compared."""
MIN_DIFFERENCE = 1.0
"""Nats of entropy between them; the estimate from some hundred tokens is off by some tenths."""
NUM_SAMPLES, NUM_TOKENS = 8, 12
"""For each law that is tried out, after one prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Sampler against trainer, over the tokens of some completions."""

    mean: float
    """Absolute difference of log-probabilities, in nats."""
    largest: float
    entropy: float
    """Of the trainer's law at these places, in nats."""
    surprise: float
    """Minus the sampler's mean log-probability: an estimate of its law's entropy."""
    num_tokens: int
    num_forced: int
    """Tokens that the replayed filters would have dropped."""


def check_agreement(subject: Subject) -> Iterator[Finding]:
    """Compare log-probabilities under the recipe's law, at two temperatures and under penalties; then the end tokens
    and whether a disturbed adapter changes what is sampled."""
    most = MAX_GAP.get(subject.parts.policy.compute_dtype, ROUNDED_GAP)
    plan = [group.rollout for group in subject.groups if any(one.token_ids for one in group.rollout.completions)]
    if not plan:
        yield _nothing_sampled()
        return
    yield judge_gap("", measure_gap(subject, plan[:4], subject.parts.params), most)
    yield from _temperatures(subject, most)
    yield from _penalties(subject, most)
    yield from judge_ends(subject.groups, subject.parts.params)
    yield _follows(subject)


def measure_gap(subject: Subject, groups: Sequence[RolloutGroup], params: SamplingParams) -> Gap:
    """Args: params: the law that the groups were sampled by."""
    gaps: list[Tensor] = []
    surprise = entropy = 0.0
    num_forced = 0
    policy = subject.parts.policy
    with torch.no_grad(), dropout_off(policy.model):
        for one in (micro.to(policy.device) for micro in _unscored_batch(subject, groups).micro_batches):
            replay = replay_of(one, params)
            forward = policy_pass(policy, one, params, replay=replay)
            mask = one.completion_mask
            gaps.append((forward.logprobs - one.sampler_logprobs)[mask].abs().cpu())
            surprise -= float(one.sampler_logprobs[mask].sum())
            entropy += float(forward.entropy[mask].sum())
            num_forced += replay.num_forced
    every = torch.cat(gaps)
    return Gap(
        mean=float(every.mean()),
        largest=float(every.max()),
        entropy=entropy / len(every),
        surprise=surprise / len(every),
        num_tokens=len(every),
        num_forced=num_forced,
    )


def judge_gap(law: str, gap: Gap, most: float) -> Finding:
    """Args: law: what was sampled under, in words; most: nats that are rounding."""
    what = f"sampler and trainer{law} differ by {gap.mean:.1e} nats a token, at most {gap.largest:.1e}"
    what += f", over {gap.num_tokens} tokens"
    figures = {"mean": gap.mean, "largest": gap.largest, "num_tokens": gap.num_tokens, "num_forced": gap.num_forced}
    if gap.num_forced > 0.01 * gap.num_tokens:
        what += f"; {gap.num_forced} tokens lie outside what the replayed filters keep"
    elif gap.mean <= most:
        return Finding(check=CHECK, status="ok", what=what, figures=figures)
    is_wrong = not gap.mean <= FAULTY_TIMES * most
    return Finding(
        check=CHECK,
        status="failed" if is_wrong else "warning",
        what=what,
        meaning="the trainer computes probabilities of another distribution than was sampled from: the ratio is not 1 "
        "where nothing has been learned yet"
        if is_wrong
        else "more than rounding usually comes to: ratios are noisy",
        remedy="compare dtype, attention and the chat template of engine and trainer, and look at custom processors; "
        "update.correction weighs out what cannot be mended",
        figures=figures,
    )


def judge_temperatures(cold: Gap, hot: Gap) -> Finding:
    """The hotter law must be the more random one, by about what the trainer computes."""
    expected, seen = hot.entropy - cold.entropy, hot.surprise - cold.surprise
    what = f"entropy {cold.surprise:.2f} nats at temperature {COLD:g}, {hot.surprise:.2f} at {HOT:g} as sampled; "
    what += f"{cold.entropy:.2f} and {hot.entropy:.2f} as computed"
    figures = {"sampled": [cold.surprise, hot.surprise], "computed": [cold.entropy, hot.entropy]}
    if expected < MIN_DIFFERENCE:
        what += "; too alike to judge by entropy, and the log-probabilities are compared above"
        return Finding(check=CHECK, status="ok", what=what, figures=figures)
    if seen >= expected / 3:
        return Finding(check=CHECK, status="ok", what=what, figures=figures)
    return Finding(
        check=CHECK,
        status="failed",
        what=what,
        meaning="the engine does not follow the temperature: it samples, or reports, the same distribution at both",
        remedy="look for a temperature, do_sample=False or top_k in the model's generation config or the server's "
        "defaults that overrides the request's",
        figures=figures,
    )


def judge_ends(groups: Sequence[ScoredGroup], params: SamplingParams) -> Iterator[Finding]:
    """Completions that say they ended must end with an end token, and none has one before its last place."""
    completions = [one for group in groups for one in group.rollout.completions]
    ends = set(params.end_token_ids)
    early = [one for one in completions if ends.intersection(one.token_ids[:-1])]
    without = [one for one in completions if one.finish_reason == "stop" and not ends.intersection(one.token_ids[-1:])]
    ended = sum(one.finish_reason == "stop" for one in completions)
    what = f"{ended} of {len(completions)} completions ended by one of the end tokens {sorted(ends)}"
    figures = {"ended": ended, "completions": len(completions), "early": len(early), "without": len(without)}
    if early or without:
        yield Finding(
            check=CHECK,
            status="failed",
            what=f"{len(early)} completions go on after an end token, {len(without)} ended without one",
            meaning="the trainer learns from tokens that are no answer, or never sees how an answer ends",
            remedy="give the engine the end tokens of rollout.end_tokens; look at its stop settings",
            figures=figures,
        )
    elif ended == 0:
        yield Finding(
            check=CHECK,
            status="warning",
            what=what,
            meaning="every completion was cut at rollout.max_new_tokens: nothing shows that the model can end, and "
            "rewards see half an answer",
            remedy="raise rollout.max_new_tokens, or name the model's end token in rollout.end_tokens",
            figures=figures,
        )
    else:
        yield Finding(check=CHECK, status="ok", what=what, figures=figures)


def _temperatures(subject: Subject, most: float) -> Iterator[Finding]:
    plain = SamplingParams(end_token_ids=subject.parts.params.end_token_ids, max_new_tokens=NUM_TOKENS)
    measured: list[Gap] = []
    for temperature in (COLD, HOT):
        law = replace(plain, temperature=temperature)
        groups = _sampled(subject, law)
        if isinstance(groups, Finding):
            yield groups
            return
        measured.append(measure_gap(subject, groups, law))
        if measured[-1].mean > most:
            yield judge_gap(f" at temperature {temperature:g}", measured[-1], most)
    yield judge_temperatures(*measured)


def _penalties(subject: Subject, most: float) -> Iterator[Finding]:
    law = SamplingParams(
        end_token_ids=subject.parts.params.end_token_ids,
        max_new_tokens=NUM_TOKENS,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
    )
    groups = _sampled(subject, law)
    if isinstance(groups, Finding):
        yield groups
    else:
        yield judge_gap(" under penalties", measure_gap(subject, groups, law), most)


def _sampled(subject: Subject, params: SamplingParams) -> list[RolloutGroup] | Finding:
    """A group of another law; where the engine was started for the recipe's own alone, that is told."""
    prompts = subject.parts.encode([subject.groups[0].rollout.prompt])
    try:
        return list(subject.parts.engine.sample(prompts, NUM_SAMPLES, params=params, seed=0))
    except ConfigError as exc:
        return Finding(
            check=CHECK,
            status="warning",
            what=f"not judged under other laws than the recipe's: {exc}",
            meaning="only the recipe's own temperature and penalties are compared",
            remedy="verify with rollout.engine.type=transformers to see the trainer's side of it",
        )


def _follows(subject: Subject) -> Finding:
    parts = subject.parts
    (prompt,) = parts.encode([subject.groups[0].rollout.prompt])
    try:
        check_engine_follows(parts.engine, parts.policy, prompt, parts.params)
    except EngineError as exc:
        return Finding(
            check=CHECK,
            status="failed",
            what=str(exc),
            meaning="the completions would come from another policy than the one that learns",
            remedy="look at rollout.engine.sync; restart the engine's servers with the recipe's model",
        )
    return Finding(check=CHECK, status="ok", what="disturbed weights change the engine's answers, and come out again")


def _nothing_sampled() -> Finding:
    return Finding(
        check=CHECK,
        status="failed",
        what="every completion is empty",
        meaning="there is nothing to learn from",
        remedy="look at the chat template and at rollout.end_tokens: the model ends at its first token",
    )


def _unscored_batch(subject: Subject, groups: Sequence[RolloutGroup]) -> TrainBatch:
    """Every completion is in it, whatever its score."""
    names = list(subject.config.objectives)
    scored = [
        ScoredGroup(
            rollout=group,
            verdicts=tuple(
                {name: Verdict(value=float(k % 2), parts={}) for name in group.prompt.objectives or names}
                for k in range(len(group.completions))
            ),
        )
        for group in groups
    ]
    return subject.batch(scored, keeps_truncated=True)
