"""A request and its outcome -> the record that the audit keeps."""

from __future__ import annotations

import time

from judges.audit import AuditRecord
from judges.modes.base import Outcome
from judges.types import JudgeRequest, Scored


def audit_record(request: JudgeRequest, outcome: Outcome, *, judgement_sha256: str, rubric_sha256: str) -> AuditRecord:
    """What is written down about one request."""
    judgement, answers = outcome.judgement, outcome.answers
    is_scored = isinstance(judgement, Scored)
    last = answers[-1] if answers else None
    return AuditRecord(
        id=request.id,
        criterion=request.criterion,
        judgement_sha256=judgement_sha256,
        rubric_sha256=rubric_sha256,
        prompt_sha256=last.prompt_sha256 if last else None,
        raw=judgement.raw if is_scored else last.raw if last else None,
        outcome="scored" if is_scored else judgement.kind,
        value=judgement.value if is_scored else None,
        detail="" if is_scored else judgement.detail,
        attempts=judgement.attempts,
        usage=judgement.usage,
        latency_s=round(max((answer.latency_s for answer in answers), default=0.0), 6),
        time_s=round(time.time(), 3),
        cost=judgement.cost,
        origin=judgement.origin if is_scored else None,
        endpoint=judgement.endpoint if is_scored else "",
        disagreement=judgement.disagreement if is_scored else None,
        fault=None if is_scored else judgement.fault,
        keys=tuple(answer.key for answer in answers if answer.key is not None),
        calls=tuple(call for answer in answers for call in answer.calls),
    )
