"""Question -> Answer -> Judgement: what all modes share. Knows no prompts, no endpoints and no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from judges.types import Call, Failed, Judgement, JudgeRequest, Origin, Scored, Usage, Verdict
from judges.verdicts import Mode as ModeName


@dataclass(frozen=True, slots=True)
class Question:
    """What one call asks about. Equal questions are asked once."""

    mode: ModeName
    """Which form the prompt and the verdict have."""
    question: str
    """What the texts answer."""
    reference: str | None
    """The right answer, where there is one."""
    criterion: str
    """What is judged."""
    completions: tuple[str, ...]
    """[N] the texts to be judged, in the order in which the judge sees them; 1 for pointwise, 2 for pairwise."""
    sample_index: int
    """Another index asks for another, independent verdict."""

    def as_requests(self) -> list[JudgeRequest]:
        """[N] the texts as the prompt renderer takes them."""
        return [
            JudgeRequest(
                id="", question=self.question, reference=self.reference, criterion=self.criterion, completion=completion
            )
            for completion in self.completions
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """All that came of one question, retries included."""

    verdict: Verdict | None
    """None where no reply was usable."""
    failure: Failed | None
    """Why scores are missing; None where none is."""
    calls: tuple[Call, ...] = ()
    """Every try, in the order they ended."""
    usage: Usage | None = None
    """Tokens of all replies; None where nothing was counted."""
    cost: float | None = None
    """Money for all replies; None where it is unknown."""
    origin: Origin = "asked"
    """Whether anybody was asked for it."""
    key: str | None = None
    """The request key under which the verdict is kept; None where no endpoint was chosen."""
    prompt_sha256: str | None = None
    """Of the last prompt, without nonce and ids; None where none was sent."""
    raw: str | None = None
    """The last whole reply, usable or not; None where none came."""
    latency_s: float = 0.0
    """From the batch's start to the answer."""

    def shared(self) -> Answer:
        """The same answer, for one who did not pay for it."""
        origin = "shared" if self.origin == "asked" else self.origin
        return replace(self, origin=origin, calls=(), usage=None, cost=0.0)


@dataclass(frozen=True, slots=True)
class Part:
    """What one answer says of one text."""

    answer: Answer
    row: int
    """Which of the answer's texts, from 0."""
    num_rows: int
    """[N] of the question."""

    @property
    def score(self) -> float | None:
        """None where this answer gives none."""
        return self.answer.verdict.scores[self.row] if self.answer.verdict else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request's judgement, and the answers it was made from."""

    judgement: Judgement
    answers: tuple[Answer, ...]


class Mode(Protocol):
    """A way to judge. Both methods are pure, so that a plan can count the calls without making them."""

    def questions(self, requests: Sequence[JudgeRequest]) -> list[Question]:
        """What must be asked about a batch; equal questions may come several times."""
        ...

    def judgements(
        self, requests: Sequence[JudgeRequest], answers: Mapping[Question, Answer]
    ) -> tuple[list[Outcome], Counter[str]]:
        """One outcome per request, in order, and what should be counted (contradictions, say)."""
        ...


def outcome_of(parts: Sequence[Part], value: float | None) -> Outcome:
    """One text's judgement from all parts about it; without a value, the first part that failed says why.

    A call's tokens and money are shared evenly among its texts, so that summing over judgements counts all of it.
    """
    answers = [part.answer for part in parts]
    attempts = sum(len(answer.calls) for answer in answers)
    shares = [_share(answer.usage, part) for part, answer in zip(parts, answers, strict=True) if answer.usage]
    usage = shares[0] if shares else None
    for share in shares[1:]:
        usage = share.plus(usage) if usage else share
    costs = [None if one.answer.cost is None else one.answer.cost / one.num_rows for one in parts]
    cost = None if None in costs else sum(filter(None, costs), 0.0)
    if value is None:
        failure = next(answer.failure for answer in answers if answer.failure)
        return Outcome(replace(failure, attempts=attempts, usage=usage, cost=cost), tuple(answers))
    verdicts = [(answer.verdict, part.row) for part, answer in zip(parts, answers, strict=True) if answer.verdict]
    origins: set[Origin] = {answer.origin for answer in answers}
    judgement = Scored(
        value=value,
        raw="\n".join(verdict.raws[row] for verdict, row in verdicts),
        usage=usage,
        attempts=attempts,
        cost=cost,
        endpoint="+".join(dict.fromkeys(verdict.endpoint for verdict, _ in verdicts)),
        origin=origins.pop() if len(origins) == 1 else "asked",
    )
    return Outcome(judgement, tuple(answers))


def distinct_groups(requests: Sequence[JudgeRequest]) -> dict[tuple[str, str | None, str, int], list[str]]:
    """The different completions of each question, sorted: nothing may depend on the order they were sampled in."""
    groups: dict[tuple[str, str | None, str, int], set[str]] = {}
    for one in requests:
        groups.setdefault(group_key(one), set()).add(one.completion)
    return {key: sorted(completions) for key, completions in groups.items()}


def group_key(request: JudgeRequest) -> tuple[str, str | None, str, int]:
    """What completions that are compared must share."""
    return request.question, request.reference, request.criterion, request.sample_index


def _share(usage: Usage, part: Part) -> Usage:
    def of(total: int) -> int:  # the shares of all rows sum up to the total
        return total * (part.row + 1) // part.num_rows - total * part.row // part.num_rows

    return Usage(prompt_tokens=of(usage.prompt_tokens), completion_tokens=of(usage.completion_tokens))
