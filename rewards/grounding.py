"""Does the completion answer from the stated facts, and say "not stated" where they hold no answer?

The reference is the right answer, or an abstaining phrase such as "not stated". `meta["choices"]`, where present,
lists the possible answers: naming another of them beside the right one is no answer. `meta["aliases"]`, where
present, lists other spellings of the right answer.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from rewards.abstention import is_abstention, without_abstentions
from rewards.answer_text import ReadsAnswer
from rewards.mentions import is_hedged, mentioned, normalized
from rewards.types import RewardInput, Score

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")

# words with which one says that something is not stated, without stating anything
_EMPTY_WORDS = """
    a an the this that these those it its there here is are was were be been being has have had do does did of in on
    at to from for by with within about as and or so because since if but what which who whom whose when where why how
    i we you he she they them his her their our my me us any anything such not no yes sorry therefore thus just only
    also explicitly specifically directly exactly answer question text passage context facts fact statement statements
    sentence sentences story information info detail details given provided stated mentioned known available above
    based according correct right true sure clear explicit ambiguous original following specific current however sorry
    specify specifies mention mentions state states indicate indicates include includes provide provides
    contain contains enough can cannot could would will know say says tell whether
    """


class Grounding(ReadsAnswer):
    """1 for the right answer and nothing that contradicts it; 0 otherwise."""

    max_words: int | None = Field(None, gt=0)
    """Longest completion that can score 1, in words: copying all the facts is no answer. None sets no limit."""

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per completion; missing where the prompt has no reference."""
        return await asyncio.to_thread(lambda: [self._score_one(one) for one in inputs])

    def _score_one(self, one: RewardInput) -> Score:
        if one.reference is None or not one.reference.strip():
            return Score(value=None, reason="the prompt has no reference")
        answer = self.answer_in(one.completion)
        if answer is None:
            return Score(value=0.0, reason=self.no_answer)
        return score_grounding(replace(one, completion=answer), max_words=self.max_words)


def score_grounding(one: RewardInput, *, max_words: int | None = None) -> Score:
    """The rule for one completion."""
    if one.reference is None or not one.reference.strip():
        return Score(value=None, reason="the prompt has no reference")
    if not one.completion.strip():
        return Score(value=0.0, reason="empty completion")
    if max_words is not None and len(one.completion.split()) > max_words:
        return Score(value=0.0, reason=f"longer than {max_words} words")
    stated = [choice for choice in _strings(one.meta.get("choices")) if not is_abstention(choice)]
    if is_abstention(one.reference):
        return _score_unanswerable(one, stated)
    return _score_answerable(one, stated)


def _score_unanswerable(one: RewardInput, stated: Sequence[str]) -> Score:
    if not is_abstention(one.completion):
        return Score(value=0.0, reason="states an answer that the facts do not hold")
    claims = _claims(one, stated)
    if claims:
        return Score(value=0.0, reason=f"says that it is not stated, and yet states: {', '.join(claims)}")
    return Score(value=1.0, reason="says that it is not stated")


def _score_answerable(one: RewardInput, stated: Sequence[str]) -> Score:
    assert one.reference is not None
    right = {normalized(answer): answer for answer in (one.reference, *_strings(one.meta.get("aliases")))}
    others = [choice for choice in stated if normalized(choice) not in right]
    given = mentioned(one.completion, [*right.values(), *others])
    if is_abstention(one.completion):
        return Score(value=0.0, reason="says that it is not stated, but it is")
    if not given & set(right.values()):
        return Score(value=0.0, reason=f"does not give {one.reference}")
    if given & set(others):
        return Score(value=0.0, reason=f"gives {', '.join(sorted(given & set(others)))} as well")
    if is_hedged(one.completion):
        return Score(value=0.0, reason=f"gives {one.reference}, but hedges")
    return Score(value=1.0, reason=f"gives {one.reference}")


def _claims(one: RewardInput, stated: Sequence[str]) -> list[str]:
    """What the completion states beside abstaining.

    Where the choices are known, one of those; else any word that neither abstaining nor repeating the prompt needs.
    """
    remainder = without_abstentions(one.completion)
    if stated:
        return sorted(mentioned(remainder, stated))
    harmless = {*_EMPTY_WORDS.split(), *_words(normalized(one.prompt))}
    return [word for word in _words(remainder) if word not in harmless]


def _words(text: str) -> list[str]:
    return [word.removesuffix("'s") for word in _WORD.findall(text)]


def _strings(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list | tuple) else []
