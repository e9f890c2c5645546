"""A recipe and what it would need -> how far its keys can go, and what to change where it does not fit. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeAlias

from grpo.config import RunConfig
from grpo.runtime.memory_changes import Candidate, changed
from grpo.runtime.memory_rows import count_micro_batches, largest_micro_batch

LARGEST = {"rollout.group_size": 256, "rollout.max_new_tokens": 2**17, "prompts.per_step": 4096}
"""Beyond these nothing is searched: memory is not what bounds a run then."""
SHOWN_CHANGES = 5
SHOWN_OF_A_KIND = 2
MOST_TOGETHER = 3
"""Changes that are tried together where one alone does not do."""
NEXT_TO_NOTHING = 0.01
"""Of the peak: what a further change has to save to be told beside those without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a recipe needs at most."""

    peak_bytes: int
    fits: bool


NeedOf: TypeAlias = Callable[[RunConfig], Need]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The largest value of one recipe key that fits, everything else as it is but for smaller micro-batches."""

    key: str
    now: int
    largest: int | None
    """None: not even the smallest fits."""
    bounded_by: Literal["the step", "the search", "the context"] | None = None
    """What ends it in memory's place: there is no more of it in a step, it was not searched beyond this, or the model
    reads no more tokens."""
    micro_batch_tokens: int | None = None
    """The budget that the largest value needs, where that is less than the recipe's: the same effective batch."""
    packing: str = ""
    """Of the micro-batches alone, where they have to be smaller than the recipe's: how a step is cut then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something else in the recipe, and the peak with it."""

    overrides: tuple[str, ...]
    """As `grpo train` takes them."""
    why: str
    peak_bytes: int
    fits: bool
    keeps_gradient: bool
    """The same gradient, in more and smaller parts."""
    takes_time: bool
    """Arithmetic or copies that there were not before."""
    packing: str = ""
    """How a step is cut then, as `packing_of`; empty where it is cut as now."""


def packing_of(config: RunConfig, prompt_tokens: int) -> str:
    """Completions of the largest micro-batch, and how many of them a step has: "4 x 32" is an effective batch of 128;
    "at most 5 x 26" where some are smaller."""
    rows, count = largest_micro_batch(config, prompt_tokens).rows, count_micro_batches(config, prompt_tokens)
    is_even = rows * count == config.prompts.per_step * config.rollout.group_size
    return f"{rows} x {count}" if is_even else f"at most {rows} x {count}"


def limits_of(config: RunConfig, need_of: NeedOf, *, prompt_tokens: int, context_tokens: int | None) -> Iterator[Limit]:
    """Of the micro-batches, then of K, length and prompts in micro-batches as small as need be.

    Args:
        context_tokens: that the model reads, prompt and completion together; None where it has no end.
    """
    rollout = config.rollout
    yield _limit_of_micro_batches(config, need_of, prompt_tokens)
    most_of = dict(LARGEST)
    if context_tokens is not None:
        room = max(context_tokens - prompt_tokens, 1)
        most_of["rollout.max_new_tokens"] = min(room, most_of["rollout.max_new_tokens"])
    for key, now in (
        ("rollout.group_size", rollout.group_size),
        ("rollout.max_new_tokens", rollout.max_new_tokens),
        ("prompts.per_step", config.prompts.per_step),
    ):

        def with_value(value: int, name: str = key.replace(".", "__"), **more: int) -> RunConfig:
            return changed(config, **{name: value}, **more)

        def fits_somehow(value: int, with_value: Callable[..., RunConfig] = with_value) -> bool:
            return need_of(with_value(value, update__micro_batch_tokens=1)).fits

        if key == "rollout.group_size":  # rows decoded side by side are whole groups: memory does not only grow with K
            largest = next((value for value in range(most_of[key], 1, -1) if fits_somehow(value)), None)
        else:
            largest = _largest(fits_somehow, 1, most_of[key])
        budget, bounded_by = None, None
        if largest is not None and not need_of(with_value(largest)).fits:
            budget = largest_budget(
                with_value(largest), need_of, most=config.update.micro_batch_tokens, prompt_tokens=prompt_tokens
            )
        if largest == most_of[key]:
            bounded_by = "the search" if largest == LARGEST[key] else "the context"
        yield Limit(key=key, now=now, largest=largest, bounded_by=bounded_by, micro_batch_tokens=budget)


def _limit_of_micro_batches(config: RunConfig, need_of: NeedOf, prompt_tokens: int) -> Limit:
    """Of a budget that fits, how far it can be raised; else the tokens of the largest micro-batches that fit."""
    key, now = "update.micro_batch_tokens", config.update.micro_batch_tokens
    whole = config.prompts.per_step * (prompt_tokens + config.rollout.group_size * config.rollout.max_new_tokens)
    largest = largest_budget(config, need_of, most=whole, prompt_tokens=prompt_tokens)
    if largest is None:
        return Limit(key=key, now=now, largest=None)
    if need_of(config).fits:  # a step may be cut into less than the budget allows
        return Limit(key=key, now=now, largest=max(largest, now), bounded_by="the step" if largest == whole else None)
    packing = packing_of(changed(config, update__micro_batch_tokens=largest), prompt_tokens)
    return Limit(key=key, now=now, largest=largest, packing=packing)


def largest_budget(config: RunConfig, need_of: NeedOf, *, most: int, prompt_tokens: int) -> int | None:
    """The tokens of the largest micro-batches that fit, as a budget of at most `most` cuts them.

    Budgets between two ways to cut a step come to the same micro-batches: with a step of 33,024 tokens, 33,023 are two
    of 16,512, and it is these that fit. All ways are tried: a larger micro-batch, in another kernel, may take less.
    """
    k, length, groups = config.rollout.group_size, config.rollout.max_new_tokens, config.prompts.per_step
    budgets = [prompt_tokens + rows * length for rows in range(1, k)]
    budgets += [together * (prompt_tokens + k * length) for together in range(1, groups + 1)]
    within = [budget for budget in budgets if budget <= most] or budgets[:1]  # less than a completion is one

    def fits(budget: int) -> bool:
        return need_of(changed(config, update__micro_batch_tokens=budget)).fits

    found = next((budget for budget in reversed(within) if fits(budget)), None)
    if found is None:
        return None
    return largest_micro_batch(changed(config, update__micro_batch_tokens=found), prompt_tokens).padded_tokens


def _largest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """The largest value that fits, where memory grows with it; None where the least does not."""
    if not fits(least):
        return None
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def changes_of(
    config: RunConfig, candidates: Sequence[Candidate], need_of: NeedOf, *, prompt_tokens: int
) -> tuple[Change, ...]:
    """What lowers the peak, the best first: what fits and keeps the gradient, then what fits; where nothing does, what
    saves most.

    Changes are put together only where none alone fits and keeps the gradient.
    """
    now = need_of(config)
    found: dict[tuple[int, ...], Change] = {}
    for count in range(1, MOST_TOGETHER + 1):
        for numbers in combinations(range(len(candidates)), count):
            parts = [candidates[number] for number in numbers]
            if len({key for part in parts for key in part.values}) < sum(len(part.values) for part in parts):
                continue  # two values of one key
            change = _change(config, parts, need_of, prompt_tokens)
            if change.peak_bytes < now.peak_bytes and not _is_idle(numbers, change, found):
                found[numbers] = change
        if any(change.fits and change.keeps_gradient for change in found.values()):
            break
    fitting = [change for change in found.values() if change.fits]
    return tuple(_some_of_each(sorted(fitting or found.values(), key=_rank))[:SHOWN_CHANGES])


def _change(config: RunConfig, parts: Sequence[Candidate], need_of: NeedOf, prompt_tokens: int) -> Change:
    values = {key: value for part in parts for key, value in part.values.items()}
    then = changed(config, **values)
    need = need_of(then)
    is_cut = any(name in values for name in ("update__micro_batch_tokens", "rollout__max_new_tokens"))
    return Change(
        overrides=tuple(part.text for part in parts),
        why="; ".join(part.why for part in parts),
        peak_bytes=need.peak_bytes,
        fits=need.fits,
        keeps_gradient=all(part.keeps_gradient for part in parts),
        takes_time=any(part.takes_time for part in parts),
        packing=packing_of(then, prompt_tokens) if is_cut else "",
    )


def _is_idle(numbers: tuple[int, ...], change: Change, found: dict[tuple[int, ...], Change]) -> bool:
    """Some of the changes without the others do as much."""
    smaller = [found[some] for n in range(1, len(numbers)) for some in combinations(numbers, n) if some in found]
    if change.fits:
        return any(other.fits for other in smaller)
    return any(other.peak_bytes <= change.peak_bytes * (1 + NEXT_TO_NOTHING) for other in smaller)


def _rank(change: Change) -> tuple[bool, bool, bool, int, int]:
    """Of what fits and keeps the gradient first what costs no time, then what gives up least; else what saves most."""
    if not change.fits:
        return (True, False, False, 0, change.peak_bytes)
    gives_up = -change.peak_bytes if change.keeps_gradient else change.peak_bytes
    return (False, not change.keeps_gradient, change.takes_time, len(change.overrides), gives_up)


def _some_of_each(ranked: Sequence[Change]) -> list[Change]:
    """Of those that change the same keys, such as ever smaller micro-batches, the first few; of several together that
    come to one peak, the first."""
    shown: dict[tuple[str, ...], int] = {}
    kept: list[Change] = []
    for change in ranked:
        is_like = any(abs(other.peak_bytes / change.peak_bytes - 1) <= NEXT_TO_NOTHING for other in kept)
        if len(change.overrides) > 1 and is_like:
            continue
        keys = tuple(text.partition("=")[0] for text in change.overrides)
        shown[keys] = shown.get(keys, 0) + 1
        if shown[keys] <= SHOWN_OF_A_KIND:
            kept.append(change)
    return kept
