"""A reward whose scores are a judge's verdicts; a failed judge is a missing score. Knows the pool; knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from judges.audit import AuditLog, read_audit
from judges.budget import MoneyBudget, spent_according_to, spent_in_steps_according_to
from judges.cache import SqliteCache
from judges.clients.base import JudgeClient
from judges.config import JudgeConfig, Penalise
from judges.dialects import build_client
from judges.errors import AuditFailed, JudgeConfigError, JudgeError
from judges.layered_cache import LayeredCache
from judges.limits.endpoint import SharedLimits
from judges.pool import JudgePool, PoolStats
from judges.prompts import is_rubric_path, load_rubric
from judges.replay import ReplayPool
from judges.seams import VerdictCache
from judges.types import Judgement, JudgeRequest, Scored
from rewards.base import RewardContext
from rewards.errors import RewardConfigError, RewardNotRecorded, RewardUnavailable
from rewards.registry import make_local_module_importable
from rewards.types import RewardInput, Score

MAX_REASON_CHARS = 200


class Judged:
    """Owns a judge pool, its clients and its audit; `aclose()` lets go of them.

    Connections belong to the event loop that opened them, so a new loop gets a new pool. What you hand in stays yours.
    With a replay no client is built, no cache opened and nobody asked: an earlier run's audit answers.
    """

    def __init__(
        self,
        config: JudgeConfig,
        *,
        audit_path: Path | None = None,
        client: JudgeClient | Sequence[JudgeClient] | None = None,
        cache: VerdictCache | None = None,
        budget: MoneyBudget | None = None,
        replay_path: Path | None = None,
        received: VerdictCache | None = None,
        limits: SharedLimits | None = None,
    ) -> None:
        """Take a client for each endpoint (or one for all), a cache or a budget instead of the config's own.

        Args:
            received: keeps what judges said in the step under way; asked before the cache, whatever the config says.
            limits: shared with other rewards that ask the same endpoints.

        Raises:
            RewardConfigError: the rubric or the audit to be replayed cannot be used.
        """
        self._config = config
        self._given_client = client
        self._given_cache = cache
        self._received = received
        self._limits = limits or SharedLimits()
        self._layers: LayeredCache | None = None
        self._budget = budget or _new_budget(config, audit_path)
        take_booking = self._budget.take_booking if self._budget else None
        self._audit = AuditLog(audit_path, take_booking=take_booking) if audit_path is not None else None
        try:
            self._rubric = load_rubric(config.rubric)
            self._replay = (
                ReplayPool(replay_path, config=config, rubric=self._rubric, audit=self._audit) if replay_path else None
            )
        except JudgeConfigError as exc:
            raise RewardConfigError(f"reward 'judged': {exc}") from exc
        self._cache: SqliteCache | None = None  # ours, opened with the pool
        self._pool: JudgePool | ReplayPool | None = None
        self._clients: list[JudgeClient] = []  # those we have built
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def from_params(cls, params: Mapping[str, Any], context: RewardContext) -> Judged:
        """Build from a recipe: params are `JudgeConfig`'s keys; the paths of a rubric and a cache are relative to the
        recipe's folder.

        Raises:
            RewardConfigError: one line per problem; the values are not shown, one may be a secret.
        """
        config = read_judge_config(params, context.base_dir)
        budget = _shared_budget(config, context)
        return cls(
            config,
            audit_path=context.audit_path,
            budget=budget,
            replay_path=context.replay_path,
            received=context.received,
            limits=context.limits,
        )

    async def check(self) -> None:
        """Make sure, before anything depends on it, that the judge can be reached; a replay needs none.

        Raises:
            RewardConfigError: a secret or the URL is missing or wrong.
            RewardUnavailable: nobody answers at the URL, or somebody who is no judge; the message says what to do.
        """
        try:
            if isinstance(self._pool_of_this_loop(), ReplayPool):
                return
            for client in self._clients or _listed(self._given_client):
                check = getattr(client, "check", None)
                if check is not None:  # a client of somebody's own need not have one
                    await check()
        except JudgeConfigError as exc:
            raise RewardConfigError(f"reward 'judged': {exc}") from exc
        except JudgeError as exc:
            raise RewardUnavailable(f"reward 'judged': {exc}") from exc

    def begin_step(self, step: int) -> None:
        """What is judged from now on belongs to this training step: for the audit, the step's budget and replay."""
        if self._audit is not None:
            self._audit.step = step
        if self._budget is not None:
            self._budget.begin_step(step)
        if self._replay is not None:
            self._replay.step = step

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per input, a whole group at a time; None, with the cause, where the judge gave no verdict.

        A completion that makes a healthy judge fail gets the recipe's penalty, if the recipe names one.

        Raises:
            RewardConfigError: a secret or the URL is missing or wrong.
            RewardNotRecorded: a verdict, or a call's money, could not be written to the audit.
        """
        requests = [
            JudgeRequest(
                id=f"{one.prompt_id}#{index}",
                question=one.prompt,
                completion=one.completion,
                reference=one.reference,
                criterion=self._rubric.name,
            )
            for index, one in enumerate(inputs)
        ]
        try:
            judgements = await self._pool_of_this_loop().judge(requests)
        except JudgeConfigError as exc:
            raise RewardConfigError(f"reward 'judged': {exc}") from exc
        except AuditFailed as exc:
            raise RewardNotRecorded(f"reward 'judged': {exc}") from exc
        return [self._score_of(judgement) for judgement in judgements]

    def stats(self) -> PoolStats | None:
        """What the judges were asked and how they fared; None before the first batch.

        An answer that the step had received already is neither a call nor a hit of the cache.
        """
        if self._pool is None:
            return None
        stats = self._pool.stats()
        if self._layers is None or not self._layers.num_from_first:
            return stats
        num_cached = stats.counts.get("cached", 0) - self._layers.num_from_first
        others = {name: count for name, count in stats.counts.items() if name != "cached"}
        return replace(stats, counts={**others, "cached": num_cached} if num_cached else others)

    async def aclose(self) -> None:
        """Close what this reward has opened.

        Raises:
            RewardNotRecorded: the audit's last lines are not on the disk.
        """
        clients, self._clients, self._pool, self._loop = self._clients, [], None, None
        cache, self._cache = self._cache, None
        try:
            for client in clients:
                await client.aclose()
            if cache is not None:
                await cache.aclose()
        finally:
            if self._audit is not None:
                try:
                    await asyncio.to_thread(self._audit.close)
                except AuditFailed as exc:
                    raise RewardNotRecorded(f"reward 'judged': {exc}") from exc

    def _pool_of_this_loop(self) -> JudgePool | ReplayPool:
        if self._replay is not None:
            self._pool = self._replay
            return self._replay
        loop = asyncio.get_running_loop()
        if self._pool is None or self._loop is not loop:
            config = self._config
            if self._given_client is None:
                self._clients = [build_client(one, timeout_s=config.timeout_s) for one in config.endpoints]
            if self._given_cache is None and self._cache is None and config.cache is not None:
                self._cache = SqliteCache(Path(config.cache))
            cache = self._given_cache or self._cache
            self._layers = LayeredCache(self._received, cache) if self._received is not None else None
            self._pool = JudgePool(
                client=self._given_client or self._clients,
                config=config,
                rubric=self._rubric,
                audit=self._audit,
                cache=self._layers or cache,
                budget=self._budget,
                limits=self._limits,
            )
            self._loop = loop
        assert self._pool is not None
        return self._pool

    def _score_of(self, judgement: Judgement) -> Score:
        if isinstance(judgement, Scored):
            return Score(value=judgement.value, reason=" ".join(judgement.raw.split())[:MAX_REASON_CHARS])
        cause = f"judge failed: {judgement.kind}: {judgement.detail}"
        if judgement.fault == "judge":
            return Score(value=None, reason=cause)
        choice = self._config.on_completion_fault
        if isinstance(choice, Penalise):
            return Score(value=choice.penalise, reason=f"penalised by the recipe (on_completion_fault): {cause}")
        hint = "" if choice == "mask" else "; on_completion_fault is not set, so that it has no score"
        made = f"the completion made the judge fail: {judgement.kind}: {judgement.detail}"
        return Score(value=None, reason=f"{made}{hint}")


def read_judge_config(params: Mapping[str, Any], base_dir: Path) -> JudgeConfig:
    """A judge's settings as a recipe writes them, with the paths of a rubric and a cache made absolute.

    Args:
        params: `JudgeConfig`'s keys.
        base_dir: the recipe's folder; a client of one's own may lie there as a module.
    Raises:
        RewardConfigError: one line per problem; the values are not shown, one may be a secret.
    """
    try:
        config = JudgeConfig.model_validate(dict(params))
    except ValidationError as exc:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in error['loc'])}: {error['msg'].removeprefix('Value error, ')}"
            for error in exc.errors(include_input=False, include_url=False, include_context=False)
        )
        raise RewardConfigError(f"reward 'judged': {problems}.") from None
    if is_rubric_path(config.rubric):
        config = config.model_copy(update={"rubric": str(base_dir / config.rubric)})
    for endpoint in config.endpoints:
        make_local_module_importable(endpoint.dialect.partition(":")[0], base_dir)
    if config.cache is not None:
        config = config.model_copy(update={"cache": str(base_dir / Path(config.cache).expanduser())})
    return config


def _shared_budget(config: JudgeConfig, context: RewardContext) -> MoneyBudget | None:
    """The budget of this judge, one for all rewards of a run that ask it.

    Raises:
        RewardConfigError: they name different caps.
    """
    if config.budget is None:
        return None
    name = _judge_name(config)
    known = context.budgets.get(name)
    if known is None:
        known = _new_budget(config, context.audit_path, num_processes=context.num_processes)
        assert known is not None
        context.budgets[name] = known
    elif known.config != config.budget:
        raise RewardConfigError(
            f"reward 'judged': two rewards ask the judge {name}, but their budgets differ. Give both the same budget."
        )
    return known


def _new_budget(config: JudgeConfig, audit_path: Path | None, *, num_processes: int = 1) -> MoneyBudget | None:
    """What is left of the caps by the audit's account of earlier parts of the run."""
    if config.budget is None:
        return None
    name = _judge_name(config)

    def lines() -> Iterable[Mapping[str, Any]]:  # anew each time: an audit may be long
        return read_audit(audit_path) if audit_path is not None and audit_path.is_file() else ()

    return MoneyBudget(
        config.budget,
        judge=name,
        spent=spent_according_to(lines(), judge=name),
        spent_in_step=spent_in_steps_according_to(lines(), judge=name),
        num_processes=num_processes,
    )


def _judge_name(config: JudgeConfig) -> str:
    return f"{Path(config.rubric).stem}@{'+'.join(endpoint.label for endpoint in config.endpoints)}"


def _listed(client: JudgeClient | Sequence[JudgeClient] | None) -> list[JudgeClient]:
    if client is None:
        return []
    return [client] if isinstance(client, JudgeClient) else list(client)
