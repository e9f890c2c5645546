"""Runs that are killed, resumed, killed again and finished, beside one that nobody disturbed.

A kill comes at a time or at a phase, from outside (SIGKILL), or right before a file operation in a phase. What is on
the disk after it is held against the phase; the finished run's files against the undisturbed run's, bit for bit; and
the judge's own count against the undisturbed run's: more questions than were in flight at the kills were bought twice.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from kill_harness.counting_judge import CountingJudge
from kill_harness.nursery import AtOperation, Nursery

from grpo.checkpoint import latest_checkpoint

PHASES = ("rollout", "judging", "journal", "backward", "optimizer", "checkpoint_write", "rename", "rotation")
"""Every one gets its kills; beside them there is "start" (before the first phase is told) and "between"."""
OPERATIONS = {
    "rollout": 6, "judging": 6, "journal": 3, "backward": 1, "optimizer": 1, "checkpoint_write": 20, "rename": 6,
    "rotation": 12,
}  # fmt: skip
"""Phase -> file operations that it has at least, more or less; a kill before one that does not come, comes at its
end."""
CONCURRENCY = 4
"""Calls that may be in flight at a kill."""
JUDGE_DELAY_S = 0.02
TIMEOUT_S = 120.0
_NONCE = re.compile(r'"nonce": "[0-9a-f]+"')


def write_recipe(folder: Path, model: Path, judge: CountingJudge, *, steps: int = 4, full: bool = False) -> Path:
    """Two objectives, one of them judged; betas that move, a learning rate that falls, groups that are sampled again.

    Args: full: all weights learn, instead of an adapter.
    """
    endpoint = {"url": judge.url, "model": "demo-judge"}
    judged = {"endpoint": endpoint, "rubric": "fairness", "concurrency": CONCURRENCY}
    length = {"name": "length", "params": {"target_tokens": 2, "limit_tokens": 8}}
    beta = {"type": "band", "initial": 0.05, "low": 0.001, "high": 0.01}
    recipe = {
        "model": str(model),
        "steps": steps,
        "output_dir": "run",
        "device": "cpu",
        "prompts": {"type": "file", "path": "train.jsonl", "held_out_path": "test.jsonl", "per_step": 2},
        "objectives": {
            "fair": {"rewards": [{"name": "judged", "params": judged}, length], "beta": beta},
            "short": {"rewards": [length], "beta": beta},
        },
        "rollout": {"group_size": 4, "max_new_tokens": 8, "resample_rounds": 1},
        "optim": {"learning_rate": 1e-2, "schedule": "linear"},
        "trainable": {"type": "full"} if full else {"type": "lora", "rank": 2},
        "eval": {"num_prompts": 2},
        "checkpoint": {"every": 2, "keep": 1},
    }
    for name, first, count in (("train", 0, 7), ("test", 100, 4)):
        rows = [
            {"id": f"p{n}", "prompt": f"Who is {n}?", "reference": "Ann", "objectives": ["fair", "short"][: 1 + n % 2]}
            for n in range(first, first + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


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
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Undisturbed:
    """What every killed run must come to."""

    run_dir: Path
    asked: Counter[str]
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
        return Undisturbed(run_dir=run_dir, asked=self._judge.take_asked(), seconds=seconds, phases=timed)

    def survive(self, kills: Sequence[Kill]) -> Outcome:
        """Kill a new run at each of them, resume it each time, and let it finish."""
        self._number += 1
        run_dir = self._folder / f"killed-{self._number}"
        outcome, asked = Outcome(), Counter[str]()
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
                Death(kill=kill, phase=phase, proof=proof, contradiction=contradiction, num_bought=new.total())
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
        outcome.num_repeated = (asked - self.undisturbed.asked).total()
        outcome.num_missing = (self.undisturbed.asked - asked).total()
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
        at_operation = None
        if kill is not None and kill.kind == "operation":
            at_operation = AtOperation(phase=kill.phase, occurrence=kill.occurrence, operation=kill.operation)
        reader = os.open(self._pipe, os.O_RDONLY | os.O_NONBLOCK)
        phases: list[tuple[str, float]] = []
        try:
            with self._nursery.start(
                self._arguments(run_dir, resume=resume),
                run_dir=run_dir,
                output=self._output,
                phases=self._pipe,
                kill=at_operation,
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


# --- when to kill


def at_any_time(draw: random.Random, undisturbed: Undisturbed) -> Kill:
    """Uniform over the wall time of the undisturbed run, its start and its report included."""
    return Kill(kind="time", after_s=draw.uniform(0.0, undisturbed.seconds))


def in_phase(draw: random.Random, phase: str, undisturbed: Undisturbed) -> Kill:
    """In any of the phases of this name, at any time in it or right before any of its file operations."""
    durations = [seconds for name, seconds in undisturbed.phases if name == phase]
    occurrence = draw.randint(1, len(durations))
    if phase == "optimizer" or draw.random() < 0.5:  # the optimizer's is too short to be met from outside
        return Kill(kind="operation", phase=phase, occurrence=occurrence, operation=draw.randint(1, OPERATIONS[phase]))
    after_s = draw.uniform(0.0, 0.7 * durations[occurrence - 1])
    return Kill(kind="phase", phase=phase, occurrence=occurrence, after_s=after_s)


# --- what is on the disk


def differences(expected: Path, found: Path) -> list[str]:
    """Between two finished runs: weights, optimizer, state, metrics (times aside), completions, evaluation.

    What is another in any two runs, disturbed or not, is left out: times, memory, and the random nonce in a judge's
    reply. What judges were asked is counted by the judge itself.
    """
    ours, theirs = (_computed(run_dir) for run_dir in (found, expected))
    lines = [f"{name} is in one of them only" for name in sorted(ours.keys() ^ theirs.keys())]
    return lines + [f"{name} differs" for name in sorted(ours.keys() & theirs.keys()) if ours[name] != theirs[name]]


def _computed(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    newest = latest_checkpoint(run_dir).folder
    for path in sorted(file for file in newest.rglob("*") if file.is_file()):
        found[str(path.relative_to(run_dir))] = path.read_bytes()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found["steps of metrics.jsonl"] = [row["step"] for row in rows]
    for row in rows:
        for name, value in row.items():
            if not name.startswith(("time/", "memory/", "judge/")):
                found[f"metrics step {row['step']} {name}"] = value
    found["completions.jsonl"] = _NONCE.sub("", _unescaped(run_dir / "completions.jsonl"))
    found["eval.json"] = _NONCE.sub("", _unescaped(run_dir / "eval.json"))
    return found


def _unescaped(path: Path) -> str:
    return path.read_text().replace('\\"', '"')


def evidence(run_dir: Path, phase: str) -> tuple[str, str]:
    """What the disk shows after a kill in a phase: (what proves it, what contradicts it)."""
    metrics = run_dir / "metrics.jsonl"
    written = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    chapters = {int(path.name.split(".")[0].removeprefix("step-")): path for path in run_dir.glob("journal/step-*")}
    current = chapters.get(written + 1)
    kinds = Counter(re.findall(rb'"record": {"kind": "(\w+)"', current.read_bytes())) if current else Counter[bytes]()
    is_sealed = kinds[b"sealed"] > 0
    proof = f"{written} lines of metrics; journal of step {written + 1}: " + (
        ", ".join(f"{count} {kind.decode()}" for kind, count in sorted(kinds.items())) or "nothing"
    )
    folders = sorted(path.name for path in run_dir.glob("checkpoints/*") if path.is_dir())
    manifests = sorted(path.parent.name for path in run_dir.glob("checkpoints/*/manifest.json"))
    proof += f"; checkpoints {folders}, with a manifest {manifests}"
    newest = max((int(name.removeprefix("step-")) for name in manifests if not name.startswith(".")), default=0)
    wrong = ""
    match phase:
        case "rollout" | "judging" if is_sealed:
            wrong = "the step is sealed already"
        case "judging" | "journal" if not kinds[b"group"] and current is not None:
            wrong = "no group is in the journal"
        case "backward" | "optimizer" if not is_sealed:
            wrong = "the step is not sealed in the journal, but the optimizer is at work"
        case "rename" if not any(name.startswith(".") for name in manifests) and newest < written:
            wrong = "no whole folder lies there under its temporary name, nor under its last one"
        case "rotation" if newest < written:
            wrong = "older checkpoints are being deleted, but the newest is not there under its name"
    return proof, wrong
