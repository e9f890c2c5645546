"""One endpoint: its client and all that bounds how it is asked. A call goes out when every bound lets it, and its
outcome teaches them. Knows no questions and no retries: the pool decides who is asked, and when."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from judges.clients.base import JudgeClient
from judges.config import EndpointConfig, JudgeConfig
from judges.errors import (
    InvalidVerdict,
    JudgeDenied,
    JudgeError,
    JudgeFailure,
    JudgeOverloaded,
    JudgeRefused,
    JudgeRejected,
    JudgeTimeout,
    JudgeUnavailable,
)
from judges.limits.breaker import State, Ticket
from judges.limits.endpoint import EndpointLimits
from judges.seams import Budget, Reservation
from judges.types import Call, ChatReply, ChatRequest, FailureKind, Usage

logger = logging.getLogger(__name__)

Reading = TypeVar("Reading")

CHARS_PER_TOKEN = 3
"""Fewer than most texts have, so that the rate limits are rather estimated too high; usage corrects it."""
ABSURD_USAGE = 4
"""Usage beyond so many times the largest possible count is nonsense."""
MAX_HOLD_S = 20.0
SICK_KINDS: frozenset[FailureKind] = frozenset({"redirect", "tls", "address", "reply_too_large"})
"""Rejections that say something about the endpoint, not about the request."""


class NotAdmitted(Exception):
    """The bounds have closed while the call was waiting; nothing was sent. The pool looks for another way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneStats:
    """What has happened at one endpoint so far, for metrics and the report."""

    endpoint: str
    """Its name."""
    calls: int
    """Sent."""
    outcomes: dict[str, int]
    """How they ended, by `Call.outcome`."""
    extra_calls: int
    """Of the calls, those beyond a request's first: retries and hedges."""
    hedges: int
    """Of the calls, second simultaneous tries."""
    limit: int
    """Calls that may be in flight now."""
    limit_history: tuple[tuple[float, int], ...]
    """(time on the event loop's clock, limit) at each change."""
    breaker: State
    """Whether it is asked at all."""
    breaker_events: tuple[tuple[float, State], ...]
    """(time, state) at each change."""
    usage: Usage
    """Tokens counted."""
    unbelievable_usage: int
    """Replies whose count of tokens was nonsense; the estimate was kept."""
    cost: float
    """Money known to be spent."""


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """A call that was sent, and how it has ended so far."""

    ticket: Ticket
    """The breaker's."""
    asked_at: float
    """On the event loop's clock."""
    sent_at: float
    is_hedge: bool
    outcome: Literal["answered", "cancelled"] | FailureKind = "cancelled"
    status: int | None = None
    """The HTTP status of a failure."""
    usage: Usage | None = None
    """Tokens that it took, where that can be believed."""
    may_be_billed: bool = True
    hold_s: float = 0.0
    """For which its slot is kept after its end."""


class Lane:
    """One pool's way to an endpoint; owns neither the client nor the limits.

    Use: `await lane.ask(chat, read, calls=..., is_extra=False)`.
    """

    def __init__(
        self,
        endpoint: EndpointConfig,
        client: JudgeClient,
        config: JudgeConfig,
        *,
        clock: Callable[[], float],
        budget: Budget | None,
        limits: EndpointLimits,
    ) -> None:
        self.endpoint = endpoint
        self.label = endpoint.label
        self._client = client
        self._timeout_s = config.timeout_s
        self._hedge = config.hedge
        self._clock = clock
        self._budget = budget
        self._limits = limits
        self._outcomes: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._usage = Usage(prompt_tokens=0, completion_tokens=0)
        self._cost = 0.0
        self.is_structured = endpoint.structured != "text"
        """Whether replies are to be held to a schema."""

    @property
    def denial(self) -> JudgeDenied | None:
        """Why nobody waits for this endpoint; None while it takes our calls."""
        return self._limits.denial

    @property
    def forms(self) -> tuple[bool, ...]:
        """`is_structured`, and the other one where a verdict may have been asked for in that form before."""
        is_either = self.endpoint.structured == "auto"
        return (self.is_structured, not self.is_structured) if is_either else (self.is_structured,)

    def note_no_schemas(self) -> None:
        """It has refused a schema, and then answered without one."""
        if self.is_structured:
            self.is_structured = False
            logger.warning("judge %s takes no JSON schema: verdicts are asked for in words alone", self.label)

    def ready_in_s(self, *, is_extra: bool) -> float:
        """Seconds until it is worth a try, as far as is known now; inf where waiting does not help."""
        budget_s = self._limits.retry_budget.wait_s() if is_extra else 0.0
        return max(self._limits.breaker.wait_s(), self._limits.rates.pause_left_s, budget_s)

    def hedge_after_s(self) -> float | None:
        """Seconds after which a call is slower than most; None where no twin is to be sent."""
        if self._hedge is None or len(self._limits.latencies) < self._hedge.min_calls:
            return None
        return self._limits.latencies.quantile(self._hedge.quantile)

    async def ask(
        self,
        chat: ChatRequest,
        read: Callable[[ChatReply], Reading],
        *,
        calls: list[Call],
        is_extra: bool,
        is_hedge: bool = False,
        sent: asyncio.Event | None = None,
    ) -> Reading:
        """Wait for leave, send once, read the reply.

        Args:
            chat: what to send.
            read: makes a verdict of the reply, or raises InvalidVerdict.
            calls: what was sent is appended, however it ends.
            is_extra: not the request's first try here; spends the retry budget.
            is_hedge: for the record.
            sent: set when the call has left.
        Raises:
            JudgeFailure: as `JudgeClient.complete`, or as `read`.
            NotAdmitted: nothing was sent; ask `ready_in_s` anew.
        """
        tokens = sum(len(message.content) for message in chat.messages) / CHARS_PER_TOKEN + chat.max_tokens
        asked_at, hold_s = self._clock(), 0.0
        await self._limits.slots.acquire()
        try:
            ticket, reservation = await self._wait_for_leave(chat, tokens, is_extra=is_extra)
            if sent is not None:
                sent.set()
            self._counts.update(calls=1, extra=is_extra, hedges=is_hedge)
            attempt = _Attempt(ticket=ticket, asked_at=asked_at, sent_at=self._clock(), is_hedge=is_hedge)
            try:
                return await self._send(chat, read, attempt)
            finally:
                hold_s = attempt.hold_s
                calls.append(self._settled(attempt, reservation, tokens))
        finally:
            self._release_slot(hold_s)

    def stats(self) -> LaneStats:
        """So far."""
        return LaneStats(
            endpoint=self.label,
            calls=self._counts["calls"],
            outcomes=dict(self._outcomes),
            extra_calls=self._counts["extra"],
            hedges=self._counts["hedges"],
            limit=self._limits.concurrency.limit,
            limit_history=tuple(self._limits.concurrency.history),
            breaker=self._limits.breaker.state,
            breaker_events=tuple(self._limits.breaker.events),
            usage=self._usage,
            unbelievable_usage=self._counts["unbelievable_usage"],
            cost=self._cost,
        )

    # One call: leave to send, the reply, what it has cost.

    async def _wait_for_leave(
        self, chat: ChatRequest, tokens: float, *, is_extra: bool
    ) -> tuple[Ticket, Reservation | None]:
        """With a slot in hand, wait for the rate limits and the budget, then take leave."""
        await self._limits.rates.acquire(tokens)
        try:
            if self._budget is not None:
                await self._budget.wait_for_room(self._upper_bound(chat))
            return self._leave(chat, is_extra=is_extra)
        except BaseException:  # a cancelled wait sends nothing either
            self._limits.rates.give_back(tokens)
            raise

    def _leave(self, chat: ChatRequest, *, is_extra: bool) -> tuple[Ticket, Reservation | None]:
        """All that must be asked in the moment of sending; nothing in here waits."""
        if self._limits.rates.pause_left_s > 0 or (is_extra and self._limits.retry_budget.wait_s() > 0):
            raise NotAdmitted
        ticket = self._limits.breaker.admit()
        if ticket is None:
            raise NotAdmitted
        try:
            reservation = self._budget.reserve(self._upper_bound(chat)) if self._budget else None
        except JudgeError:
            self._limits.breaker.on_no_outcome(ticket)
            raise
        if is_extra:
            self._limits.retry_budget.take()
        else:
            self._limits.retry_budget.note_first()
        return ticket, reservation

    async def _send(self, chat: ChatRequest, read: Callable[[ChatReply], Reading], attempt: _Attempt) -> Reading:
        """The reading of the reply; notes in the attempt how it ended, and teaches the limits."""
        try:
            reply = await self._complete(chat)
            attempt.usage = self._believed(reply.usage, chat)
            self._limits.rates.sync_down(requests=reply.remaining_requests, tokens=reply.remaining_tokens)
            reading = read(replace(reply, usage=attempt.usage))
        except JudgeFailure as exc:
            attempt.outcome, attempt.status = exc.kind, exc.status
            if attempt.usage is None:  # the client may have seen what the reply took, though it is none
                attempt.usage = exc.usage = self._believed(exc.usage, chat)
            attempt.may_be_billed = attempt.usage is not None or attempt.status is None
            self._on_failure(attempt.ticket, exc)
            attempt.hold_s = self._hold_s(exc)
            raise
        except asyncio.CancelledError:
            self._limits.breaker.on_no_outcome(attempt.ticket)
            raise
        except Exception:
            attempt.outcome = "client_error"
            self._limits.breaker.on_failure(attempt.ticket)
            raise
        attempt.outcome = "answered"
        self._on_answer(attempt.ticket, latency_s=self._clock() - attempt.sent_at)
        return reading

    def _settled(self, attempt: _Attempt, reservation: Reservation | None, tokens: float) -> Call:
        """The call has ended: its tokens and its money are counted. Args: tokens: that the rate limits were told."""
        usage = attempt.usage
        if usage is not None:
            self._usage = self._usage.plus(usage)
            self._limits.rates.true_up(tokens, usage.prompt_tokens + usage.completion_tokens)
        elif not attempt.may_be_billed:
            self._limits.rates.true_up(tokens, 0.0)
        cost = self._settle(reservation, usage, may_be_billed=attempt.may_be_billed)
        self._outcomes[attempt.outcome] += 1
        return Call(
            endpoint=self.label,
            outcome=attempt.outcome,
            latency_s=self._clock() - attempt.sent_at,
            waited_s=attempt.sent_at - attempt.asked_at,
            is_hedge=attempt.is_hedge,
            status=attempt.status,
            cost=cost,
        )

    def _release_slot(self, hold_s: float) -> None:
        if hold_s:
            asyncio.get_running_loop().call_later(hold_s, self._limits.slots.release)
        else:
            self._limits.slots.release()

    async def _complete(self, chat: ChatRequest) -> ChatReply:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._client.complete(chat)
        except TimeoutError:
            raise JudgeTimeout(f"no answer within {self._timeout_s:g} s") from None

    def _on_answer(self, ticket: Ticket, *, latency_s: float) -> None:
        self._limits.breaker.on_success(ticket)
        self._limits.latencies.note(latency_s)
        self._limits.concurrency.on_success()
        self._limits.num_overloads = 0
        self._limits.denial = None

    def _on_failure(self, ticket: Ticket, failure: JudgeFailure) -> None:
        if isinstance(failure, JudgeUnavailable) and failure.retry_after_s is not None:
            self._limits.rates.pause(failure.retry_after_s)
        if isinstance(failure, JudgeOverloaded):
            self._limits.breaker.on_no_outcome(ticket)
            self._limits.concurrency.on_overload()
            self._limits.num_overloads += 1
        elif isinstance(failure, JudgeDenied):
            self._limits.denial = failure
            self._limits.breaker.on_denied(ticket)
        elif isinstance(failure, InvalidVerdict | JudgeRefused | JudgeRejected) and failure.kind not in SICK_KINDS:
            self._limits.breaker.on_success(ticket)  # it answered: its health is not in doubt
            self._limits.concurrency.on_success()
        else:
            self._limits.breaker.on_failure(ticket)

    def _hold_s(self, failure: JudgeFailure) -> float:
        """Seconds that a call keeps its slot after its end. A 429 comes back at once: were its slot free at once, the
        next call in the queue would meet the same answer, and the next, until nobody is left who has not been told.
        Where the endpoint says how long to wait, the pause does as much."""
        if not isinstance(failure, JudgeOverloaded) or failure.retry_after_s is not None:
            return 0.0
        return min(2.0 ** min(self._limits.num_overloads - 1, 10), MAX_HOLD_S)

    def _believed(self, usage: Usage | None, chat: ChatRequest) -> Usage | None:
        if usage is None:
            return None
        is_negative = usage.prompt_tokens < 0 or usage.completion_tokens < 0
        is_too_much = (
            usage.prompt_tokens > ABSURD_USAGE * _prompt_bytes(chat)
            or usage.completion_tokens > ABSURD_USAGE * chat.max_tokens
        )
        if is_negative or is_too_much:
            self._counts["unbelievable_usage"] += 1
            return None
        return usage

    def _upper_bound(self, chat: ChatRequest) -> float:
        price = self.endpoint.price
        assert price is not None  # the config takes no budget without every price
        return price.cost(prompt_tokens=_prompt_bytes(chat), completion_tokens=chat.max_tokens)

    def _settle(self, reservation: Reservation | None, usage: Usage | None, *, may_be_billed: bool) -> float | None:
        cost: float | None = None
        if self.endpoint.price is not None and usage is not None:
            cost = self.endpoint.price.cost(
                prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens
            )
        elif self.endpoint.price is not None and not may_be_billed:
            cost = 0.0
        if reservation is not None:
            reservation.settle(cost)
        self._cost += cost or 0.0
        return cost


def _prompt_bytes(chat: ChatRequest) -> int:
    """At least as many as a byte-level tokenizer makes tokens, with 64 a message for the chat template."""
    return sum(len(message.content.encode("utf-8", "replace")) + 64 for message in chat.messages)
