"""Which of the prompt's choices does the completion give? Exactly the reference: 1. Anything else: 0.

The choices come from `meta["choices"]`, one of which may stand for "it cannot be known"; any of the usual ways to
say so counts as that one. With `letters`, the choices are A, B, C, ... in their order, and a completion may give the
letter in place of the text.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import TypeGuard

from rewards.abstention import is_abstention, without_abstentions
from rewards.answer_text import ReadsAnswer
from rewards.mentions import is_hedged, mentioned, normalized
from rewards.types import RewardInput, Score

# A letter is an answer where nothing else is said, or where it is marked as one; "A" is an article as well.
_LETTER = re.compile(
    # never across lines: from each of many empty lines a search would run to their end
    r"^[^\w\n]*(?:\\boxed[^\w\n]*)?([A-Z])[^\w\n]*$"  # "B", "(B)", "**B**", "\boxed{B}"
    r"|^[^\w\n]*([A-Z])[^\w\n]*[).:]\s"  # "B) Anna", "B. Anna"
    r"|\(([A-Z])\)"
    r"|\\boxed\{\W*(?:\\text\{)?([A-Z])\W*\}"
    r"|\b(?i:answer|option|choice)(?:\s+(?i:is|would be))?\s*:?\s*[*(]*([A-Z])\b(?!')(?![ ]+[a-z])",
    re.MULTILINE,
)


class Choice(ReadsAnswer):
    """1 where the completion gives the reference and no other choice; 0 for several, none or a hedged one."""

    letters: bool = False
    """The choices were shown as A, B, C, ...: a letter, alone or marked ("(B)", "B) ...", "the answer is B",
    "\\boxed{B}"), stands for its choice, in completion and reference."""

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per completion; missing where the prompt has no reference among its choices."""
        return await asyncio.to_thread(lambda: [self._score_one(one) for one in inputs])

    def _score_one(self, one: RewardInput) -> Score:
        answer = self.answer_in(one.completion)
        if answer is None:
            unread = score_choice(replace(one, completion=""), letters=self.letters)
            return unread if unread.value is None else Score(value=0.0, reason=self.no_answer)
        return score_choice(replace(one, completion=answer), letters=self.letters)


def score_choice(one: RewardInput, *, letters: bool = False) -> Score:
    """The rule for one completion."""
    if one.reference is None:
        return Score(value=None, reason="the prompt has no reference")
    choices = one.meta.get("choices")
    if not _is_list_of_strings(choices):
        return Score(value=None, reason=f"meta['choices'] is {choices!r}, expected a list of strings")
    reference = _listed(one.reference, choices) or (_lettered(one.reference, choices) if letters else None)
    if reference is None:
        return Score(value=None, reason=f"the reference {one.reference!r} is not among the choices {choices!r}")
    given = given_choices(one.completion, choices) | (_given_letters(one.completion, choices) if letters else set())
    if not given:
        return Score(value=0.0, reason="gives none of the choices" if one.completion.strip() else "empty completion")
    if given != {reference}:
        return Score(value=0.0, reason=f"gives {', '.join(sorted(given))}; right is {reference}")
    if not is_abstention(reference) and is_hedged(one.completion):
        return Score(value=0.0, reason=f"gives {reference}, but hedges")
    return Score(value=1.0, reason=f"gives {reference}")


def given_choices(text: str, choices: Sequence[str]) -> set[str]:
    """The choices that the text puts forward. Every abstaining phrase is the abstaining choice, if there is one."""
    abstaining = [choice for choice in choices if is_abstention(choice)]
    named = mentioned(without_abstentions(text), [choice for choice in choices if choice not in abstaining])
    if not is_abstention(text):
        return named
    return named | (set(abstaining[:1]) or {"no choice"})


def _given_letters(text: str, choices: Sequence[str]) -> set[str]:
    letters = ["".join(groups) for groups in _LETTER.findall(text)]
    return {_lettered(letter, choices) or f"choice {letter}" for letter in letters}


def _lettered(letter: str, choices: Sequence[str]) -> str | None:
    number = ascii_uppercase.find(letter.strip().upper() or " ")
    return choices[number] if len(letter.strip()) == 1 and 0 <= number < len(choices) else None


def _listed(reference: str, choices: Sequence[str]) -> str | None:
    for choice in choices:
        if normalized(choice) == normalized(reference):
            return choice
    abstaining = [choice for choice in choices if is_abstention(choice)]
    return abstaining[0] if abstaining and is_abstention(reference) else None


def _is_list_of_strings(value: object) -> TypeGuard[Sequence[str]]:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(choice, str) for choice in value)
