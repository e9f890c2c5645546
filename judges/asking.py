"""What has happened to one question so far, and which endpoint is asked next. Knows no network and never waits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from judges.config import JudgeConfig
from judges.errors import (
    BudgetExceeded,
    InvalidVerdict,
    JudgeDenied,
    JudgeFailure,
    JudgeOverloaded,
    JudgeRejected,
    JudgeUnavailable,
)
from judges.lane import Lane
from judges.modes.base import Answer, Question
from judges.types import Call, ChatReply, Failed, FailureKind, Fault, Usage, Verdict

MAX_BACKOFF_S = 20.0
INVALID_VERDICTS_ALLOWED = 1
MAX_DETAIL_CHARS = 300
NO_SCHEMA_STATUSES = frozenset({400, 422})
"""What servers answer that know no `response_format`."""


@dataclass(slots=True)
class _Tally:
    """One question's history with one endpoint."""

    num_failures: int = 0
    """Tries that found it unavailable."""
    num_overloads: int = 0
    """Tries that were answered with 429: they cost the endpoint's retry budget, but not the question's attempts."""
    num_invalid: int = 0
    """Replies that held no (whole) verdict."""
    is_structured: bool = False
    """The last try asked for a reply that is held to a schema."""
    is_in_words: bool = False
    """The endpoint would not take a schema: the form is asked for in words alone."""
    was_asked: bool = False
    """The next try is an extra one."""
    not_before: float = float("-inf")
    """Time of the next try: the backoff's, or what the endpoint asked for."""


@dataclass(slots=True)
class Asking:
    """One question on its way. The pool asks `next_lane()`, tries, and tells what came of it."""

    question: Question
    lanes: Sequence[Lane]
    """In order of preference; one that will not do is left out."""
    config: JudgeConfig
    random: random.Random
    calls: list[Call] = field(default_factory=list)
    problem: str = ""
    """Why the last reply could not be used: the judge is told."""
    is_longer: bool = False
    """The last reply was cut off: the next may be twice as long."""
    raw: str | None = None
    prompt_sha256: str | None = None
    key: str | None = None
    usage: Usage | None = None
    partial: Verdict | None = None
    """The scores of texts that an incomplete reply had."""
    failures: dict[str, JudgeFailure] = field(default_factory=dict)
    """The last failure at each endpoint, the latest one last."""
    _out: set[str] = field(default_factory=set)
    _tallies: dict[str, _Tally] = field(default_factory=dict)

    def tally(self, lane: Lane) -> _Tally:
        """The history with one endpoint."""
        return self._tallies.setdefault(lane.label, _Tally())

    def candidates(self) -> list[Lane]:
        """Endpoints that may still be asked."""
        return [lane for lane in self.lanes if lane.label not in self._out]

    def wait_s(self, lane: Lane, now: float) -> float:
        """Seconds until this question may try this endpoint; inf where waiting does not help."""
        tally = self.tally(lane)
        return max(0.0, tally.not_before - now, lane.ready_in_s(is_extra=tally.was_asked))

    def next_lane(self, now: float) -> tuple[Lane, float] | None:
        """The endpoint that can be tried first, the preferred one of several, and the seconds until then."""
        waits = [(self.wait_s(lane, now), index, lane) for index, lane in enumerate(self.candidates())]
        if not waits:
            return None
        wait_s, _, lane = min(waits, key=lambda entry: entry[:2])
        return lane, wait_s

    def note_reply(self, reply: ChatReply) -> None:
        """A reply came, usable or not."""
        self.raw = reply.text
        self._count(reply.usage)

    def merge(self, verdict: Verdict) -> Verdict:
        """The verdict, with the scores it lacks taken from an earlier, incomplete one."""
        earlier = self.partial
        if earlier is not None and not verdict.is_complete:
            rows = zip(verdict.scores, verdict.raws, earlier.scores, earlier.raws, strict=True)
            filled = [(score, raw) if score is not None else (old, old_raw) for score, raw, old, old_raw in rows]
            verdict = replace(verdict, scores=tuple(score for score, _ in filled), raws=tuple(raw for _, raw in filled))
        self.partial = verdict
        return verdict

    def note_failure(self, lane: Lane, failure: JudgeFailure, now: float) -> None:
        """A try has failed: may this endpoint be tried again, and when?"""
        tally = self.tally(lane)
        self._count(failure.usage)
        self.failures.pop(lane.label, None)
        self.failures[lane.label] = failure
        if isinstance(failure, JudgeUnavailable):
            is_overload = isinstance(failure, JudgeOverloaded)
            tally.num_overloads += is_overload
            tally.num_failures += not is_overload
            tally.not_before = now + self._backoff_s(tally, failure.retry_after_s)
            is_out = tally.num_failures >= self.config.attempts
        elif isinstance(failure, InvalidVerdict):
            tally.num_invalid += 1
            self.problem, self.is_longer = str(failure), failure.kind == "truncated"
            is_out = tally.num_invalid > INVALID_VERDICTS_ALLOWED
        elif _may_be_the_schema(lane, tally, failure):
            # another request, not another try of this one: nobody needs the retry budget for it
            tally.is_in_words, tally.was_asked, is_out = True, False, False
        else:
            is_out = True
        if is_out:
            self._out.add(lane.label)
        if isinstance(failure, BudgetExceeded):
            self._out.update(one.label for one in self.lanes)

    def answer(self, verdict: Verdict) -> Answer:
        """All that came of it, with a whole verdict."""
        return self._answer(verdict, None)

    def failed(self, kind: FailureKind, detail: str, *, fault: Fault = "judge") -> Answer:
        """All that came of it, with no verdict or not a whole one."""
        # a call about several texts does not tell which of them made it fail
        fault = fault if len(self.question.completions) == 1 else "judge"
        failure = Failed(kind=kind, attempts=len(self.calls), fault=fault, detail=detail[:MAX_DETAIL_CHARS])
        return self._answer(self.partial, failure)

    def failed_for_good(self) -> Answer:
        """No endpoint is left: the last failure says why. The fault is the completion's if every endpoint says so."""
        last = list(self.failures.values())[-1]
        is_completions = all(failure.fault == "completion" for failure in self.failures.values())
        return self.failed(last.kind, str(last), fault="completion" if is_completions else "judge")

    def failed_waiting(self, lane: Lane, wait_s: float) -> Answer:
        """Every endpoint that is left can be tried too late or not at all: there is no use in waiting for it."""
        denial: JudgeDenied | None = lane.denial
        if wait_s == float("inf") and denial is not None:
            return self.failed(denial.kind, str(denial))
        if wait_s == float("inf") and self.failures:
            return self.failed_for_good()
        cause = f"; last: {list(self.failures.values())[-1]}" if self.failures else ""
        when = f"the next try is due in {wait_s:.3g} s, too late"
        kind: FailureKind = "deadline" if self.failures else "breaker_open"
        return self.failed(kind, f"{lane.label}: {when}{cause}")

    def _count(self, usage: Usage | None) -> None:
        if usage is not None:
            self.usage = usage if self.usage is None else self.usage.plus(usage)

    def _backoff_s(self, tally: _Tally, retry_after_s: float | None) -> float:
        """Full jitter (AWS Builders' Library, "Timeouts, retries, and backoff with jitter"), or what the judge asks."""
        if retry_after_s is not None:
            return retry_after_s
        doublings = min(tally.num_failures + tally.num_overloads - 1, 30)
        return self.random.uniform(0.0, min(MAX_BACKOFF_S, self.config.backoff_s * 2.0**doublings))

    def _answer(self, verdict: Verdict | None, failure: Failed | None) -> Answer:
        costs = [call.cost for call in self.calls]
        return Answer(
            verdict=verdict,
            failure=failure,
            calls=tuple(self.calls),
            usage=self.usage,
            cost=None if None in costs else sum(cost for cost in costs if cost is not None),
            key=self.key,
            prompt_sha256=self.prompt_sha256,
            raw=self.raw,
        )


def _may_be_the_schema(lane: Lane, tally: _Tally, failure: JudgeFailure) -> bool:
    """Whether the same question may be taken without the schema that it was sent with."""
    return (
        lane.endpoint.structured == "auto"
        and tally.is_structured
        and isinstance(failure, JudgeRejected)
        and failure.kind == "rejected"
        and failure.status in NO_SCHEMA_STATUSES
    )
