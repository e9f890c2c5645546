"""Two completions a call, in both orders; scores are the share of comparisons won (Copeland), a tie being half."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from judges.config import PairwiseMode, ScaleConfig
from judges.modes.base import Answer, Outcome, Part, Question, distinct_groups, group_key, outcome_of
from judges.modes.groupwise import shuffled
from judges.types import Failed, JudgeRequest

MIN_GAMES_SHARE = 0.5
"""A text with fewer of its comparisons decided has no score: its share would be luck."""


class Pairwise:
    """A judge that names another winner when the order is swapped has named none: a tie, counted as a contradiction."""

    def __init__(self, config: PairwiseMode, scale: ScaleConfig) -> None:
        self._config = config
        self._scale = scale

    def questions(self, requests: Sequence[JudgeRequest]) -> list[Question]:
        return [
            _question(key, order)
            for key, completions in distinct_groups(requests).items()
            for first, second in self._pairs(completions)
            for order in ((first, second), (second, first))
        ]

    def judgements(
        self, requests: Sequence[JudgeRequest], answers: Mapping[Question, Answer]
    ) -> tuple[list[Outcome], Counter[str]]:
        counts: Counter[str] = Counter()
        outcomes: dict[tuple[object, str], list[float | None]] = {}
        parts: dict[tuple[object, str], list[Part]] = {}
        for key, completions in distinct_groups(requests).items():
            for pair in self._pairs(completions):
                there, back = answers[_question(key, pair)], answers[_question(key, pair[::-1])]
                first_won = _outcome(Part(there, 0, 2).score, Part(back, 1, 2).score, counts)
                for row, completion in enumerate(pair):
                    won = first_won if row == 0 or first_won is None else 1.0 - first_won
                    outcomes.setdefault((key, completion), []).append(won)
                    parts.setdefault((key, completion), []).extend((Part(there, row, 2), Part(back, 1 - row, 2)))
        judged: list[Outcome] = []
        seen: set[tuple[object, str]] = set()
        for request in requests:
            text = (group_key(request), request.completion)
            own = parts.get(text)
            if own is None:
                judged.append(_without_opponent())
                continue
            if text in seen:
                own = [Part(part.answer.shared(), part.row, part.num_rows) for part in own]
            seen.add(text)
            judged.append(outcome_of(own, self._value(outcomes[text])))
        return judged, counts

    def _value(self, outcomes: Sequence[float | None]) -> float | None:
        decided = [outcome for outcome in outcomes if outcome is not None]
        if not decided or len(decided) < MIN_GAMES_SHARE * len(outcomes):
            return None
        return self._scale.low + (self._scale.high - self._scale.low) * fmean(decided)

    def _pairs(self, completions: list[str]) -> list[tuple[str, str]]:
        ring = shuffled(completions, seed=self._config.seed)
        most = len(ring) // 2  # beyond half way round, the pairs come again
        reach = min(self._config.opponents or most, most)
        pairs: dict[frozenset[str], tuple[str, str]] = {}
        for distance in range(1, reach + 1):
            for index, first in enumerate(ring):
                second = ring[(index + distance) % len(ring)]
                pairs.setdefault(frozenset((first, second)), (first, second))
        return list(pairs.values())


def _question(key: tuple[str, str | None, str, int], order: tuple[str, ...]) -> Question:
    return Question("pairwise", key[0], key[1], key[2], order, key[3])


def _outcome(there: float | None, back: float | None, counts: Counter[str]) -> float | None:
    """How the first text fared, by both orders; None where an order gave no verdict."""
    if there is None or back is None:
        return None
    counts["pairs"] += 1
    if there != back:
        counts["position_contradictions"] += 1
        return 0.5
    return there


def _without_opponent() -> Outcome:
    detail = "there is no other completion to compare it with"
    return Outcome(Failed(kind="quorum", attempts=0, fault="judge", detail=detail), ())
