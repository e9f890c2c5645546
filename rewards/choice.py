"""Which of the prompt's choices does the completion give? Exactly the reference: 1. Anything else: 0.

The choices come from `meta["choices"]`, one of which may stand for "it cannot be known"; any of the usual ways to
say so counts as that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from rewards.abstention import is_abstention, without_abstentions
from rewards.config import StrictModel
from rewards.mentions import is_hedged, mentioned, normalized
from rewards.types import RewardInput, Score


class Choice(StrictModel):
    """1 where the completion gives the reference and no other choice; 0 for several, none or a hedged one."""

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per completion; missing where the prompt has no reference among its choices."""
        return [score_choice(one) for one in inputs]


def score_choice(one: RewardInput) -> Score:
    """The rule for one completion."""
    if one.reference is None:
        return Score(value=None, reason="the prompt has no reference")
    choices = one.meta.get("choices")
    if not _is_list_of_strings(choices):
        return Score(value=None, reason=f"meta['choices'] is {choices!r}, expected a list of strings")
    reference = _listed(one.reference, choices)
    if reference is None:
        return Score(value=None, reason=f"the reference {one.reference!r} is not among the choices {choices!r}")
    given = given_choices(one.completion, choices)
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


def _listed(reference: str, choices: Sequence[str]) -> str | None:
    for choice in choices:
        if normalized(choice) == normalized(reference):
            return choice
    abstaining = [choice for choice in choices if is_abstention(choice)]
    return abstaining[0] if abstaining and is_abstention(reference) else None


def _is_list_of_strings(value: object) -> TypeGuard[Sequence[str]]:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(choice, str) for choice in value)
