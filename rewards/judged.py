"""A reward whose scores are a judge's verdicts; a failed judge is a missing score. Knows the pool; knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from judges.audit import AuditLog
from judges.clients.base import JudgeClient
from judges.config import JudgeConfig
from judges.errors import AuditFailed, JudgeConfigError, JudgeError
from judges.pool import JudgePool
from judges.prompts import is_rubric_path, load_rubric
from judges.types import Judgement, JudgeRequest, Scored
from rewards.base import RewardContext
from rewards.errors import RewardConfigError, RewardError, RewardUnavailable
from rewards.types import RewardInput, Score

MAX_REASON_CHARS = 200


class Judged:
    """Owns a judge pool, its HTTP client and its audit; `aclose()` lets go of them.

    Connections belong to the event loop that opened them, so a new loop gets a new pool. A client of yours stays yours.
    """

    def __init__(
        self, config: JudgeConfig, *, audit_path: Path | None = None, client: JudgeClient | None = None
    ) -> None:
        try:
            self._rubric = load_rubric(config.rubric)
        except JudgeConfigError as exc:
            raise RewardConfigError(f"reward 'judged': {exc}") from exc
        self._config = config
        self._given_client = client
        self._audit = AuditLog(audit_path) if audit_path is not None else None
        self._pool: JudgePool | None = None
        self._client: JudgeClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def from_params(cls, params: Mapping[str, Any], context: RewardContext) -> Judged:
        """Build from a recipe: params are `JudgeConfig`'s keys; a rubric's path is relative to the recipe's folder.

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
            config = config.model_copy(update={"rubric": str(context.base_dir / config.rubric)})
        return cls(config, audit_path=context.audit_path)

    async def check(self) -> None:
        """Make sure, before anything depends on it, that the judge can be reached.

        Raises:
            RewardConfigError: a secret or the URL is missing or wrong.
            RewardUnavailable: nobody answers at the URL, or somebody who is no judge; the message says what to do.
        """
        self._pool_of_this_loop()
        check = getattr(self._client, "check", None)
        if check is None:  # a client of the caller's own need not have one
            return
        try:
            await check()
        except JudgeConfigError as exc:
            raise RewardConfigError(f"reward 'judged': {exc}") from exc
        except JudgeError as exc:
            raise RewardUnavailable(f"reward 'judged': {exc}") from exc

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per input; None, with the cause, where the judge gave no verdict.

        Raises:
            RewardConfigError: a secret or the URL is missing or wrong.
            RewardError: a verdict could not be written to the audit.
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
            raise RewardError(f"reward 'judged': {exc}") from exc
        return [_score_of(judgement) for judgement in judgements]

    async def aclose(self) -> None:
        """Close what this reward has opened."""
        client, self._client, self._pool, self._loop = self._client, None, None, None
        try:
            if client is not None and client is not self._given_client:
                await client.aclose()
        finally:
            if self._audit is not None:
                await asyncio.to_thread(self._audit.close)

    def _pool_of_this_loop(self) -> JudgePool:
        loop = asyncio.get_running_loop()
        if self._pool is None or self._loop is not loop:
            self._client = self._given_client or _http_client(self._config)
            self._pool = JudgePool(client=self._client, config=self._config, rubric=self._rubric, audit=self._audit)
            self._loop = loop
        return self._pool


def _http_client(config: JudgeConfig) -> JudgeClient:
    from judges.clients.openai_chat import OpenAIChatClient  # late: httpx is not needed to read a recipe

    return OpenAIChatClient(config.endpoints[0], timeout_s=config.timeout_s)


def _score_of(judgement: Judgement) -> Score:
    if isinstance(judgement, Scored):
        return Score(value=judgement.value, reason=" ".join(judgement.raw.split())[:MAX_REASON_CHARS])
    return Score(value=None, reason=f"judge failed: {judgement.kind}: {judgement.detail}")
