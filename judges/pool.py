"""JudgeRequests -> Judgements, in order. Owns concurrency, deadlines, retries, budget; nobody else sleeps or retries.

requests  --mode-->  questions, equal ones once, every judge of an ensemble asked by itself
a question  -->  the cache, or the endpoint that is ready first; again, or elsewhere, while time and budgets allow
answers  --mode, ensemble-->  one judgement a request, each written to the audit
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from judges.asking import Asking
from judges.audit_record import audit_record
from judges.clients.base import JudgeClient
from judges.config import JudgeConfig, Penalise
from judges.ensemble import combine
from judges.errors import AuditFailed, InvalidVerdict, JudgeConfigError, JudgeFailure
from judges.exchange import Exchange
from judges.flights import GRACE_S, Flight
from judges.identity import judgement_hashes, rubric_sha256
from judges.lane import Lane, LaneStats, NotAdmitted
from judges.limits.endpoint import SharedLimits
from judges.modes import build_mode
from judges.modes.base import Answer, Outcome, Question
from judges.prompts import Rubric, is_blank, load_rubric
from judges.seams import AuditSink, Budget, VerdictCache
from judges.types import ChatReply, Failed, FailureKind, Judgement, JudgeRequest, Message, Scored, Verdict

SUSPECT_KINDS: frozenset[FailureKind] = frozenset({"invalid_verdict", "empty", "truncated", "reply_too_large"})
"""Failures that a text can provoke without saying so."""
BENIGN_COMPLETION = "I do not know."
MAX_CANARIES = 1000

BLANK = Outcome(
    Failed(kind="blank", attempts=0, fault="completion", detail="the completion holds no text: no judge is asked"), ()
)

Panel = tuple[Lane, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """What a pool has done so far, for metrics and the report."""

    lanes: tuple[LaneStats, ...]
    """Per endpoint, in order of preference."""
    outcomes: dict[str, int]
    """Judgements by outcome: "scored", or what went wrong."""
    counts: dict[str, int]
    """cached (questions), shared (questions), pairs, position_contradictions, completion_faults (judgements)."""


class JudgePool:
    """Asks judges about many completions at a time. A request that gets no verdict is Failed, never a number.

    Use: `judgements = await JudgePool(client=client, config=config).judge(requests)`, within one event loop. Batches
    may overlap: they share the limits, and each has its own deadline. The clients stay their maker's to close.
    """

    def __init__(
        self,
        *,
        client: JudgeClient | Sequence[JudgeClient],
        config: JudgeConfig,
        rubric: Rubric | None = None,
        audit: AuditSink | None = None,
        cache: VerdictCache | None = None,
        budget: Budget | None = None,
        limits: SharedLimits | None = None,
    ) -> None:
        """Take one client for each endpoint, in the config's order; one alone is asked for all of them. Limits are this
        pool's own where None."""
        clients = [client] * len(config.endpoints) if isinstance(client, JudgeClient) else list(client)
        self._clients = dict(zip([one.label for one in config.endpoints], clients, strict=True))
        self._config = config
        self._mode = build_mode(config.mode, config.scale)
        self._rubric = rubric or load_rubric(config.rubric)
        if config.mode.type != "pointwise" and not self._rubric.can_compare:
            raise JudgeConfigError(
                f"rubric {self._rubric.name} shows one answer a call, and the mode is {config.mode.type}. Show the "
                "answers by {answers} and end with {verdict}, or judge pointwise."
            )
        self._rubric_sha256 = rubric_sha256(self._rubric)
        self._exchange = Exchange(config=config, rubric=self._rubric)
        self._audit = audit
        self._cache = cache
        self._budget = budget
        self._limits = limits or SharedLimits()
        self._random = random.Random()  # ours alone: a wait must not move the training's seeds
        self._lanes: Panel = ()
        self._flights: dict[tuple[Panel, Question], tuple[Asking, Flight[Answer]]] = {}
        self._canaries: dict[tuple[Panel, Question], bool] = {}
        self._outcomes: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    async def judge(self, requests: Sequence[JudgeRequest]) -> list[Judgement]:
        """Judge one batch within the config's deadline. Groupwise and pairwise, the completions of one question are
        those of the requests that share question, reference and criterion: hand them in together. A completion without
        any text is not asked about.

        Returns:
            One judgement per request, in the requests' order.
        Raises:
            JudgeConfigError: the client found a setting wrong or a secret missing.
            AuditFailed: a verdict, or a call's money, could not be written down.
        """
        deadline = asyncio.get_running_loop().time() + self._config.deadline_s
        with_text = [request for request in requests if not is_blank(request.completion)]
        questions = list(dict.fromkeys(self._mode.questions(with_text)))
        panels = self._panels()
        try:
            async with asyncio.TaskGroup() as tasks:
                asked = {
                    (panel, question): tasks.create_task(self._answer(panel, question, deadline))
                    for panel in panels
                    for question in questions
                }
        except ExceptionGroup as group:  # whatever the judge does is Failed already; this is ours to stop for
            raise group.exceptions[0] from None
        by_panel = []
        for panel in panels:
            answers = {question: asked[panel, question].result() for question in questions}
            outcomes, counts = self._mode.judgements(with_text, answers)
            self._counts += counts
            by_panel.append(outcomes)
        judged = iter([self._combined(of_request) for of_request in zip(*by_panel, strict=True)])
        outcomes = [BLANK if is_blank(request.completion) else next(judged) for request in requests]
        await self._write_down(requests, outcomes)
        return [outcome.judgement for outcome in outcomes]

    def stats(self) -> PoolStats:
        """Counters and limits so far."""
        return PoolStats(
            lanes=tuple(lane.stats() for lane in self._lanes),
            outcomes=dict(self._outcomes),
            counts=dict(self._counts),
        )

    # One question: asked once for all who want to know, until an answer or the deadline.

    async def _answer(self, panel: Panel, question: Question, deadline: float) -> Answer:
        """The question's answer; `failed("deadline")` where it does not come in time."""
        clock = asyncio.get_running_loop().time
        started = clock()
        is_shared = (panel, question) in self._flights
        if not is_shared:
            self._take_off(panel, question)
        asking, flight = self._flights[panel, question]
        try:
            answer = await flight.wait(deadline)
        except TimeoutError:
            last = f"; last: {list(asking.failures.values())[-1]}" if asking.failures else ""
            answer = asking.failed("deadline", f"not judged within {self._config.deadline_s:g} s{last}")
        self._counts["shared"] += is_shared
        return replace(answer.shared() if is_shared else answer, latency_s=clock() - started)

    def _take_off(self, panel: Panel, question: Question) -> None:
        asking = Asking(question, panel, self._config, self._random)

        def forget() -> None:
            if self._flights.get((panel, question), (None, None))[1] is flight:
                del self._flights[panel, question]

        flight = Flight[Answer](lambda flight: self._ask(asking, panel, flight), on_end=forget)
        self._flights[panel, question] = asking, flight

    async def _ask(self, asking: Asking, panel: Panel, flight: Flight[Answer]) -> Answer:
        """Ask, and ask again where that may help. The loop ends: attempts are finite, and so is the deadline."""
        clock = asyncio.get_running_loop().time
        cached = await self._from_cache(asking)
        if cached is not None:
            return cached
        while True:
            choice = asking.next_lane(clock())
            if choice is None:
                return await self._blamed(asking.failed_for_good(), asking, panel, flight.deadline)
            lane, wait_s = choice
            if wait_s > 0.0:
                if wait_s >= flight.deadline - clock():
                    return asking.failed_waiting(lane, wait_s)
                await asyncio.sleep(wait_s)
                continue  # look again: another endpoint may be ready by now
            try:
                verdict = asking.merge(await self._try_with_twin(lane, asking))
                if not verdict.is_complete:
                    missing = verdict.scores.count(None)
                    raise InvalidVerdict(f"the verdict lacks {missing} of {len(verdict.scores)} ids")
            except NotAdmitted:  # nothing was sent: the lane filled up or closed meanwhile, so look again
                continue
            except JudgeFailure as failure:
                asking.note_failure(lane, failure, clock())
            except (JudgeConfigError, AuditFailed):
                raise
            except Exception as exc:  # noqa: BLE001 - a client's bug must cost one verdict, not the run
                asking.note_failure(lane, JudgeFailure(f"{type(exc).__name__}: {exc}"), clock())
            else:
                if self._cache is not None and asking.key is not None:
                    await self._cache.put(asking.key, verdict)
                return asking.answer(verdict)

    async def _try_with_twin(self, lane: Lane, asking: Asking) -> Verdict:
        """One try; where it is slower than most and hedging is on, a second one beside it: the first answer counts."""
        sent, twin_sent = asyncio.Event(), asyncio.Event()
        after_s = lane.hedge_after_s()
        if after_s is None:
            return await self._try(lane, asking, sent=sent)

        async def try_later() -> Verdict:
            await sent.wait()
            await asyncio.sleep(after_s)
            now = asyncio.get_running_loop().time()
            others = [one for one in asking.candidates() if one is not lane and asking.wait_s(one, now) == 0.0]
            return await self._try([*others, lane][0], asking, sent=twin_sent, is_hedge=True)

        first, twin = asyncio.create_task(self._try(lane, asking, sent=sent)), asyncio.create_task(try_later())
        pending = {first, twin}
        try:
            while True:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                answered = [task for task in done if task.exception() is None]
                if answered:
                    return answered[0].result()
                if first.done() and (twin.done() or not twin_sent.is_set()):
                    return first.result()  # raises: this endpoint's failure is what decides
        finally:
            for task in pending:
                task.cancel()
            if pending:
                await asyncio.wait(pending, timeout=GRACE_S)

    async def _try(self, lane: Lane, asking: Asking, *, sent: asyncio.Event, is_hedge: bool = False) -> Verdict:
        """One call to one endpoint, with a nonce of its own."""
        question, tally = asking.question, asking.tally(lane)
        tally.is_structured = lane.is_structured and not tally.is_in_words
        prompt = self._exchange.prompt(question)
        chat = self._exchange.chat(lane.endpoint, question, prompt.text, is_structured=tally.is_structured)
        asking.prompt_sha256 = prompt.sha256
        asking.key = self._exchange.key(lane.endpoint, question, prompt, chat)
        if asking.problem:
            told = f"{prompt.text}\n\nYour last reply could not be used: {asking.problem}. Reply anew."
            chat = replace(chat, messages=(Message(role="user", content=told),))
        if asking.is_longer:
            chat = replace(chat, max_tokens=2 * chat.max_tokens)

        def read(reply: ChatReply) -> Verdict:
            asking.note_reply(reply)
            if tally.is_in_words:
                lane.note_no_schemas()
            return self._exchange.verdict(lane.endpoint, question, prompt, reply)

        is_extra = tally.was_asked or is_hedge
        try:
            return await lane.ask(chat, read, calls=asking.calls, is_extra=is_extra, is_hedge=is_hedge, sent=sent)
        finally:
            tally.was_asked = tally.was_asked or sent.is_set()
            if self._budget is not None and self._audit is not None:
                # in this thread, before anybody can keep the verdict: the kernel takes a line in microseconds, and a
                # verdict that outlives a kill without its price would be free of charge for the resumed run
                self._audit.append_booking()

    async def _from_cache(self, asking: Asking) -> Answer | None:
        """A verdict that was kept, by the most preferred endpoint that has one."""
        if self._cache is None:
            return None
        question, exchange = asking.question, self._exchange
        prompt = exchange.prompt(question)
        for lane, is_structured in [(one, form) for one in asking.lanes for form in one.forms]:
            chat = exchange.chat(lane.endpoint, question, prompt.text, is_structured=is_structured)
            key = exchange.key(lane.endpoint, question, prompt, chat)
            verdict = await self._cache.get(key)
            if verdict is not None and len(verdict.scores) == len(question.completions):
                self._counts["cached"] += 1
                return Answer(
                    verdict=verdict,
                    failure=None,
                    cost=0.0,
                    origin="cached",
                    key=key,
                    prompt_sha256=prompt.sha256,
                    raw="\n".join(verdict.raws),
                )
        return None

    async def _blamed(self, answer: Answer, asking: Asking, panel: Panel, deadline: float) -> Answer:
        """The failure, blamed on the completion where the same judge judges a harmless text in its place.

        Only where the recipe penalises such completions: elsewhere the evidence, a call, would change nothing.
        """
        failure, question = answer.failure, asking.question
        last_status = list(asking.failures.values())[-1].status
        is_suspect = failure is not None and (
            failure.kind in SUSPECT_KINDS or (failure.kind == "unavailable" and last_status == 500)
        )
        is_penalised = isinstance(self._config.on_completion_fault, Penalise)
        canary = replace(question, completions=(question.reference or BENIGN_COMPLETION,))
        if failure is None or not is_suspect or not is_penalised or len(question.completions) > 1 or canary == question:
            return answer
        if (panel, canary) not in self._canaries:
            passed = (await self._answer(panel, canary, deadline)).verdict is not None
            if len(self._canaries) < MAX_CANARIES:
                self._canaries[panel, canary] = passed
        if not self._canaries.get((panel, canary), False):
            return answer
        detail = f"{failure.detail} (a harmless text in its place was judged)"
        return replace(answer, failure=replace(failure, fault="completion", detail=detail))

    # Bookkeeping.

    def _panels(self) -> list[Panel]:
        """Who is asked: all endpoints as stand-ins for each other, or each as a judge of its own."""
        if not self._lanes:  # at the first batch: their clock is the event loop's
            clock = asyncio.get_running_loop().time
            self._lanes = tuple(
                Lane(
                    endpoint,
                    self._clients[endpoint.label],
                    self._config,
                    clock=clock,
                    budget=self._budget,
                    limits=self._limits.of(endpoint, self._config),
                )
                for endpoint in self._config.endpoints
            )
        return [(lane,) for lane in self._lanes] if self._config.ensemble else [self._lanes]

    def _combined(self, outcomes: Sequence[Outcome]) -> Outcome:
        if self._config.ensemble is None:
            return outcomes[0]
        judgement = combine([outcome.judgement for outcome in outcomes], self._config.ensemble)
        return Outcome(judgement, tuple(answer for outcome in outcomes for answer in outcome.answers))

    async def _write_down(self, requests: Sequence[JudgeRequest], outcomes: Sequence[Outcome]) -> None:
        hashes = judgement_hashes(requests, config=self._config, rubric=self._rubric)
        for request, outcome, sha256 in zip(requests, outcomes, hashes, strict=True):
            judgement = outcome.judgement
            self._outcomes["scored" if isinstance(judgement, Scored) else judgement.kind] += 1
            self._counts["completion_faults"] += not isinstance(judgement, Scored) and judgement.fault == "completion"
            if self._audit is not None:
                record = audit_record(request, outcome, judgement_sha256=sha256, rubric_sha256=self._rubric_sha256)
                await self._audit.append(record)
