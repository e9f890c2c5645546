"""A reward function made for TRL's trainers, unchanged, as a reward. Follows TRL 1.16's signature; imports no TRL.

Such a function takes a batch as keyword lists (`prompts`, `completions`, `completion_ids`, every column of the dataset)
and what the trainer lends it (`trainer_state`, `log_extra`, `log_metric`); it answers a float or None for each
completion. Source: `GRPOTrainer._calculate_rewards`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from rewards.base import RewardContext
from rewards.config import RewardSpec, StrictModel
from rewards.errors import RewardConfigError
from rewards.registry import TRL_PREFIX, find_by_path, parse_params
from rewards.types import RewardInput, Score

TrlFunction = Callable[..., Any]

LENT = ("trainer_state", "log_extra", "log_metric")
"""What TRL's trainer passes besides the batch."""


class TrlRewardParams(StrictModel):
    """How a TRL reward function is called."""

    form: Literal["messages", "text"] = "messages"
    """"messages": prompts and completions are lists of {role, content}, as TRL gives them for conversational data.
    "text": both are texts, as for plain data; a prompt of several messages has no such form."""
    reference_as: str = "reference"
    """Name of the column that holds the reference: "solution" for TRL's own `accuracy_reward`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments, bound as by `functools.partial`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerStateStandIn:
    """What is known here of a trainer's state. To ask for another of TRL's fields is an error, not a guess."""

    global_step: int
    """Optimizer steps that are done: 0 during the first step."""


class TrlReward:
    """A TRL reward function as a reward. Owns the one thread in which a plain function runs; `aclose()` ends it.

    TRL calls such a function with a whole batch, one batch at a time; here it gets one group at a time, never two at
    once. What it gives to `log_extra` and `log_metric` becomes the scores' reason.
    """

    def __init__(self, function: TrlFunction, params: TrlRewardParams | None = None, *, name: str = "") -> None:
        """Take the function as it is.

        Raises:
            RewardConfigError: it is a class, or cannot be called.
        """
        self._name = name or function_name(function)
        if inspect.isclass(function) or not callable(function):
            raise RewardConfigError(
                f"reward {self._name!r} is {'a class' if inspect.isclass(function) else type(function).__name__}; TRL "
                "takes a function or an instance with __call__. Name one, such as `mine = MyReward()` in your module."
            )
        self._params = params or TrlRewardParams()
        self._function = functools.partial(function, **self._params.arguments)
        self._is_async = _is_async(function)
        self._takes = _parameters_of(function)
        self._step = 1
        self._thread: ThreadPoolExecutor | None = None

    @classmethod
    def from_spec(cls, spec: RewardSpec, context: RewardContext) -> TrlReward:
        """Find the function that `trl:package.module:function` names.

        Raises:
            RewardConfigError: it leads nowhere, or a parameter is unknown.
        """
        function = find_by_path(spec.name.removeprefix(TRL_PREFIX), context, shown_as=spec.name)
        return cls(function, parse_params(TrlRewardParams, spec.params, reward_name=spec.name), name=spec.name)

    def begin_step(self, step: int) -> None:
        """What is scored from now on belongs to this step, counted from 1; `trainer_state` says so."""
        self._step = step

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per input; missing where the function answers None or NaN.

        Raises:
            ValueError: the function answered another number of values, or the inputs lack what it must be given.
            Exception: whatever the function raises.
        """
        notes = _Notes(num_rows=len(inputs))
        arguments = self._arguments(inputs, notes)
        if self._is_async:
            answer = await self._function(**arguments)
        else:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="trl-reward")
            loop = asyncio.get_running_loop()
            answer = await loop.run_in_executor(self._thread, lambda: list(self._function(**arguments)))
        values = [_number(value) for value in answer]
        if len(values) != len(inputs):
            raise ValueError(f"{self._name} answered {len(values)} rewards for {len(inputs)} completions")
        return [_score(value, reason) for value, reason in zip(values, notes.reasons(), strict=True)]

    async def aclose(self) -> None:
        """End the thread, once its last call is done."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.to_thread(thread.shutdown)

    def _arguments(self, inputs: Sequence[RewardInput], notes: _Notes) -> dict[str, Any]:
        texts = [self._texts(one) for one in inputs]
        known: dict[str, Any] = {
            **_columns(inputs, reference_as=self._params.reference_as),
            "prompts": [prompt for prompt, _ in texts],
            "completions": [completion for _, completion in texts],
            "trainer_state": TrainerStateStandIn(global_step=self._step - 1),
            "log_extra": notes.log_extra,
            "log_metric": notes.log_metric,
        }
        ids = [list(one.token_ids) for one in inputs if one.token_ids is not None]
        if len(ids) == len(inputs):
            known["completion_ids"] = ids
        self._check_known(known)
        return {name: value for name, value in known.items() if self._takes.accepts(name)}

    def _texts(self, one: RewardInput) -> tuple[Any, Any]:
        messages = [dict(message) for message in one.messages] or [{"role": "user", "content": one.prompt}]
        if self._params.form == "messages":
            return messages, [{"role": "assistant", "content": one.completion}]
        if len(messages) > 1:
            raise ValueError(f"{self._name}: a prompt of {len(messages)} messages is no text; set form: messages")
        return one.prompt, one.completion

    def _check_known(self, known: Mapping[str, Any]) -> None:
        lacking = sorted(self._takes.required - known.keys() - self._params.arguments.keys())
        if lacking:
            columns = sorted(known.keys() - {"prompts", "completions", *LENT})
            raise ValueError(
                f"{self._name} wants {', '.join(lacking)}; known here are prompts, completions and "
                f"{', '.join(columns) or 'no column'}. The reference is given under the name in params.reference_as."
            )


def function_name(function: Any) -> str:
    """As TRL shows a reward function: its name, or its class's."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parameters:
    """What a function may and must be given by keyword."""

    named: frozenset[str]
    required: frozenset[str]
    takes_any: bool

    def accepts(self, name: str) -> bool:
        return self.takes_any or name in self.named


def _parameters_of(function: TrlFunction) -> _Parameters:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some C callables have none
        return _Parameters(named=frozenset(), required=frozenset(), takes_any=True)
    by_name = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return _Parameters(
        named=frozenset(one.name for one in by_name),
        required=frozenset(one.name for one in by_name if one.default is one.empty),
        takes_any=any(one.kind is one.VAR_KEYWORD for one in parameters),
    )


class _Notes:
    """What a function logs while it scores one group, kept as text beside its scores."""

    def __init__(self, *, num_rows: int) -> None:
        self._rows: list[list[str]] = [[] for _ in range(num_rows)]

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """One value per completion."""
        for row, value in zip(self._rows, values, strict=True):
            row.append(f"{column}: {value}")

    def log_metric(self, name: str, value: float) -> None:
        """One value for the group."""
        for row in self._rows:
            row.append(f"{name}: {value}")

    def reasons(self) -> list[str]:
        return ["; ".join(row) for row in self._rows]


def _columns(inputs: Sequence[RewardInput], *, reference_as: str) -> dict[str, list[Any]]:
    """The dataset's columns as TRL gives them: those of the first row, a value for each."""
    columns = {key: [one.meta[key] for one in inputs] for key in inputs[0].meta if key not in ("prompt", "completion")}
    if any(one.reference is not None for one in inputs):
        columns[reference_as] = [one.reference for one in inputs]
    return columns


def _number(value: Any) -> float | None:
    """TRL makes a tensor of the values: any kind of number, True and False included, but no text."""
    if isinstance(value, str | bytes):
        raise TypeError(f"a reward is a number or None, got the text {value!r}")
    number = None if value is None else float(value)
    return None if number is None or number != number else number  # TRL takes NaN for None


def _score(value: float | None, reason: str) -> Score:
    if value is None:
        return Score(value=None, reason="; ".join(filter(None, ["the function gave no value", reason])))
    return Score(value=value, reason=reason)


def _is_async(function: TrlFunction) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
