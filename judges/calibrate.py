"""Gold rows -> how far a judge agrees with them, and with itself. Knows no recipes and no command line."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from judges.config import JudgeConfig
from judges.errors import JudgeConfigError
from judges.opening import open_pool
from judges.prompts import Rubric
from judges.seams import Judging
from judges.statistics import (
    Confusion,
    Estimate,
    agreement_interval,
    flip_rate,
    kappa_interval,
    score_length_correlation,
)
from judges.strict_json import strict_loads
from judges.types import Failed, Judgement, JudgeRequest, Scored

GoldFormat: TypeAlias = Literal["rows", "halueval"]

YES_NO = {"yes": True, "no": False, "true": True, "false": False, "good": True, "bad": False}
MAX_PROBLEMS_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldRow:
    """A completion that people have judged."""

    question: str
    """What it answers."""
    completion: str
    """The text."""
    reference: str | None = None
    """The right answer, where there is one."""
    label: bool | None = None
    """Whether it is good; None where `score` says how good."""
    score: float | None = None
    """On the judge's scale; None where there is a label."""

    def is_good(self, threshold: float) -> bool:
        """The label, or whether the score reaches the threshold."""
        if self.label is not None:
            return self.label
        assert self.score is not None
        return self.score >= threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What is known of a judge after it has been asked about gold rows."""

    threshold: float
    """A score of at least so much means "good"."""
    num_rows: int
    """Gold rows."""
    num_scored: int
    """Of them, those that got a verdict; the rest are in none of the figures below but `failures`."""
    agreement: Estimate | None
    """Share of rows with the label's verdict, and its bootstrap interval; None without a verdict."""
    kappa: Estimate | None
    """Cohen's, beyond chance; None where it has no value."""
    confusion: Confusion
    """At the threshold."""
    num_repeats: int
    """Times that each row was asked about."""
    flip_rate: float | None
    """Share of pairs of verdicts on one row that differ; None where no row has two."""
    score_length_correlation: float | None
    """Spearman's, with the completion's length in characters."""
    failures: dict[str, int]
    """Judgements without a verdict, of all repeats, by kind."""
    last_failure: str
    """The detail of the last of them; "" without one."""
    cost: float | None
    """Money for all judgements; None where it is unknown."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def run_calibration(
    config: JudgeConfig,
    rubric: Rubric,
    rows: Sequence[GoldRow],
    *,
    threshold: float | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> Calibration:
    """`calibrate` with the judge that a config describes, in an event loop of its own.

    Args:
        threshold: the middle of the judge's scale where None.
    Raises:
        JudgeConfigError: a setting is wrong, or the threshold lies outside of the scale.
        JudgeError: the judge cannot be had.
    """
    if threshold is None:
        threshold = default_threshold(config)
    if not config.scale.low < threshold <= config.scale.high:
        raise JudgeConfigError(
            f"the threshold is {threshold:g}; expected above {config.scale.low:g} and at most {config.scale.high:g}, "
            "the judge's scale"
        )

    async def run() -> Calibration:
        async with open_pool(config, rubric) as pool:
            return await calibrate(pool, rows, criterion=rubric.name, threshold=threshold, repeats=repeats, seed=seed)

    return asyncio.run(run())


async def calibrate(
    judging: Judging,
    rows: Sequence[GoldRow],
    *,
    criterion: str,
    threshold: float,
    repeats: int = 1,
    in_flight: int = 64,
    seed: int = 0,
) -> Calibration:
    """Ask about every row, `repeats` times, and compare.

    Args:
        judging: the judge.
        rows: [N], at least one. Those that share question and reference are judged together, as a group would be.
        criterion: what is judged; the rubric's name.
        threshold: of a good score.
        repeats: verdicts asked for on each row; the first counts, the others say how steady it is.
        in_flight: rows asked about at a time.
        seed: of the bootstrap.
    Raises:
        JudgeConfigError: the judge cannot be asked at all.
    """
    groups: dict[tuple[str, str | None], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault((row.question, row.reference), []).append(place)
    slots = asyncio.Semaphore(in_flight)
    judgements: list[list[Judgement]] = [[] for _ in rows]

    async def ask(places: Sequence[int]) -> None:
        for repeat in range(repeats):
            requests = [_request(rows[place], place, criterion, repeat) for place in places]
            async with slots:  # the pool's deadline begins when a group is asked about, not when the file is read
                answers = await judging.judge(requests)
            for place, judgement in zip(places, answers, strict=True):
                judgements[place].append(judgement)

    try:
        async with asyncio.TaskGroup() as tasks:
            for places in groups.values():
                tasks.create_task(ask(places))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return compare(rows, judgements, threshold=threshold, seed=seed)


def compare(
    rows: Sequence[GoldRow], judgements: Sequence[Sequence[Judgement]], *, threshold: float, seed: int = 0
) -> Calibration:
    """The figures. Args: judgements: [N][R], of each row the repeats."""
    scores = [[one.value if isinstance(one, Scored) else None for one in repeats] for repeats in judgements]
    firsts = [repeats[0] for repeats in scores]
    scored = [(row, score) for row, score in zip(rows, firsts, strict=True) if score is not None]
    confusion = Confusion.count(
        [row.is_good(threshold) for row, _ in scored], [score >= threshold for _, score in scored]
    )
    every = [one for repeats in judgements for one in repeats]
    failed = [one for one in every if isinstance(one, Failed)]
    costs = [one.cost for one in every]
    return Calibration(
        threshold=threshold,
        num_rows=len(rows),
        num_scored=len(scored),
        agreement=agreement_interval(confusion, seed=seed),
        kappa=kappa_interval(confusion, seed=seed),
        confusion=confusion,
        num_repeats=max((len(repeats) for repeats in judgements), default=0),
        flip_rate=flip_rate([[None if one is None else one >= threshold for one in repeats] for repeats in scores]),
        score_length_correlation=score_length_correlation(firsts, [len(row.completion) for row in rows]),
        failures=dict(Counter(one.kind for one in failed)),
        last_failure=failed[-1].detail if failed else "",
        cost=None if None in costs else math.fsum(cost for cost in costs if cost is not None),
    )


def default_threshold(config: JudgeConfig) -> float:
    """The middle of the judge's scale."""
    return (config.scale.low + config.scale.high) / 2


def read_gold(path: Path, *, format: GoldFormat = "rows") -> list[GoldRow]:
    """Gold rows of a JSON-lines file.

    Args:
        path: each line an object.
        format: "rows": `question`, `completion`, `reference` (optional) and either `label` (true/false, 1/0,
            "yes"/"no", "good"/"bad") or `score`. "halueval": HaluEval's general_data.json, where a response is good
            that people call no hallucination.
    Raises:
        JudgeConfigError: the file cannot be read, or a line is no gold row; the lines are named.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: U+2028 may stand in a JSON string
    except (OSError, UnicodeDecodeError) as exc:
        raise JudgeConfigError(f"gold file {path} cannot be read: {exc}") from exc
    parse = _halueval_row if format == "halueval" else _gold_row
    rows, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = strict_loads(line)
            if not isinstance(content, dict):
                raise ValueError("expected an object with the keys of a gold row")
            rows.append(parse(content))
        except ValueError as exc:
            problems.append(f"line {number}: {exc}")
    if problems:
        shown = "; ".join(problems[:MAX_PROBLEMS_SHOWN])
        more = f"; and {len(problems) - MAX_PROBLEMS_SHOWN} more" if len(problems) > MAX_PROBLEMS_SHOWN else ""
        raise JudgeConfigError(f"gold file {path}: {shown}{more}")
    if not rows:
        raise JudgeConfigError(f"gold file {path} holds no row")
    return rows


def _request(row: GoldRow, place: int, criterion: str, repeat: int) -> JudgeRequest:
    return JudgeRequest(
        id=f"gold#{place}.{repeat}",
        question=row.question,
        completion=row.completion,
        reference=row.reference,
        criterion=criterion,
        sample_index=repeat,
    )


def _gold_row(content: Mapping[str, Any]) -> GoldRow:
    known = ("question", "completion", "reference", "label", "score")
    label, score = content.get("label"), content.get("score")
    if (label is None) == (score is None):
        raise ValueError(f"expected either label or score, among {', '.join(known)}")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise ValueError(f"score is {score!r}; expected a number")
    reference = content.get("reference")
    return GoldRow(
        question=_text(content, "question"),
        completion=_text(content, "completion"),
        reference=None if reference is None else _text(content, "reference"),
        label=None if label is None else _label(label),
        score=None if score is None else float(score),
    )


def _halueval_row(content: Mapping[str, Any]) -> GoldRow:
    """HaluEval's general data: user queries, ChatGPT's responses and people's labels (arXiv:2305.11747)."""
    hallucination = content.get("hallucination")
    if not isinstance(hallucination, str) or hallucination.strip().lower() not in ("yes", "no"):
        raise ValueError(f'hallucination is {hallucination!r}; expected "yes" or "no"')
    return GoldRow(
        question=_text(content, "user_query"),
        completion=_text(content, "chatgpt_response"),
        label=hallucination.strip().lower() == "no",
    )


def _text(content: Mapping[str, Any], key: str) -> str:
    value = content.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is {_kind(value)}; expected a text")
    return value


def _label(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in YES_NO:
        return YES_NO[value.strip().lower()]
    raise ValueError(f"label is {value!r}; expected true or false, 1 or 0, or one of {', '.join(YES_NO)}")


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
