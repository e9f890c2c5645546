"""JudgeRequests -> Judgements, in order. Owns concurrency, deadlines and retries; nobody else sleeps or retries."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from judges.audit import AuditLog, AuditRecord
from judges.clients.base import JudgeClient
from judges.config import JudgeConfig
from judges.errors import (
    InvalidVerdict,
    JudgeConfigError,
    JudgeFailure,
    JudgeTimeout,
    JudgeUnavailable,
)
from judges.prompts import RenderedPrompt, Rubric, load_rubric, render_prompt
from judges.types import ChatReply, ChatRequest, Failed, FailureKind, Judgement, JudgeRequest, Message, Scored, Usage
from judges.verdicts import parse_verdict

MAX_BACKOFF_S = 20.0
INVALID_VERDICTS_ALLOWED = 1
MAX_DETAIL_CHARS = 300


class JudgePool:
    """Asks one judge about many completions at a time. A request that gets no verdict is Failed, never a number.

    Use: `judgements = await JudgePool(client=client, config=config).judge(requests)`, within one event loop. Batches
    may overlap: they share the concurrency, and each has its own deadline. The client stays its maker's to close.
    """

    def __init__(
        self,
        *,
        client: JudgeClient,
        config: JudgeConfig,
        rubric: Rubric | None = None,
        audit: AuditLog | None = None,
    ) -> None:
        self._client = client
        self._config = config
        self._rubric = rubric or load_rubric(config.rubric)
        self._audit = audit
        limit = config.concurrency
        self._slots = asyncio.Semaphore(limit if isinstance(limit, int) else limit.start)
        self._random = random.Random()  # ours alone: a wait must not move the training's seeds

    async def judge(self, requests: Sequence[JudgeRequest]) -> list[Judgement]:
        """Judge one batch within the config's deadline.

        Returns:
            One judgement per request, in the requests' order.
        Raises:
            JudgeConfigError: the client found a setting wrong or a secret missing.
            AuditFailed: a verdict could not be written down.
        """
        deadline = asyncio.get_running_loop().time() + self._config.deadline_s
        try:
            async with asyncio.TaskGroup() as tasks:
                calls = [tasks.create_task(self._judge_one(request, deadline)) for request in requests]
        except ExceptionGroup as group:  # whatever the judge does is Failed already; this is ours to stop for
            raise group.exceptions[0] from None
        return [call.result() for call in calls]

    async def _judge_one(self, request: JudgeRequest, deadline: float) -> Judgement:
        started = time.monotonic()
        trail = _Trail()
        try:
            async with asyncio.timeout_at(deadline):
                judgement = await self._ask_until_settled(request, trail, deadline)
        except TimeoutError:
            last = f"; last: {trail.problem}" if trail.problem else ""
            judgement = trail.failed("deadline", f"not judged within {self._config.deadline_s:g} s{last}")
        if self._audit is not None:
            latency_s = time.monotonic() - started
            await self._audit.append(_audit_record(request, judgement, trail, latency_s=latency_s))
        return judgement

    async def _ask_until_settled(self, request: JudgeRequest, trail: _Trail, deadline: float) -> Judgement:
        """Ask, and ask again where that may help. The loop ends: both budgets are finite."""
        unavailable, invalid = 0, 0
        while True:
            try:
                return await self._ask_once(request, trail)
            except InvalidVerdict as exc:
                invalid += 1
                trail.problem = str(exc)
                if invalid > INVALID_VERDICTS_ALLOWED:
                    return trail.failed("invalid_verdict", str(exc))
            except JudgeUnavailable as exc:
                unavailable += 1
                trail.problem = str(exc)
                if unavailable >= self._config.attempts:
                    return trail.failed(exc.kind, str(exc))
                wait_s = self._backoff_s(unavailable, exc.retry_after_s)
                remaining_s = deadline - asyncio.get_running_loop().time()
                if wait_s >= remaining_s:
                    return trail.failed("deadline", f"the next try is due in {wait_s:.3g} s, too late; last: {exc}")
                await asyncio.sleep(wait_s)
            except JudgeFailure as exc:
                return trail.failed(exc.kind, str(exc), fault=exc.fault)
            except JudgeConfigError:
                raise
            except Exception as exc:  # noqa: BLE001 - somebody else's client: its bug must cost one verdict, not the run
                return trail.failed("client_error", f"{type(exc).__name__}: {exc}")

    async def _ask_once(self, request: JudgeRequest, trail: _Trail) -> Scored:
        """One try, with a nonce of its own. Waiting for a slot is not part of the try's time."""
        config = self._config
        prompt = render_prompt(
            self._rubric,
            request,
            low=config.scale.low,
            high=config.scale.high,
            max_input_chars=config.max_input_chars,
        )
        chat = ChatRequest(
            messages=(Message(role="user", content=prompt.text),),
            max_tokens=config.max_tokens,
            temperature=config.endpoints[0].temperature,
            seed=config.endpoints[0].seed,
        )
        async with self._slots:
            trail.begin(prompt)
            reply = await self._complete_in_time(chat)
        trail.end(reply)
        value = parse_verdict(reply.text, nonce=prompt.nonce, low=config.scale.low, high=config.scale.high)
        return Scored(value=value, raw=reply.text, usage=trail.usage, attempts=trail.attempts)

    async def _complete_in_time(self, chat: ChatRequest) -> ChatReply:
        try:
            async with asyncio.timeout(self._config.timeout_s):
                return await self._client.complete(chat)
        except TimeoutError:
            raise JudgeTimeout(f"no answer within {self._config.timeout_s:g} s") from None

    def _backoff_s(self, failures: int, retry_after_s: float | None) -> float:
        """Full jitter (AWS Builders' Library, "Timeouts, retries, and backoff with jitter"), or what the judge asks."""
        if retry_after_s is not None:
            return retry_after_s
        return self._random.uniform(0.0, min(MAX_BACKOFF_S, self._config.backoff_s * 2.0 ** (failures - 1)))


@dataclass(slots=True)
class _Trail:
    """What has happened to one request so far."""

    attempts: int = 0
    prompt_sha256: str | None = None
    raw: str | None = None
    usage: Usage | None = None
    problem: str = ""

    def begin(self, prompt: RenderedPrompt) -> None:
        self.attempts += 1
        self.prompt_sha256 = prompt.sha256

    def end(self, reply: ChatReply) -> None:
        self.raw = reply.text
        if reply.usage is not None:
            self.usage = reply.usage if self.usage is None else self.usage.plus(reply.usage)

    def failed(self, kind: FailureKind, detail: str, *, fault: Literal["judge", "completion"] = "judge") -> Failed:
        return Failed(kind=kind, attempts=self.attempts, fault=fault, detail=detail[:MAX_DETAIL_CHARS])


def _audit_record(request: JudgeRequest, judgement: Judgement, trail: _Trail, *, latency_s: float) -> AuditRecord:
    is_scored = isinstance(judgement, Scored)
    return AuditRecord(
        id=request.id,
        criterion=request.criterion,
        prompt_sha256=trail.prompt_sha256,
        raw=trail.raw,
        outcome="scored" if is_scored else judgement.kind,
        value=judgement.value if is_scored else None,
        detail="" if is_scored else judgement.detail,
        attempts=judgement.attempts,
        usage=trail.usage,
        latency_s=round(latency_s, 6),
        time_s=round(time.time(), 3),
    )
