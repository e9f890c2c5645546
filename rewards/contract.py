"""What `rewards.testing` tries on a reward, and what it finds. Knows a reward and a group; knows no recipe."""

from __future__ import annotations

import asyncio
import copy
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from judges.testing import CANCEL_AFTER_S, CANCELLED_WITHIN_S, HOSTILE
from rewards.base import AnyReward, call_reward, checked_score, describe_exception, shape_problem
from rewards.types import RewardInput, Score

RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-4, 1e-6
"""How far two scores of one completion may lie apart: a model's logits hang on the batch a little."""

HOSTILE_COMPLETIONS = (
    *HOSTILE,
    "\n" * 20_000,
    "(" * 5_000,
    "9" * 10_000,
    r"\boxed{" * 50,
    "</think></answer><answer>",
    "NaN",
    "-0",
)


class Findings:
    """What was found, the first of each kind: one mistake shows in many calls."""

    def __init__(self) -> None:
        self._by_kind: dict[str, str] = {}

    def note(self, kind: str, text: str) -> None:
        self._by_kind.setdefault(kind, text)

    def merge(self, others: Findings) -> None:
        for kind, text in others._by_kind.items():
            self.note(kind, text)

    def beyond(self, others: Findings) -> bool:
        """Whether there are kinds here that are not there."""
        return not self._by_kind.keys() <= others._by_kind.keys()

    def has(self, *kinds: str) -> bool:
        return any(kind in self._by_kind for kind in kinds)

    def lines(self) -> list[str]:
        return list(self._by_kind.values())


class Check:
    """One reward, one group, and what was found so far. `scores_the_group` comes first: the others compare with it."""

    def __init__(self, reward: AnyReward, inputs: list[RewardInput], bounds: tuple[float, float]) -> None:
        self.findings = Findings()
        self._reward = reward
        self._inputs = inputs
        self._low, self._high = bounds
        self._first: list[float | None] = []

    async def scores_the_group(self) -> bool:
        """Whether any of the group's completions has a score; what else is wrong with it is noted."""
        scores = await self._scores(self._inputs)
        if scores is None:
            return False
        self._first = [score.value for score in scores]
        if all(value is None for value in self._first):
            self.findings.note(
                "nothing",
                f"no completion of the group has a score, so that there is nothing to compare; the first reason: "
                f"{scores[0].reason}. Give check_reward(group=...) completions that it can score",
            )
            return False
        for size in (1, len(self._inputs) + 1):  # the last group of a file may have any size
            await self._scores([self._inputs[row % len(self._inputs)] for row in range(size)])
        return True

    async def repeats_itself(self) -> None:
        """In a row: what draws random numbers, and what remembers what it has seen."""
        second, third = await self._values(self._inputs), await self._values(self._inputs)
        if second is None or third is None or (_same(self._first, second) and _same(second, third)):
            return
        shown = f"the same group got {_shown(self._first)}, then {_shown(second)}, then {_shown(third)}"
        if await self._follows_the_global_seed():
            self.findings.note(
                "repeat",
                f"it is not deterministic: {shown}. It draws random numbers, which a resumed run does not draw again; "
                "seed a generator of its own by the input, such as random.Random(one.prompt_id)",
            )
        elif _same(second, third):
            self.findings.note(
                "repeat",
                f"it keeps state between calls: {shown}. What was scored before must not "
                "count; compare within one call",
            )
        else:
            self.findings.note(
                "repeat",
                f"it is not deterministic, or it keeps state between calls: {shown}. A score must hang on the inputs "
                "alone: no clock, no counter, no generator without a seed",
            )

    async def follows_the_order(self) -> None:
        """Turned round, every completion keeps its score."""
        turned = await self._values(self._inputs[::-1])
        if turned is None or self.findings.has("repeat") or _same(self._first, turned[::-1]):
            return
        row = _first_difference(self._first, turned[::-1])
        self.findings.note(
            "order",
            f"scores depend on the order: {self._named(row)} got {self._first[row]} at place {row + 1} and "
            f"{turned[::-1][row]} in the reverse order. Score each completion by what it says, and answer in the order "
            "of the inputs: gather keeps it, as_completed does not",
        )

    async def ignores_other_groups(self) -> None:
        """Groups are scored one after another and side by side; neither may change what one gets."""
        other = [replace(self._inputs[0], prompt_id="another", num_tokens=one.num_tokens) for one in self._inputs]
        await self._values(other)
        after = await self._values(self._inputs)
        _, beside, _ = await asyncio.gather(self._values(other), self._values(self._inputs), self._values(other))
        if self.findings.has("repeat"):
            return
        for when, values in (("after another group", after), ("while another group was scored", beside)):
            if values is not None and not _same(self._first, values):
                self.findings.note(
                    "state",
                    f"it keeps state between calls: the same group got {_shown(self._first)}, and {when} "
                    f"{_shown(values)}. Keep what belongs to one call in local variables",
                )

    async def needs_what_it_reads(self, *, reference_is_optional: bool) -> None:
        """Without the reference that it reads there is nothing to judge, and no number."""
        if (
            reference_is_optional
            or self.findings.has("repeat", "state")
            or all(one.reference is None for one in self._inputs)
        ):
            return
        bare = [replace(one, reference=None) for one in self._inputs]
        without = await self._values(bare, what="on a prompt without a reference", kind="no reference")
        if without is None:
            return
        for row, (value, before) in enumerate(zip(without, self._first, strict=True)):
            if value is not None and not _same([value], [before]):
                self.findings.note(
                    "default",
                    f"a default number for what cannot be judged: {self._named(row)} got {before} with its reference, "
                    f"and without one {value}. Answer None, or Score(value=None, reason=...); a judge that works "
                    "without a reference is checked with reference_is_optional=True",
                )
                return

    async def takes_hostile_texts(self) -> None:
        """All in one call, and one by one where that call fails, to find the text."""
        hostile = [
            replace(self._inputs[0], completion=text, num_tokens=len(text), token_ids=None)
            for text in HOSTILE_COMPLETIONS
        ]
        together = Check(self._reward, hostile, (self._low, self._high))
        await together._scores(hostile, kind="hostile")
        if not together.findings.beyond(self.findings):
            return
        for one in hostile:
            await self._scores([one], what=f"on the completion {_cut(one.completion)}", kind="hostile")
        self.findings.merge(together.findings)  # what only shows in a call with several

    async def gives_what_is_known(self, known: Sequence[tuple[RewardInput, float | None]]) -> None:
        """What its author says about single inputs."""
        for number, (one, expected) in enumerate(known):
            values = await self._values([one])
            if values is None or _same(values, [expected]):
                continue
            kind = "default" if expected is None else f"known {number}"
            hint = "a default number for what cannot be judged: " if expected is None else ""
            then = ". Answer None, or Score(value=None, reason=...)" if expected is None else ""
            self.findings.note(
                kind, f"{hint}{_cut(one.completion)} must get {expected}, known[{number}], but got {values[0]}{then}"
            )

    async def ends_when_cancelled(self) -> None:
        """Ctrl-C cancels what is being scored."""
        task = asyncio.ensure_future(call_reward(self._reward, copy.deepcopy(self._inputs)))
        await asyncio.sleep(CANCEL_AFTER_S)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=CANCELLED_WITHIN_S)
        if not done:
            self.findings.note(
                "cancelling",
                f"a cancelled call has not ended within {CANCELLED_WITHIN_S:g} s; let CancelledError pass: catch "
                "Exception, not BaseException",
            )
        elif not task.cancelled():
            task.exception()  # looked at, so that asyncio does not complain of one that nobody has seen

    async def _values(
        self, inputs: Sequence[RewardInput], *, what: str = "", kind: str = "exception"
    ) -> list[float | None] | None:
        scores = await self._scores(inputs, what=what, kind=kind)
        return None if scores is None else [score.value for score in scores]

    async def _scores(
        self, inputs: Sequence[RewardInput], *, what: str = "", kind: str = "exception"
    ) -> list[Score] | None:
        """What it answers to these; None where it fails as a whole, which is noted."""
        given = copy.deepcopy(list(inputs))  # a fresh one each time: one mutation must not show as another mistake
        where = f" {what}" if what else ""
        try:
            answer = await call_reward(self._reward, given)
        except Exception as exc:  # noqa: BLE001  # the check is there to find it
            self.findings.note(
                kind,
                f"it raised {describe_exception(exc)}{where}, which leaves the whole group without scores. Answer None "
                "for that completion alone",
            )
            return None
        self._check_untouched(given, inputs)
        if problem := shape_problem(answer, num_expected=len(inputs)):
            self.findings.note("number", f"{problem}{where}. Answer a list with one score per input, in their order")
            return None
        return [self._checked(value, one) for value, one in zip(answer, inputs, strict=True)]

    def _checked(self, answer: Any, one: RewardInput) -> Score:
        raw = answer.value if isinstance(answer, Score) else answer
        score = checked_score(answer)
        if score.value is None:
            if raw is not None:
                self.findings.note(
                    "no number",
                    f"{_cut(one.completion)}: {score.reason}. A run takes that for missing; answer a finite float, or "
                    "None where there is no verdict",
                )
        elif not self._low <= score.value <= self._high:
            self.findings.note(
                "range",
                f"{_cut(one.completion)} got {score.value:g}, outside of {self._low:g} to {self._high:g}. Give it a "
                "score within, or check with the range that you mean",
            )
        return score

    def _check_untouched(self, given: list[RewardInput], inputs: Sequence[RewardInput]) -> None:
        if given == list(inputs):
            return
        changed = "their list" if len(given) != len(inputs) else "one of them, such as its meta"
        self.findings.note(
            "mutation",
            f"it changes its inputs ({changed}), which the group's other rewards are given too. Work on a copy: "
            "list(inputs), dict(one.meta)",
        )

    async def _follows_the_global_seed(self) -> bool:
        state = random.getstate()
        try:
            found: list[list[float | None] | None] = []
            for seed in (1, 1, 2):
                random.seed(seed)
                found.append(await self._values(self._inputs))
        finally:
            random.setstate(state)
        one, again, other = found
        return None not in found and _same(one or [], again or []) and not _same(one or [], other or [])

    def _named(self, row: int) -> str:
        return _cut(self._inputs[row].completion)


def _same(ones: Sequence[float | None], others: Sequence[float | None]) -> bool:
    return all(
        one is other
        if one is None or other is None
        else math.isclose(one, other, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
        for one, other in zip(ones, others, strict=True)
    )


def _first_difference(ones: Sequence[float | None], others: Sequence[float | None]) -> int:
    return next(row for row in range(len(ones)) if not _same([ones[row]], [others[row]]))


def _shown(values: Sequence[float | None]) -> str:
    return "[" + ", ".join("None" if value is None else f"{value:g}" for value in values) + "]"


def _cut(text: str) -> str:
    shown = ascii(text) if len(text) <= 40 else f"{ascii(text[:37])[:-1]}...'"
    return f"{shown} ({len(text)} characters)" if len(text) > 40 else shown
