"""When a run is killed: at a time, in a phase, or right before a file operation; drawn, or chosen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kill_harness.nursery import AtOperation

PHASES = ("rollout", "judging", "journal", "backward", "optimizer", "checkpoint_write", "rename", "rotation")
"""Every one gets its kills; beside them there is "start" (before the first phase is told) and "between"."""
OPERATIONS = {
    "rollout": 6, "judging": 6, "journal": 3, "backward": 1, "optimizer": 1, "checkpoint_write": 20, "rename": 6,
    "rotation": 12,
}  # fmt: skip
"""Phase -> file operations that it has at least, more or less; a kill before one that does not come, comes at its
end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """When a run is to be killed."""

    kind: Literal["time", "phase", "operation"]
    after_s: float = 0.0
    """Since the run's start, or the phase's."""
    phase: str = ""
    occurrence: int = 1
    """Of the phase in this process, from 1."""
    operation: int = 1
    """Of the file operation in the phase, from 1."""
    named: str = ""
    """Such as "write judge_audit.jsonl": only such operations are counted; all of them where empty."""

    @property
    def at_operation(self) -> AtOperation | None:
        """For the process itself; None where it is killed from outside."""
        if self.kind != "operation":
            return None
        return AtOperation(phase=self.phase, occurrence=self.occurrence, operation=self.operation, named=self.named)


def at_any_time(draw: random.Random, seconds: float) -> Kill:
    """Uniform over the wall time of an undisturbed run, its start and its report included."""
    return Kill(kind="time", after_s=draw.uniform(0.0, seconds))


def in_phase(draw: random.Random, phase: str, phases: Sequence[tuple[str, float]]) -> Kill:
    """In any of the phases of this name, at any time in it or right before any of its file operations.

    Args: phases: (phase, seconds) of an undisturbed run, in order.
    """
    # the optimizer's is too short to be met from outside
    if phase == "optimizer" or draw.random() < 0.5:
        return at_chosen_place(draw, phase, phases)
    durations = [seconds for name, seconds in phases if name == phase]
    occurrence = draw.randint(1, len(durations))
    return Kill(
        kind="phase", phase=phase, occurrence=occurrence, after_s=draw.uniform(0.0, 0.7 * durations[occurrence - 1])
    )


def at_chosen_place(draw: random.Random, phase: str, phases: Sequence[tuple[str, float]]) -> Kill:
    """Right before any of the file operations of any of the phases of this name; else as `in_phase`."""
    occurrence = draw.randint(1, sum(name == phase for name, _ in phases))
    return Kill(kind="operation", phase=phase, occurrence=occurrence, operation=draw.randint(1, OPERATIONS[phase]))
