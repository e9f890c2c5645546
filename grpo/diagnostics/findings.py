"""What a check found: one record for all checks. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

Status: TypeAlias = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One row of a check's table."""

    check: str
    """Which check: its name in the table and in JSON."""
    status: Status
    what: str
    """What was measured, with its numbers."""
    meaning: str = ""
    """What that does to a run; may be empty where all is well."""
    remedy: str = ""
    """What to do about it; empty only where status is "ok"."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The numbers of `what`, for JSON."""

    def __post_init__(self) -> None:
        assert self.status == "ok" or (self.meaning and self.remedy), f"{self.check}: a fault without its remedy"


def worst_status(findings: Sequence[Finding]) -> Status:
    """The verdict over all of them."""
    found = {finding.status for finding in findings}
    return "failed" if "failed" in found else "warning" if "warning" in found else "ok"


def findings_as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """{"verdict": worst status, "findings": [...]}, each with its figures."""
    return {"verdict": worst_status(findings), "findings": [asdict(finding) for finding in findings]}
