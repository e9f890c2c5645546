"""Several judges' judgements of one text -> one. Pure: knows no pool. No quorum, no number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, median, pstdev

from judges.config import EnsembleConfig
from judges.types import Failed, FailureKind, Judgement, Scored, Usage


def combine(judgements: Sequence[Judgement], config: EnsembleConfig) -> Judgement:
    """The panel's judgement (arXiv:2404.18796).

    Returns:
        Scored with the judges' standard deviation; Failed where fewer than the quorum gave a verdict ("quorum"), or
        they are too far apart or without a majority ("disagreement"). The fault is the completion's where it is so for
        every judge that failed.
    """
    scored = [one for one in judgements if isinstance(one, Scored)]
    failed = [one for one in judgements if isinstance(one, Failed)]
    if len(scored) < config.quorum:
        causes = "; ".join(f"{one.kind}: {one.detail}" for one in failed)
        fault_is_completions = all(one.fault == "completion" for one in failed)
        detail = f"{len(scored)} of {len(judgements)} judges gave a verdict, {config.quorum} are needed; {causes}"
        return _failed(judgements, "quorum", detail, is_completions=fault_is_completions)
    values = [one.value for one in scored]
    disagreement = pstdev(values)
    if config.max_disagreement is not None and disagreement > config.max_disagreement:
        detail = f"the judges' scores {_listed(values)} have a standard deviation of {disagreement:.3g}"
        return _failed(judgements, "disagreement", detail)
    value = _reduced(values, config)
    if value is None:
        return _failed(judgements, "disagreement", f"the judges' scores {_listed(values)} have no majority")
    return Scored(
        value=value,
        raw="\n".join(one.raw for one in scored),
        usage=_usage(judgements),
        attempts=sum(one.attempts for one in judgements),
        cost=_cost(judgements),
        endpoint="+".join(one.endpoint for one in scored),
        origin=scored[0].origin if len({one.origin for one in scored}) == 1 else "asked",
        disagreement=disagreement,
    )


def _reduced(values: Sequence[float], config: EnsembleConfig) -> float | None:
    if config.reduce == "majority":
        value, count = Counter(values).most_common(1)[0]
        return value if count > len(values) / 2 else None
    return {"mean": fmean, "median": median, "min": min}[config.reduce](values)


def _failed(judgements: Sequence[Judgement], kind: FailureKind, detail: str, *, is_completions: bool = False) -> Failed:
    return Failed(
        kind=kind,
        attempts=sum(one.attempts for one in judgements),
        fault="completion" if is_completions else "judge",
        detail=detail[:300],
        usage=_usage(judgements),
        cost=_cost(judgements),
    )


def _usage(judgements: Sequence[Judgement]) -> Usage | None:
    total: Usage | None = None
    for one in judgements:
        if one.usage is not None:
            total = one.usage if total is None else total.plus(one.usage)
    return total


def _cost(judgements: Sequence[Judgement]) -> float | None:
    """Unknown as soon as one part of it is."""
    costs = [one.cost for one in judgements]
    return None if None in costs else sum(cost for cost in costs if cost is not None)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
