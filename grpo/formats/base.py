"""What a format makes of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One row of a public dataset, read."""

    id: str
    """Unique within the file."""
    text: str
    """The user's message."""
    reference: str | None
    """The right answer; None where the dataset has none."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What rewards and summaries look at, such as "kind" and "choices"."""


def one_of(choices: list[str]) -> str:
    """The line that asks for one of the choices, in their own words."""
    return f"Answer with one of: {'; '.join(choices)}."
