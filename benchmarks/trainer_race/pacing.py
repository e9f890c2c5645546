"""Runs in processes of their own that take their steps in turn, so that a slow moment of the machine meets them all."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from trainer_race.task import Case, StepFigures


class Pace:
    """The run's end of the line."""

    def __init__(self, line: Connection) -> None:
        self._line = line

    def wait(self) -> None:
        """Until this run may take a step."""
        self._line.recv()

    def done(self, figures: StepFigures) -> None:
        """A step."""
        self._line.send(figures)


class Train(Protocol):
    """A trainer's run; importable, for it is called in another process."""

    def __call__(self, case: Case, prompts: Sequence[str], pace: Pace) -> None:
        """case.steps steps, each after `pace.wait` and told to `pace.done`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """A whole run."""

    steps: tuple[StepFigures, ...]
    peak_bytes: int
    """The process's resident memory, all libraries included; on CUDA, memory allocated on the card."""


def race(trainers: Mapping[str, Callable[[], Train]], case: Case, prompts: Sequence[str]) -> dict[str, RunFigures]:
    """Trainer -> its run; all take their first step, then their second, and so on.

    Args:
        trainers: name -> a function that imports the trainer, called in its process.
    Raises:
        RuntimeError: a run broke off; its own error is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    lines: dict[str, Connection] = {}
    processes = []
    steps: dict[str, list[StepFigures]] = {name: [] for name in trainers}
    try:
        for name, make in trainers.items():
            lines[name], theirs = context.Pipe()
            process = context.Process(target=_run, args=(make, case, prompts, theirs), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
        for number in range(case.steps):
            for name, line in lines.items():
                line.send(number)
                steps[name].append(_received(line, name))
        return {
            name: RunFigures(steps=tuple(steps[name]), peak_bytes=_received(line, name)) for name, line in lines.items()
        }
    finally:
        for process in processes:
            process.kill()
            process.join()


def _received(line: Connection, name: str) -> Any:
    try:
        return line.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError(f"the run of {name} broke off") from None


def _run(make: Callable[[], Train], case: Case, prompts: Sequence[str], line: Connection) -> None:
    from grpo.runtime.devices import choose_device, peak_memory_bytes

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        make()(case, prompts, Pace(line))
    line.send(peak_memory_bytes(choose_device("auto")))
