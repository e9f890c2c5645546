"""An audit instead of a judge: the judgements of an earlier run, equal to the bit, without a network.

Which of several judgements of the same text is taken: those of the same step and request first (in their order, where a
step asked again; of the last process that ran the step, where it was run again after a crash), then any of the same
text by the same kind of judge. What the audit does not hold is Failed; nobody is asked.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from judges.audit import AuditRecord, read_audit
from judges.config import JudgeConfig
from judges.errors import JudgeConfigError
from judges.identity import judgement_hashes, rubric_sha256
from judges.pool import PoolStats
from judges.prompts import Rubric, load_rubric
from judges.seams import AuditSink
from judges.types import Failed, FailureKind, Judgement, JudgeRequest, Scored

Occasion = tuple[str, int | None, str]
"""(judgement's hash, step, request's id)."""


class ReplayPool:
    """Owns the judgements of one audit that one judge has given. Used like a `JudgePool`, from any event loop."""

    def __init__(
        self, path: Path, *, config: JudgeConfig, rubric: Rubric | None = None, audit: AuditSink | None = None
    ) -> None:
        """Read the audit.

        Raises:
            JudgeConfigError: it cannot be read, or holds nothing that can be replayed.
        """
        self.path = path
        self.step: int | None = None
        """The training step that requests belong to from now on; None outside of training."""
        self._config = config
        self._rubric = rubric or load_rubric(config.rubric)
        self._audit = audit
        self._by_occasion: dict[Occasion, list[Judgement]] = {}
        self._by_text: dict[str, Judgement] = {}
        self._asked: Counter[Occasion] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._read(rubric_sha256(self._rubric))

    async def judge(self, requests: Sequence[JudgeRequest]) -> list[Judgement]:
        """The judgements on record, one per request, in the requests' order.

        Raises:
            AuditFailed: one could not be written down.
        """
        hashes = judgement_hashes(requests, config=self._config, rubric=self._rubric)
        judgements = [self._find(sha256, request.id) for sha256, request in zip(hashes, requests, strict=True)]
        for request, sha256, judgement in zip(requests, hashes, judgements, strict=True):
            self._outcomes["scored" if isinstance(judgement, Scored) else judgement.kind] += 1
            if self._audit is not None:
                await self._audit.append(_record(request, judgement, sha256, rubric_sha256(self._rubric)))
        return judgements

    def stats(self) -> PoolStats:
        """Judgements so far; there are no endpoints."""
        return PoolStats(lanes=(), outcomes=dict(self._outcomes), counts={})

    def _find(self, sha256: str, request_id: str) -> Judgement:
        occasion = (sha256, self.step, request_id)
        on_record = self._by_occasion.get(occasion)
        if on_record:
            place = self._asked[occasion]
            self._asked[occasion] += 1
            return on_record[min(place, len(on_record) - 1)]
        if sha256 in self._by_text:
            return self._by_text[sha256]
        when = "" if self.step is None else f" of step {self.step}"
        detail = (
            f"{self.path.name} holds no judgement of request {request_id}{when}: this is another text, or another "
            "judge (rubric, model, mode, scale or sampling) than was recorded; a replay asks nobody"
        )
        return Failed(kind="not_recorded", attempts=0, fault="judge", detail=detail, cost=0.0)

    def _read(self, rubric: str) -> None:
        sessions: dict[tuple[str, int | None, str], str] = {}
        found: defaultdict[Occasion, list[Judgement]] = defaultdict(list)
        num_records = 0
        try:
            for line in read_audit(self.path):
                if "booking" in line:
                    continue
                num_records += 1
                sha256, judgement = line.get("judgement_sha256"), _judgement(line)
                if line.get("rubric_sha256") != rubric or sha256 is None or judgement is None:
                    continue
                occasion = (sha256, line.get("step"), str(line.get("id")))
                session = str(line.get("session"))
                if sessions.setdefault(occasion, session) != session:
                    sessions[occasion] = session
                    found[occasion].clear()
                found[occasion].append(judgement)
                if isinstance(judgement, Scored) or not isinstance(self._by_text.get(sha256), Scored):
                    self._by_text[sha256] = judgement
        except OSError as exc:
            raise JudgeConfigError(f"the audit {self.path}, to be replayed, cannot be read: {exc}") from exc
        if not found:
            raise JudgeConfigError(
                f"the audit {self.path} holds {num_records} judgements, but none that can be replayed for rubric "
                f"{self._rubric.name} as it is now. Name the judge_audit.jsonl of a run under this rubric."
            )
        self._by_occasion = dict(found)


def _judgement(line: Mapping[str, Any]) -> Judgement | None:
    """The judgement that a line holds; None where it holds none that we know."""
    match line:
        case {"outcome": "scored", "value": float() | int() as value, "raw": str(raw)}:
            return Scored(
                value=float(value),
                raw=raw,
                usage=None,
                attempts=0,
                cost=0.0,
                endpoint=str(line.get("endpoint", "")),
                origin="replayed",
                disagreement=line.get("disagreement"),
            )
        case {"outcome": str(kind), "fault": "judge" | "completion" as fault, "detail": str(detail)}:
            if kind in get_args(FailureKind):
                return Failed(kind=kind, attempts=0, fault=fault, detail=detail, cost=0.0)  # pyright: ignore[reportArgumentType]  # checked above
    return None


def _record(request: JudgeRequest, judgement: Judgement, sha256: str, rubric: str) -> AuditRecord:
    is_scored = isinstance(judgement, Scored)
    return AuditRecord(
        id=request.id,
        criterion=request.criterion,
        judgement_sha256=sha256,
        prompt_sha256=None,
        rubric_sha256=rubric,
        raw=judgement.raw if is_scored else None,
        outcome="scored" if is_scored else judgement.kind,
        value=judgement.value if is_scored else None,
        detail="" if is_scored else judgement.detail,
        fault=None if is_scored else judgement.fault,
        attempts=0,
        origin="replayed" if is_scored else None,
        endpoint=judgement.endpoint if is_scored else "",
        usage=None,
        cost=0.0,
        disagreement=judgement.disagreement if is_scored else None,
        latency_s=0.0,
        time_s=round(time.time(), 3),
    )
