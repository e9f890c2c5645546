"""All completions of a question in one call, in a shuffled order and in its reverse.

Averaging over two opposite orders takes the linear part of a position's advantage out (arXiv:2310.07712).
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from judges.config import GroupwiseMode
from judges.modes.base import Answer, Outcome, Part, Question, distinct_groups, group_key, outcome_of
from judges.types import JudgeRequest


class Groupwise:
    """Equal completions are shown once and share their score. A text has a score when every call about it gave one:
    a mean over fewer orders would carry a position's bias that its neighbours' means do not."""

    def __init__(self, config: GroupwiseMode) -> None:
        self._config = config

    def questions(self, requests: Sequence[JudgeRequest]) -> list[Question]:
        return [
            Question("groupwise", key[0], key[1], key[2], order, key[3])
            for key, completions in distinct_groups(requests).items()
            for chunk in self._chunks(completions)
            for order in ([chunk] if self._config.permutations == 1 or len(chunk) == 1 else [chunk, chunk[::-1]])
        ]

    def judgements(
        self, requests: Sequence[JudgeRequest], answers: Mapping[Question, Answer]
    ) -> tuple[list[Outcome], Counter[str]]:
        parts: dict[tuple[object, str], list[Part]] = {}
        for question in self.questions(requests):
            key = (question.question, question.reference, question.criterion, question.sample_index)
            for row, completion in enumerate(question.completions):
                part = Part(answers[question], row, len(question.completions))
                parts.setdefault((key, completion), []).append(part)
        outcomes: list[Outcome] = []
        seen: set[tuple[object, str]] = set()
        for request in requests:
            text = (group_key(request), request.completion)
            own = parts[text]
            if text in seen:
                own = [Part(part.answer.shared(), part.row, part.num_rows) for part in own]
            seen.add(text)
            scores = [part.score for part in own if part.score is not None]
            outcomes.append(outcome_of(own, fmean(scores) if len(scores) == len(own) else None))
        return outcomes, Counter()

    def _chunks(self, completions: list[str]) -> list[tuple[str, ...]]:
        order = shuffled(completions, seed=self._config.seed)
        most = self._config.completions_per_call
        if len(order) <= most:
            return [tuple(order)]
        anchor, rest = order[0], order[1:]
        num_chunks = -(-len(rest) // (most - 1))  # rounded up
        return [(anchor, *rest[index::num_chunks]) for index in range(num_chunks)]


def shuffled(completions: Sequence[str], *, seed: int) -> list[str]:
    """The same texts under the same seed come in the same order; other texts in another."""
    digest = hashlib.sha256(repr((seed, list(completions))).encode("utf-8", "surrogatepass")).hexdigest()
    order = list(completions)
    random.Random(digest).shuffle(order)
    return order
