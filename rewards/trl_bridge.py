"""Any reward of ours as a `reward_func` of TRL's trainers; the other way is `trl:package.module:function` in a recipe.

Follows the signature of TRL 1.16 (`GRPOTrainer._calculate_rewards`); imports no TRL.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from rewards.base import AnyReward, RewardContext, begin_step, check_reward_ready, close_reward, score_group
from rewards.config import RewardSpec
from rewards.errors import RewardConfigError
from rewards.registry import build_reward
from rewards.trl_functions import LENT, function_name
from rewards.types import RewardInput, Score

Result = TypeVar("Result")


def as_trl_reward(
    reward: AnyReward | RewardSpec | str,
    *,
    params: Mapping[str, Any] | None = None,
    base_dir: Path | None = None,
    audit_path: Path | None = None,
    reference_column: str = "reference",
    name: str = "",
) -> TrlRewardFunction:
    """Any reward of ours as a `reward_func` of TRL's trainers. A missing score is None, which TRL takes out.

    Args:
        reward: a name as in a recipe, a spec, or a reward.
        params: the reward's parameters, where it is named.
        base_dir: where relative paths and local modules are found; the working directory where None.
        audit_path: where a judge-backed reward writes what it asked and was answered.
        reference_column: the dataset's column with the right answer; the other columns become `meta`.
        name: what TRL logs it as; the reward's own name where empty.
    Raises:
        RewardError: it cannot be built, or is not ready (a judge that does not answer).
    """
    if isinstance(reward, str):
        reward = RewardSpec.model_validate({"name": reward, "params": dict(params or {})})
    elif params:
        raise RewardConfigError("params are for a reward given by its name; this one has its own.")
    if not isinstance(reward, RewardSpec):
        return TrlRewardFunction(
            reward, name=name or function_name(reward), reference_column=reference_column, closes_reward=False
        )
    built = build_reward(reward, RewardContext(base_dir=base_dir or Path.cwd(), audit_path=audit_path))
    return TrlRewardFunction(
        built, name=name or reward.name.rpartition(":")[2], reference_column=reference_column, closes_reward=True
    )


class TrlRewardFunction:
    """An async TRL reward function; TRL awaits several of them side by side.

    Owns an event loop in a thread of its own, in which the reward lives. `close()`, or the end of a `with` block,
    closes both; one that is forgotten is closed in the background. A reward that came in built is its owner's to close.
    """

    def __init__(self, reward: AnyReward, *, name: str, reference_column: str, closes_reward: bool) -> None:
        self.__name__ = name
        self._reward, self._reference_column = reward, reference_column
        self._num_calls = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_serve, args=(self._loop,), name=f"reward-{name}", daemon=True)
        self._thread.start()
        self._to_close = reward if closes_reward else None
        # never waits: the collector may run in the very thread that would have to do the closing
        self._forgotten = weakref.finalize(self, _close_later, self._to_close, self._loop)
        self._forgotten.atexit = False  # the thread is a daemon
        try:
            self._run(check_reward_ready(reward)).result()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TrlRewardFunction:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __call__(
        self, *, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """TRL's call: a batch, in which a group's rows stand side by side. One value per completion, in order.

        Rows that follow one another with the same prompt and reference are scored as one group.

        Raises:
            RuntimeError: it is closed.
            ValueError: a completion or prompt is neither text nor messages, or the lists are of different lengths.
        """
        if not self._forgotten.alive:
            raise RuntimeError(f"reward {self.__name__!r} is closed")
        lent = {key: columns.pop(key, None) for key in LENT}
        columns.pop("environments", None)
        if lent["trainer_state"] is not None:
            begin_step(self._reward, lent["trainer_state"].global_step + 1)
        self._num_calls += 1
        groups = self._groups(prompts, completions, completion_ids, columns)
        scores = await asyncio.wrap_future(self._run(_score_all(self._reward, groups)))
        if lent["log_extra"] is not None:
            lent["log_extra"](f"{self.__name__}_reason", [score.reason for score in scores])
        return [score.value for score in scores]

    def close(self) -> None:
        """Close the reward and end the thread. A second call does nothing."""
        if self._forgotten.detach() is None:
            return
        try:
            self._run(_close_all(self._to_close, self._loop)).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _groups(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any, columns: Mapping[str, Any]
    ) -> list[list[RewardInput]]:
        groups: list[list[RewardInput]] = []
        last: Any = None
        all_ids: Sequence[Any] = [None] * len(prompts) if completion_ids is None else completion_ids
        for number, (prompt, completion, ids) in enumerate(zip(prompts, completions, all_ids, strict=True)):
            row = {key: values[number] for key, values in columns.items()}
            reference = row.pop(self._reference_column, None)
            if not groups or (prompt, reference) != last:
                groups.append([])
                last = (prompt, reference)
            groups[-1].append(
                RewardInput(
                    prompt_id=f"{self._num_calls}/{len(groups)}",
                    prompt=_text(prompt, role="user"),
                    completion=_text(completion, role="assistant"),
                    reference=None if reference is None else str(reference),
                    num_tokens=0 if ids is None else len(ids),
                    meta=row,
                    messages=() if isinstance(prompt, str) else tuple(prompt),
                    token_ids=None if ids is None else tuple(int(token) for token in ids),
                )
            )
        return groups


def _text(value: Any, *, role: str) -> str:
    """A text, or what the last message of that role says."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(message, Mapping) for message in value):
        own = [message.get("content") for message in value if message.get("role") == role]
        return _content(own[-1]) if own else ""
    raise ValueError(f"expected a text or a list of messages, got {type(value).__name__}")


def _content(content: Any) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str):  # blocks, as multi-modal templates have them
        return "".join(str(block.get("text", "")) for block in content if isinstance(block, Mapping))
    return "" if content is None else str(content)


async def _score_all(reward: AnyReward, groups: Sequence[list[RewardInput]]) -> list[Score]:
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(score_group(reward, group)) for group in groups]
    return [score for task in running for score in task.result()]


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


async def _close_all(reward: AnyReward | None, loop: asyncio.AbstractEventLoop) -> None:
    try:
        if reward is not None:
            await close_reward(reward)
    finally:
        await loop.shutdown_default_executor()


def _close_later(reward: AnyReward | None, loop: asyncio.AbstractEventLoop) -> None:
    closing = asyncio.run_coroutine_threadsafe(_close_all(reward, loop), loop)
    closing.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
