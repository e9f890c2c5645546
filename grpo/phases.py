"""What a run is doing at the moment, by name, for whoever wants to know: a progress line, or a test that kills it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

Phase: TypeAlias = Literal[
    "rollout",  # sampling; judges may be at work already
    "judging",  # sampling is done, verdicts are waited for
    "journal",  # verdicts are there, the step is being sealed in the journal
    "backward",  # micro-batches, forward and backward
    "optimizer",  # the optimizer's own step
    "checkpoint_write",  # files into the temporary folder
    "rename",  # the folder is whole, and gets its name
    "rotation",  # older checkpoints and journals are deleted
    "between",  # none of these: the engine's weights, lines of metrics, evaluation
]

Announce: TypeAlias = Callable[[Phase], None]
"""Told of each phase as it begins, on every rank, in the training thread. What it raises ends the run."""


def silent(phase: Phase) -> None:
    """Tell nobody."""
