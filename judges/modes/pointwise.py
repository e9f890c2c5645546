"""One completion a call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from judges.modes.base import Answer, Outcome, Part, Question, outcome_of
from judges.types import JudgeRequest


class Pointwise:
    """Every request is a question of its own."""

    def questions(self, requests: Sequence[JudgeRequest]) -> list[Question]:
        return [_question(request) for request in requests]

    def judgements(
        self, requests: Sequence[JudgeRequest], answers: Mapping[Question, Answer]
    ) -> tuple[list[Outcome], Counter[str]]:
        outcomes: list[Outcome] = []
        seen: set[Question] = set()
        for request in requests:
            question = _question(request)
            answer = answers[question].shared() if question in seen else answers[question]
            seen.add(question)
            part = Part(answer, 0, 1)
            outcomes.append(outcome_of([part], part.score))
        return outcomes, Counter()


def _question(request: JudgeRequest) -> Question:
    return Question(
        "pointwise",
        request.question,
        request.reference,
        request.criterion,
        (request.completion,),
        request.sample_index,
    )
