"""Runs that are killed, resumed, killed again and finished, beside one that nobody disturbed.

A kill comes at a time or at a phase, from outside (SIGKILL), or right before a file operation in a phase. What is on
the disk after it is held against the phase; the finished run's files against the undisturbed run's, bit for bit; and
the judge's own account against the run's: more questions than were in flight at the kills were bought twice, every
answer that was used is in the audit, and so is what it has cost.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kill_harness.counting_judge import Asked, CountingJudge, count
from kill_harness.evidence import booked, differences, evidence, unaudited
from kill_harness.kills import Kill
from kill_harness.nursery import Nursery
from kill_harness.recipe import CONCURRENCY, PRICE

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """What a kill came to."""

    kill: Kill
    phase: str
    """That the training was in, by its own last word; "start" before the first, "done" where it had ended."""
    proof: str
    """What the disk shows of it."""
    contradiction: str
    """What the disk shows against it; empty where nothing does."""
    num_bought: int
    """Questions that the judge has been asked before the kill, since the last one."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """A run that was killed some times and then finished."""

    deaths: list[Death] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    """From the undisturbed run."""
    num_repeated: int = 0
    """Questions beyond those that the undisturbed run asked."""
    num_missing: int = 0
    """Questions that the undisturbed run asked, and this one did not: nothing may have been taken from elsewhere."""
    unaudited: list[str] = field(default_factory=list)
    """Questions that were asked, and whose answers are not in the audit."""
    unbooked: float = 0.0
    """What the judge has billed beyond what the run has booked, in the price of its dearest call."""
    resumed_s: list[float] = field(default_factory=list)

    leftovers: list[str] = field(default_factory=list)
    """Checkpoints beyond those that the undisturbed run keeps: a kill came before they were deleted."""

    @property
    def num_kills(self) -> int:
        return sum(death.phase != "done" for death in self.deaths)

    @property
    def problems(self) -> list[str]:
        """Whatever must not be."""
        found = list(self.differences)
        found += [f"killed in {death.phase}: {death.contradiction}" for death in self.deaths if death.contradiction]
        if self.num_repeated > self.num_kills * CONCURRENCY:
            found.append(f"{self.num_repeated} questions were asked again after {self.num_kills} kills")
        if self.num_missing:
            found.append(f"{self.num_missing} questions of the undisturbed run were never asked")
        if self.unaudited:
            found.append(f"{len(self.unaudited)} questions were answered, but the audit does not hold it")
        if not -1e-6 <= self.unbooked <= self.num_repeated + 1e-6:  # what was in flight at a kill was never received
            found.append(f"{self.unbooked:g} calls were billed beyond those booked, {self.num_repeated} asked twice")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Undisturbed:
    """What every killed run must come to."""

    run_dir: Path
    asked: Counter[str]
    """Question -> how often."""
    seconds: float
    """From its fork to its end."""
    phases: list[tuple[str, float]]
    """(phase, seconds from its begin to the next one's), in order."""


class Campaign:
    """Owns a folder with one recipe, its undisturbed run, and the runs that are killed.

    Use: `Campaign(folder, recipe, judge, nursery)`, then `survive(kills)` as often as you like.
    """

    def __init__(self, folder: Path, recipe: Path, judge: CountingJudge, nursery: Nursery) -> None:
        self._folder, self._recipe, self._judge, self._nursery = folder, recipe, judge, nursery
        self._pipe = folder / "phases"
        os.mkfifo(self._pipe)
        self._number = 0
        self.undisturbed = self._once("first", learn_imports=True)

    def warm_up(self) -> list[str]:
        """Run undisturbed once more, as every later run will, with all imports there.

        Returns:
            How the two differ: must be nothing, or no comparison means anything.
        """
        first, self.undisturbed = self.undisturbed, self._once("undisturbed")
        return differences(first.run_dir, self.undisturbed.run_dir)

    def _once(self, name: str, *, learn_imports: bool = False) -> Undisturbed:
        run_dir = self._folder / name
        self._judge.take_asked()
        begun = time.monotonic()
        code, _, phases = self._run(run_dir, resume=False, learn_imports=learn_imports)
        seconds = time.monotonic() - begun
        if code != 0:
            raise RuntimeError(f"an undisturbed run ended with {code}:\n{self._output.read_text()}")
        ends = [begin for _, begin in phases[1:]] + [begun + seconds]
        timed = [(phase, end - begin) for (phase, begin), end in zip(phases, ends, strict=True)]
        return Undisturbed(run_dir=run_dir, asked=count(self._judge.take_asked()), seconds=seconds, phases=timed)

    def survive(self, kills: Sequence[Kill]) -> Outcome:
        """Kill a new run at each of them, resume it each time, and let it finish."""
        self._number += 1
        run_dir = self._folder / f"killed-{self._number}"
        outcome, asked = Outcome(), list[Asked]()
        for kill in kills:
            code, phase, _ = self._run(run_dir, resume=(run_dir / "config.yaml").exists(), kill=kill)
            new = self._judge.take_asked()
            asked += new
            if code == 0:
                phase = "done"
            elif code != -9:
                outcome.differences.append(f"before {kill} it ended with {code}: {self._last_words()}")
                return outcome
            proof, contradiction = evidence(run_dir, phase)
            outcome.deaths.append(
                Death(kill=kill, phase=phase, proof=proof, contradiction=contradiction, num_bought=len(new))
            )
            if phase == "done":
                break
            if run_dir.exists() and not (run_dir / "config.yaml").exists():
                outcome.differences.append("a folder without a config.yaml was left, in which no run can be started")
                return outcome
        begun = time.monotonic()
        code, _, _ = self._run(run_dir, resume=(run_dir / "config.yaml").exists())
        outcome.resumed_s.append(time.monotonic() - begun)
        asked += self._judge.take_asked()
        if code != 0:
            outcome.differences.append(f"the last resume ended with {code}: {self._last_words()}")
            return outcome
        outcome.differences += differences(self.undisturbed.run_dir, run_dir)
        kept = {path.name for path in (self.undisturbed.run_dir / "checkpoints").iterdir()}
        outcome.leftovers = sorted({path.name for path in (run_dir / "checkpoints").iterdir()} - kept)
        outcome.num_repeated = (count(asked) - self.undisturbed.asked).total()
        outcome.num_missing = (self.undisturbed.asked - count(asked)).total()
        outcome.unaudited = unaudited(run_dir, asked, self.undisturbed.asked)
        costs = [one.cost(PRICE) for one in asked]
        outcome.unbooked = (sum(costs) - booked(run_dir)) / max(costs)
        return outcome

    def interrupt(
        self, name: str, *, times: int, phase: str, occurrence: int, then: Callable[[], None]
    ) -> tuple[int, str, Path]:
        """Press Ctrl-C so often in a new run, each time when the one before was answered, from a phase's begin on.

        Args:
            then: called before the first.
        Returns:
            Exit code, all that it has said, and its run directory.
        """
        run_dir = self._folder / name
        reader = os.open(self._pipe, os.O_RDONLY | os.O_NONBLOCK)
        try:
            with self._nursery.start(
                self._arguments(run_dir, resume=False), run_dir=run_dir, output=self._output, phases=self._pipe
            ) as run:
                told = _phases(reader, until=time.monotonic() + TIMEOUT_S, alarm=_Alarm(None))
                seen = Counter[str]()
                while seen[phase] < occurrence:
                    seen[str(next(told)[0])] += 1
                then()
                for number in range(times):
                    while number and "finishing the current step" not in self._output.read_text():
                        time.sleep(0.001)
                    run.kill(signal.SIGINT)
                code = run.wait()
        finally:
            os.close(reader)
        return code, self._output.read_text(), run_dir

    def finish(self, run_dir: Path) -> list[str]:
        """Resume a run and let it finish; gives its differences from the undisturbed one."""
        code, _, _ = self._run(run_dir, resume=True)
        return differences(self.undisturbed.run_dir, run_dir) if code == 0 else [f"{code}: {self._last_words()}"]

    def _arguments(self, run_dir: Path, *, resume: bool) -> list[str]:
        return (
            ["train", str(run_dir), "--resume"]
            if resume
            else ["train", str(self._recipe), f"output_dir={json.dumps(str(run_dir))}"]
        )

    @property
    def _output(self) -> Path:
        return self._folder / "output.txt"

    def _last_words(self) -> str:
        return self._output.read_text()[-2000:]

    def _run(
        self, run_dir: Path, *, resume: bool, kill: Kill | None = None, learn_imports: bool = False
    ) -> tuple[int, str, list[tuple[str, float]]]:
        """Exit code, last phase, and the phases with the time at which each began."""
        reader = os.open(self._pipe, os.O_RDONLY | os.O_NONBLOCK)
        phases: list[tuple[str, float]] = []
        try:
            with self._nursery.start(
                self._arguments(run_dir, resume=resume),
                run_dir=run_dir,
                output=self._output,
                phases=self._pipe,
                kill=None if kill is None else kill.at_operation,
                learn_imports=learn_imports,
            ) as run:
                begun = time.monotonic()
                alarm = _Alarm(begun + kill.after_s if kill is not None and kill.kind == "time" else None)
                occurrences = 0
                for phase, at in _phases(reader, until=begun + TIMEOUT_S, alarm=alarm):
                    if phase is None:
                        run.kill()
                        alarm.at = None
                        continue
                    phases.append((phase, at))
                    if kill is not None and kill.kind == "phase" and phase == kill.phase:
                        occurrences += 1
                        if occurrences == kill.occurrence:
                            alarm.at = at + kill.after_s
                code = run.wait()
        finally:
            os.close(reader)
        return code, phases[-1][0] if phases else "start", phases


@dataclass(slots=True)
class _Alarm:
    at: float | None
    """On the monotonic clock; None: not set."""


def _phases(reader: int, *, until: float, alarm: _Alarm) -> Iterator[tuple[str | None, float]]:
    """(phase, time) as they are told, until the other end is closed; (None, time) once the alarm is
    due, until it is set anew."""
    rest = b""
    while True:
        now, wanted = time.monotonic(), alarm.at
        if now > until:
            raise RuntimeError(f"a run took more than {TIMEOUT_S:g} s")
        if wanted is not None and now >= wanted:
            yield None, now
        elif select.select([reader], [], [], 0.5 if wanted is None else wanted - now)[0]:
            content = os.read(reader, 65536)
            if not content:
                return
            *lines, rest = (rest + content).split(b"\n")
            for line in lines:
                yield line.decode(), time.monotonic()
