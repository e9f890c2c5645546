"""RolloutGroups -> ScoredGroups, asynchronously: rewards work while the engine samples on.

Owns one event loop in a thread of its own, so that a notebook's running loop is no obstacle and clients keep their
connections over the whole run. Knows no torch and no tokens.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from grpo.errors import ConfigError, StorageError
from grpo.journal import Journal
from grpo.judge_figures import JudgeFigures
from grpo.objectives import Objective, WeightedReward
from grpo.types import RolloutGroup, ScoredGroup, Verdict
from rewards.base import begin_step, check_reward_ready, close_reward, score_group
from rewards.errors import RewardError, RewardNotRecorded
from rewards.types import RewardInput, Score

Result = TypeVar("Result")


class Scorer:
    """Scores groups for their objectives. Use as a context manager: it owns a thread and the rewards' connections.

    `submit` returns at once; the futures' results keep the order in which groups were submitted.
    """

    def __init__(self, objectives: Sequence[Objective], *, journal: Journal | None = None) -> None:
        """Args: journal: knows what rewards have said already, and is told what they say."""
        self._journal = journal
        self._objectives = {objective.name: objective for objective in objectives}
        self._figures = JudgeFigures()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpo-scoring", daemon=True)
        self._thread.start()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """Ask every reward whether it is ready (a judge: whether its endpoint answers).

        Raises:
            ConfigError: one is not; before the first step, not after an hour.
        """
        try:
            self._run(self._check()).result()
        except RewardError as exc:
            raise ConfigError(f"a reward is not ready: {exc}") from exc

    def begin_step(self, step: int) -> None:
        """Tell the rewards that what is submitted from now on belongs to this training step."""
        for reward in self._all_rewards():
            begin_step(reward.reward, step)

    def take_judge_figures(self) -> dict[str, float]:
        """Metric name -> what judges did since the last call; empty where there are none."""
        return self._figures.take(reward.reward for reward in self._all_rewards())

    def submit(self, group: RolloutGroup, *, objectives: Sequence[str] | None = None) -> Future[ScoredGroup]:
        """Begin to score one group. Args: objectives: these only; all of the prompt's where None."""
        return self._run(self._score(group, group.prompt.objectives if objectives is None else objectives))

    def close(self) -> None:
        """Close the rewards and stop the thread. A second call does nothing."""
        if self._loop.is_closed():
            return
        try:
            self._run(self._close()).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _check(self) -> None:
        for reward in self._all_rewards():
            await check_reward_ready(reward.reward)

    async def _close(self) -> None:
        pending = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        closing = [close_reward(reward.reward) for reward in self._all_rewards()]
        failures = [e for e in await asyncio.gather(*closing, return_exceptions=True) if isinstance(e, Exception)]
        await self._loop.shutdown_default_executor()
        if failures:
            raise _storage_error(failures) or ExceptionGroup("closing the rewards failed", failures)

    def _all_rewards(self) -> list[WeightedReward]:
        return [reward for objective in self._objectives.values() for reward in objective.rewards]

    async def _score(self, group: RolloutGroup, objectives: Sequence[str]) -> ScoredGroup:
        asked = [self._objectives[name] for name in objectives]
        try:
            async with asyncio.TaskGroup() as tasks:
                running = {
                    (objective.name, reward.name): tasks.create_task(self._ask(group, objective.name, reward))
                    for objective in asked
                    for reward in objective.rewards
                }
        except ExceptionGroup as errors:
            raise _storage_error(errors.exceptions) or errors from None
        scores = {key: task.result() for key, task in running.items()}
        verdicts = tuple(
            {objective.name: _verdict(objective, scores, row) for objective in asked}
            for row in range(len(group.completions))
        )
        return ScoredGroup(rollout=group, verdicts=verdicts)

    async def _ask(self, group: RolloutGroup, objective: str, reward: WeightedReward) -> list[Score]:
        """What the reward says of each completion; asked only where the journal does not know it."""
        if self._journal is None:
            return await score_group(reward.reward, reward_inputs(group))
        known = self._journal.scores(group, objective=objective, reward=reward.name)
        if known is not None:
            return known
        scores = await score_group(reward.reward, reward_inputs(group))
        self._journal.add_scores(group, scores, objective=objective, reward=reward.name)
        return scores


class PendingScores:
    """Groups that are being scored, and how long that takes from the first submission to the last verdict."""

    def __init__(self) -> None:
        self._futures: list[Future[ScoredGroup]] = []
        self._started: float | None = None
        self._ended = 0.0

    @classmethod
    def begin(cls, futures: Iterator[Future[ScoredGroup]]) -> PendingScores:
        """Take futures as the engine's groups come in."""
        pending = cls()
        for future in futures:
            pending._started = pending._started or time.perf_counter()
            future.add_done_callback(pending._note_end)
            pending._futures.append(future)
        return pending

    def results(self, *, order: Sequence[str]) -> list[ScoredGroup]:
        """Wait for all; in the prompts' order, so that nothing depends on who finished first."""
        groups = {group.rollout.prompt.id: group for group in (future.result() for future in self._futures)}
        return [groups[prompt_id] for prompt_id in order]

    @property
    def seconds(self) -> float:
        """Wall time of scoring."""
        return max(self._ended - self._started, 0.0) if self._started else 0.0

    def _note_end(self, _: object) -> None:
        self._ended = max(self._ended, time.perf_counter())


def _storage_error(errors: Sequence[BaseException]) -> StorageError | None:
    """What could not be written down is no missing score: the run stops. None where there is no such thing."""
    unrecorded = [error for error in errors if isinstance(error, RewardNotRecorded)]
    return StorageError(str(unrecorded[0])) if unrecorded else None


def reward_inputs(group: RolloutGroup) -> list[RewardInput]:
    """What the rewards are told about a group: one input per completion."""
    prompt = group.prompt
    messages = tuple({"role": message.role, "content": message.content} for message in prompt.messages)
    return [
        RewardInput(
            prompt_id=prompt.id,
            prompt=prompt.messages[-1].content,
            completion=completion.text,
            reference=prompt.reference,
            num_tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason,
            meta=prompt.meta,
            messages=messages,
            # a file's completions have places for their tokens, but were not sampled here
            token_ids=completion.token_ids if completion.sampler_logprobs else None,
        )
        for completion in group.completions
    ]


def _verdict(objective: Objective, scores: Mapping[tuple[str, str], Sequence[Score]], row: int) -> Verdict:
    own = {reward.name: scores[objective.name, reward.name][row] for reward in objective.rewards}
    parts = {name: score.value for name, score in own.items()}
    reasons = [f"{name}: {score.reason}" for name, score in own.items() if score.reason]
    value = objective.score(parts)
    if objective.combine == "product" and any(part is not None and part < 0 for part in parts.values()):
        reasons.append("a product of rewards takes no value below 0")
    return Verdict(value=value, parts=parts, reason="; ".join(reasons))


def missing_objectives(group: ScoredGroup) -> list[str]:
    """Objectives of which some completion of the group has no verdict."""
    return [
        name
        for name in group.rollout.prompt.objectives
        if any(verdicts[name].value is None for verdicts in group.verdicts)
    ]


def with_newer(group: ScoredGroup, newer: ScoredGroup) -> ScoredGroup:
    """The group with an objective's newer verdicts where more of them are there.

    All of a group's or none: a judge that compares its completions speaks in one scale a call.
    """

    def num_valid(scored: ScoredGroup, name: str) -> int:
        return sum(verdicts[name].value is not None for verdicts in scored.verdicts)

    better = [name for name in newer.verdicts[0] if num_valid(newer, name) > num_valid(group, name)]
    verdicts = tuple(
        {**old, **{name: new[name] for name in better}} for old, new in zip(group.verdicts, newer.verdicts, strict=True)
    )
    return ScoredGroup(rollout=group.rollout, verdicts=verdicts)


def shortage(groups: Sequence[ScoredGroup], min_valid: Mapping[str, float]) -> str:
    """Which objective has too few verdicts to train on, and why; empty where none has.

    Args: min_valid: objective -> share of its completions that must have one.
    """
    for name in sorted({name for group in groups for name in group.rollout.prompt.objectives}):
        verdicts = [row[name] for group in groups for row in group.verdicts if name in row]
        missing = [verdict for verdict in verdicts if verdict.value is None]
        if len(verdicts) - len(missing) < min_valid[name] * len(verdicts):
            return (
                f"objective {name}: {len(missing)} of {len(verdicts)} completions have no verdict, and "
                f"min_valid_fraction = {min_valid[name]:g} asks for more. Last cause: {missing[-1].reason}"
            )
    return ""
