"""A reward over one group of completions -> one Score each. The one guarded way to call a reward.

Knows no RL, no torch and no particular reward. Whatever a reward does wrong becomes a missing score with a reason;
nothing here ever makes up a number.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from judges.budget import MoneyBudget
from judges.limits.endpoint import SharedLimits
from judges.seams import VerdictCache
from rewards.errors import RewardError, RewardNotRecorded
from rewards.types import RewardInput, Score

MAX_REASON_CHARS = 500
"""A reason goes to a file once per completion: an exception that quotes a whole reply must not fill the disk."""


@runtime_checkable
class Reward(Protocol):
    """Scores one group: all inputs share a prompt. May also have `async check()`, `async aclose()` and
    `begin_step(step)`."""

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per input, in input order."""
        ...


PlainReward: TypeAlias = Callable[[list[RewardInput]], Sequence[Any] | Awaitable[Sequence[Any]]]
"""A sync or async function over one group; it may answer Scores, numbers, or None for "no verdict"."""

AnyReward: TypeAlias = Reward | PlainReward


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardContext:
    """Where a reward being built may look and write."""

    base_dir: Path
    """Folder of the recipe; relative paths and local modules named in params are found from here."""
    audit_path: Path | None = None
    """File to which a judge-backed reward appends its audit records; None keeps none."""
    replay_path: Path | None = None
    """An earlier run's audit, which answers instead of the judges; None asks the judges."""
    received: VerdictCache | None = None
    """Keeps what judges said in the step under way, so that no verdict is bought twice; None keeps nothing."""
    num_processes: int = 1
    """Processes of the run that score, each its own part; they share what a judge may cost."""
    budgets: dict[str, MoneyBudget] = field(default_factory=dict)
    """What judges have spent, by their names: rewards that ask one judge share its caps."""
    limits: SharedLimits = field(default_factory=SharedLimits)
    """Calls in flight, rates and breakers of judges' endpoints: rewards that ask one endpoint share them."""


async def score_group(reward: AnyReward, inputs: Sequence[RewardInput]) -> list[Score]:
    """Call a reward on one group and check what it answers.

    A plain sync reward runs in a thread, so it never blocks the event loop.

    Returns:
        One Score per input, in input order. Each value is a finite float, or None with a reason: every one is None
        when the reward raised or answered the wrong number of values.
    Raises:
        asyncio.CancelledError: the caller gave up.
    """
    if not inputs:
        return []
    try:
        answer = await call_reward(
            reward, list(inputs)
        )  # a copy: a reward that mutates its list must not shift the scores
    except RewardNotRecorded:
        raise
    except Exception as exc:  # noqa: BLE001  # any failure of foreign code is a missing score, never a number
        return _all_missing(inputs, describe_exception(exc))
    problem = shape_problem(answer, num_expected=len(inputs))
    if problem:
        return _all_missing(inputs, problem)
    return [checked_score(value) for value in answer]


async def check_reward_ready(reward: AnyReward) -> None:
    """Call the reward's optional `check()` hook.

    Raises:
        RewardError: the reward is not ready; a foreign exception of the hook is wrapped.
    """
    try:
        await _call_hook(reward, "check")
    except RewardError:
        raise
    except Exception as exc:
        raise RewardError(f"{type(reward).__name__}.check() failed with {describe_exception(exc)}") from exc


def begin_step(reward: AnyReward, step: int) -> None:
    """Call the reward's optional `begin_step(step)` hook: what is scored from now on belongs to that training step."""
    hook = getattr(reward, "begin_step", None)
    if hook is not None:
        hook(step)


async def close_reward(reward: AnyReward) -> None:
    """Call the reward's optional `aclose()` hook."""
    await _call_hook(reward, "aclose")


def describe_exception(exc: BaseException) -> str:
    """The exception's type and message; for a group, those of its first leaf, where the cause is."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return _shortened(f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__)


async def call_reward(reward: AnyReward, inputs: list[RewardInput]) -> Any:
    """Whatever the reward answers or raises, unchecked; `score_group` is what a run calls."""
    function = _function_of(reward)
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return await function(inputs)
    answer = await asyncio.to_thread(_call_in_thread, function, inputs)
    return await answer if inspect.isawaitable(answer) else answer


def _function_of(reward: AnyReward) -> Any:
    function = getattr(reward, "score", None) or reward
    if not callable(function):
        raise TypeError(f"{type(reward).__name__} is not a reward: it has no score() and is not callable")
    return function


def _call_in_thread(function: Callable[[list[RewardInput]], Any], inputs: list[RewardInput]) -> Any:
    try:
        return function(inputs)
    except StopIteration as exc:  # before Python 3.12 a future cannot carry it and would never finish
        raise RuntimeError("the reward raised StopIteration") from exc


async def _call_hook(reward: AnyReward, name: str) -> None:
    hook = getattr(reward, name, None)
    if not callable(hook):
        return
    answer = hook()
    if inspect.isawaitable(answer):
        await answer


def shape_problem(answer: Any, *, num_expected: int) -> str:
    is_sequence = hasattr(answer, "__len__") and hasattr(answer, "__getitem__")
    if not is_sequence or isinstance(answer, str | bytes | dict):
        return f"the reward answered {type(answer).__name__}, expected a list of {num_expected} scores"
    if len(answer) != num_expected:
        return f"the reward answered {len(answer)} scores for {num_expected} completions"
    return ""


def checked_score(answer: Any) -> Score:
    value, reason = (answer.value, answer.reason) if isinstance(answer, Score) else (answer, "")
    if value is None:
        return Score(value=None, reason=_shortened(reason) or "the reward gave no value and no reason")
    # bool is a Real to Python, but a True among scores is a mistake more often than a 1.0
    if isinstance(value, bool) or not isinstance(value, Real):
        return _missing(f"the reward answered {value!r} ({type(value).__name__}), expected a number or None", reason)
    try:
        number = float(value)
    except (OverflowError, ValueError, TypeError):
        return _missing(f"the reward answered a {type(value).__name__} that is no float", reason)
    if not math.isfinite(number):
        return _missing(f"the reward answered {number}, expected a finite number", reason)
    return Score(value=number, reason=_shortened(reason))


def _missing(problem: str, reason: str) -> Score:
    return Score(value=None, reason=_shortened(f"{problem}; its reason: {reason}" if reason else problem))


def _all_missing(inputs: Sequence[RewardInput], reason: str) -> list[Score]:
    return [Score(value=None, reason=_shortened(reason)) for _ in inputs]


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_REASON_CHARS else text[: MAX_REASON_CHARS - 1] + "…"
