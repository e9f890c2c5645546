"""A pair of processes that are ranks of one run, for tests: gloo, CPU, started once and asked many times."""

from __future__ import annotations

import importlib.util
import inspect
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

ANSWER_WITHIN_S = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """In place of an answer: the process is gone."""

    code: int | None
    """Its exit code, or minus the signal that killed it."""


@dataclass(slots=True)
class RankPair:
    """Owns two processes. `with RankPair(folder) as ranks: first, second = ranks.run(function, argument)`.

    The function is one at the top of a test's file, which the processes load for themselves. What it raises on a rank
    is that rank's answer; where it kills its process, `Ended`.
    """

    folder: Path
    """Where they meet: an empty one."""
    count: int = 2
    _pipes: list[Connection] = field(default_factory=list)
    _processes: list[BaseProcess] = field(default_factory=list)

    def __enter__(self) -> RankPair:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.count, str(self.folder)), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()
            process.join()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns, or the exception that it raises, on each rank."""
        path = inspect.getsourcefile(function)
        for pipe in self._pipes:
            pipe.send((path, function.__name__, arguments))
        answers: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(ANSWER_WITHIN_S), f"rank {rank} has not answered: one waits for the other"
            try:
                answers.append(pickle.loads(pipe.recv_bytes()))  # noqa: S301  our own process's
            except EOFError:
                self._processes[rank].join(ANSWER_WITHIN_S)
                answers.append(Ended(code=self._processes[rank].exitcode))
        return answers


def _serve(pipe: Connection, rank: int, count: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    torch.set_num_threads(1)
    # a file, not a port: another test may have any port
    store = torch.distributed.FileStore(f"{folder}/store", count)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=ANSWER_WITHIN_S)
    )
    while True:
        try:
            path, name, arguments = pipe.recv()
        except EOFError:
            break
        try:
            answer = getattr(_module(path), name)(*arguments)
        except Exception as exc:  # noqa: BLE001  is the answer
            answer = exc
        pipe.send_bytes(pickle.dumps(answer))
    torch.distributed.destroy_process_group()


def _module(path: str) -> Any:
    name = f"rank_process_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
