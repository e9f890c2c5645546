"""Runs of `grpo` as forks of a process that has imported everything: a tenth of a second each instead of many seconds.

    with Nursery() as nursery:
        with nursery.start(["train", "recipe.yaml"], output=..., phases=...) as run:
            run.kill()          # SIGKILL, to the fork
            code = run.wait()   # -9

The forks run `grpo.cli.main` as the command does. The one thing put into them tells which phase the training is in,
and, if asked, kills the process right before a file operation.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kill_harness.file_operations import Operation

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True, kw_only=True)
class AtOperation:
    """Kill right before a file operation below the run directory."""

    phase: str
    """In which; where it ends earlier, at its end. In the whole run where empty."""
    occurrence: int
    """In the how many-th of these phases, from 1."""
    operation: int
    """Before the how many-th operation in it, from 1."""
    named: str = ""
    """Such as "write metrics.jsonl": only such operations are counted; all of them where empty."""


@dataclass(slots=True)
class Run:
    """One fork. Ends with the block that `start` opens."""

    pid: int
    _pidfd: int
    _nursery: Nursery
    code: int | None = None
    """Exit code, or minus the signal; None while it runs."""

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; nothing where it has ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def wait(self) -> int:
        """Its exit code, or minus the signal."""
        if self.code is None:
            self.code = int(self._nursery.read()["code"])
        return self.code


class Nursery:
    """Owns the process that forks. One run at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "nursery.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE.parent,
            # the same numbers in every run; more threads than one could not be forked
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(map(str, [HERE.parent, *sys.path])),
            },
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def read(self) -> dict[str, Any]:
        """The next thing that the process says."""
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that forks runs has died")
        return json.loads(line)

    def write(self, order: dict[str, Any]) -> None:
        """Tell it what to do."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    @contextmanager
    def start(
        self,
        arguments: Sequence[str],
        *,
        run_dir: Path,
        output: Path,
        phases: Path,
        kill: AtOperation | None = None,
        learn_imports: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> Iterator[Run]:
        """Fork a run of `grpo ARGUMENTS`.

        Args:
            output: gets its stdout and stderr.
            phases: a FIFO that is open for reading; gets a line for each phase as it begins, and ends with the run.
            learn_imports: what this run imports, later ones find imported.
            environment: what it has beside the nursery's.
        """
        order = {
            "arguments": list(arguments),
            "run_dir": str(run_dir),
            "output": str(output),
            "phases": str(phases),
            "kill": None if kill is None else asdict(kill),
            "modules": str(output.with_suffix(".modules")) if learn_imports else None,
            "environment": dict(environment or {}),
        }
        self.write(order)
        pid = int(self.read()["pid"])
        pidfd = os.pidfd_open(pid)
        run = Run(pid, pidfd, self)
        try:
            yield run
        finally:
            run.kill()
            run.wait()
            os.close(pidfd)


# --- in the process that forks, and in its forks


def main() -> None:
    """Fork a run for each order on stdin; say its pid, then its exit code."""
    _import(["grpo.cli", "grpo.trainer", "grpo.diagnostics.display", "grpo.diagnostics.report"])
    for line in sys.stdin:
        order = json.loads(line)
        pipe = os.open(order["phases"], os.O_WRONLY)
        pid = os.fork()
        if pid == 0:
            _run(order, pipe)
        os.close(pipe)  # the fork's alone from here on: it ends with the fork
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        if order["modules"] and Path(order["modules"]).exists():
            _import(Path(order["modules"]).read_text().split())
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


def _import(names: Sequence[str]) -> None:
    for name in names:
        if name not in sys.modules and name.partition(".")[0] not in ("run_rewards", "__main__", "kill_harness"):
            with suppress(ImportError, AttributeError, KeyError):  # some exist under the name that another gave them
                importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        raise RuntimeError(f"importing has started {len(threads) - 1} threads, which would not be in a fork")


def _run(order: dict[str, Any], pipe: int) -> None:
    """Does not return."""
    code = 70
    try:
        output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(order["environment"])
        sys.argv = ["grpo", *order["arguments"]]
        code = _command(order, pipe)
        if order["modules"]:
            # in the order in which they came: some would not find their parts in another
            Path(order["modules"]).write_text("\n".join(sys.modules))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001  the fork must not go back into the loop above
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _command(order: dict[str, Any], pipe: int) -> int:
    from kill_harness.file_operations import watched

    import grpo.trainer
    from grpo.cli import main as grpo_main

    kill = None if order["kill"] is None else AtOperation(**order["kill"])
    teller = _Teller(pipe, kill)
    grpo.trainer.Trainer = partial(grpo.trainer.Trainer, announce=teller.announce)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with watched(Path(order["run_dir"]), teller.around):
            grpo_main()
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 0 if exc.code is None else 1
    return 0


class _Teller:
    """Says which phase has begun, and dies where it is told to."""

    def __init__(self, pipe: int, kill: AtOperation | None) -> None:
        self._pipe, self._kill = pipe, kill
        self._phase = ""
        self._occurrences = self._operations = 0

    def announce(self, phase: str) -> None:
        if self._kill is not None and self._kill.phase and self._is_there() and phase != self._phase:
            self._die()
        self._phase = phase
        if self._kill is not None and self._kill.phase:
            self._operations = 0
        self._occurrences += self._kill is not None and phase == self._kill.phase
        os.write(self._pipe, f"{phase}\n".encode())

    def around(self, operation: Operation, call: Any, arguments: tuple[Any, ...]) -> Any:
        kill = self._kill
        if kill is not None and self._is_there() and kill.named in ("", f"{operation.name} {operation.path.name}"):
            self._operations += 1
            if self._operations == kill.operation:
                self._die()
        return call(*arguments)

    def _is_there(self) -> bool:
        kill = self._kill
        return kill is not None and (
            not kill.phase or (self._phase == kill.phase and self._occurrences == kill.occurrence)
        )

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
