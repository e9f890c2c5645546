"""Held-out prompts -> greedy answers -> scores per objective and per kind, with intervals.

Knows engines and scorers; knows no training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo import metrics as names
from grpo.formats.bbq import BbqAnswer, bbq_summary
from grpo.metrics import bootstrap_difference, bootstrap_mean
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import RolloutEngine, SamplingParams
from grpo.runtime.distributed import Ranks
from grpo.scoring import Scorer
from grpo.types import Prompt, RolloutGroup, ScoredGroup
from rewards.choice import given_choices


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One held-out prompt, answered and scored."""

    prompt: Prompt
    completion: str
    scores: Mapping[str, float | None]
    """Objective -> score, None where there is no verdict."""

    @property
    def kind(self) -> str:
        """The scene's kind, such as "ambiguous"; "all" where the dataset has none."""
        return str(self.prompt.meta.get("kind", "all"))


def evaluate(
    engine: RolloutEngine,
    scorer: Scorer,
    prompts: Sequence[EncodedPrompt],
    *,
    params: SamplingParams,
    ranks: Ranks | None = None,
) -> list[Answer]:
    """One greedy answer per prompt, without penalties or filters, scored; in the prompts' order.

    Args:
        ranks: answer a share each; every rank gets all answers. This process alone where None.
    """
    greedy = SamplingParams(
        temperature=0.0,
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=params.min_new_tokens,
        end_token_ids=params.end_token_ids,
    )

    def answered_here() -> list[Answer]:
        groups = _in_order(engine, prompts if ranks is None else ranks.own(prompts), greedy)
        return [_answer(future.result()) for future in [scorer.submit(group) for group in groups]]

    found = answered_here() if ranks is None else ranks.gather_from(answered_here)
    answers = {answer.prompt.id: answer for answer in found}
    return [answers[prompt.prompt.id] for prompt in prompts]


def _in_order(engine: RolloutEngine, prompts: Sequence[EncodedPrompt], params: SamplingParams) -> list[RolloutGroup]:
    # similar lengths side by side: padding is computed too
    by_length = sorted(prompts, key=lambda prompt: len(prompt.token_ids))
    groups = {group.prompt.id: group for group in engine.sample(by_length, 1, params=params, seed=0)}
    return [groups[prompt.prompt.id] for prompt in prompts]


def _answer(group: ScoredGroup) -> Answer:
    rollout = group.rollout
    return Answer(
        prompt=rollout.prompt,
        completion=rollout.completions[0].text,
        scores={name: verdict.value for name, verdict in group.verdicts[0].items()},
    )


def summarise(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """objective -> mean, low, high (95% bootstrap), n, unscored, and each kind's mean ("kinds") and interval.

    A policy that always says "unknown" is seen for what it is: its kinds lie at 1 and 0.
    """
    result: dict[str, dict[str, Any]] = {}
    for name in _objectives(answers):
        own = [(answer, answer.scores[name]) for answer in answers if name in answer.scores]
        scored = [(answer, value) for answer, value in own if value is not None]
        if not scored:
            continue  # no verdict at all: absent, not 0
        interval = bootstrap_mean([value for _, value in scored])
        kinds: dict[str, list[float]] = {}
        for answer, value in sorted(scored, key=lambda pair: pair[0].kind):
            kinds.setdefault(answer.kind, []).append(value)
        result[name] = {
            "mean": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "n": len(scored),
            "unscored": len(own) - len(scored),
            "kinds": {kind: sum(values) / len(values) for kind, values in kinds.items()},
            "kind_intervals": {kind: _with_interval(values) for kind, values in kinds.items()},
        }
    return result


def compare(before: Sequence[Answer], after: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """objective -> paired difference after - before with its 95% interval, over prompts scored both times."""
    result: dict[str, dict[str, float]] = {}
    for name in _objectives(before):
        pairs = [
            (first, second)
            for b, a in zip(before, after, strict=True)
            if (first := b.scores.get(name)) is not None and (second := a.scores.get(name)) is not None
        ]
        if pairs:
            interval = bootstrap_difference([first for first, _ in pairs], [second for _, second in pairs])
            result[name] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return result


def figures(answers: Sequence[Answer], earlier: Mapping[str, Answer]) -> dict[str, float]:
    """What metrics.jsonl says of an evaluation during the run.

    Args:
        earlier: prompt's id -> its answer at the evaluation before; empty where there was none. Only prompts that both
            have are compared, and of their scores only those that are there both times.
    """
    result: dict[str, float] = {}
    for name in _objectives(answers):
        own = [answer for answer in answers if name in answer.scores]
        values = [value for answer in own if (value := answer.scores[name]) is not None]
        result[names.eval_name(name, "unscored_frac")] = 1 - len(values) / len(own)
        if values:
            interval = bootstrap_mean(values)
            result[names.eval_name(name)] = interval.mean
            result[names.eval_name(name, "low")] = interval.low
            result[names.eval_name(name, "high")] = interval.high
        pairs = [(earlier[answer.prompt.id], answer) for answer in own if answer.prompt.id in earlier]
        if pairs:
            scores = [(before.scores.get(name), after.scores[name]) for before, after in pairs]
            result[names.eval_name(name, "answers_changed")] = sum(b.completion != a.completion for b, a in pairs)
            both = [(before, after) for before, after in scores if before is not None and after is not None]
            result[names.eval_name(name, "scores_changed")] = sum(before != after for before, after in both)
    return result


def examples(before: Sequence[Answer], after: Sequence[Answer], *, count: int = 3) -> list[dict[str, Any]]:
    """Prompts with both answers, spread over the kinds; those that changed first."""
    pairs = list(zip(before, after, strict=True))
    pairs.sort(key=lambda pair: pair[0].completion == pair[1].completion)
    chosen: list[tuple[Answer, Answer]] = []
    for pair in pairs:
        if pair[0].kind not in {other.kind for other, _ in chosen}:
            chosen.append(pair)
    chosen += [pair for pair in pairs if pair not in chosen]
    return [
        {
            "prompt": b.prompt.messages[-1].content,
            "reference": b.prompt.reference,
            "kind": b.kind,
            "before": b.completion,
            "after": a.completion,
        }
        for b, a in chosen[:count]
    ]


def bias_of(answers: Sequence[Answer]) -> dict[str, Any]:
    """BBQ's category -> its accuracy and bias scores, where the prompts are BBQ's; else empty."""
    by_category: dict[str, list[BbqAnswer]] = {}
    for answer in answers:
        meta = answer.prompt.meta
        if not {"is_negative", "unknown", "target", "category"} <= meta.keys():
            continue
        given = given_choices(answer.completion, meta["choices"])
        by_category.setdefault(meta["category"], []).append(
            BbqAnswer(
                kind=answer.kind,
                is_negative=meta["is_negative"],
                given=given.pop() if len(given) == 1 else None,
                reference=answer.prompt.reference or "",
                unknown=meta["unknown"],
                target=meta["target"],
            )
        )
    return bbq_summary(by_category)


def _objectives(answers: Sequence[Answer]) -> list[str]:
    return list(dict.fromkeys(name for answer in answers for name in answer.scores))


def _with_interval(values: Sequence[float]) -> dict[str, float]:
    interval = bootstrap_mean(values)
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "n": len(values)}
