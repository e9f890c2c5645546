"""How the update benchmark measures: peak memory in a process of its own, times in turn. Knows nothing of updates."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import psutil
import torch

from grpo.runtime.devices import choose_device, peak_memory_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One case."""

    part: str
    case: str
    vocabulary: int
    min_s: float
    """Fastest repeat."""
    median_s: float
    peak_bytes: int
    """Above what was held before the pass."""
    backward_s: float | None = None
    """Gradients only: of the fastest repeat, the time in backward passes."""
    prompt_tokens: int | None = None
    """Whole step only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass of a case in its own process."""

    seconds: float
    peak_bytes: int
    """Highest so far, above what was held before the first pass."""


def peak_of(make: Callable[[], Callable[[], object]]) -> int:
    """Peak memory of a pass above what is held before it, in bytes, in a process of its own.

    Raises:
        RuntimeError: making it took more memory than the pass, whose own peak is then unknown.
    """
    with _process_for(make) as alone:
        return alone.submit(_pass).result().peak_bytes


def alternate(makes: Mapping[str, Callable[[], Callable[[], object]]], repeats: int) -> dict[str, list[Pass]]:
    """Case -> its passes, all cases in turn; each case in a process of its own, which waits while the others run.

    Raises:
        RuntimeError: as `peak_of`.
    """
    passes: dict[str, list[Pass]] = {case: [] for case in makes}
    with ExitStack() as stack:
        processes = {case: stack.enter_context(_process_for(make)) for case, make in makes.items()}
        for _ in range(repeats):
            for case, process in processes.items():
                passes[case].append(process.submit(_pass).result())
    return passes


def _process_for(make: Callable[[], Callable[[], object]]) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "trl.trainer.grpo_trainer", "grpo.update.step"])  # once, not per case
    return ProcessPoolExecutor(1, mp_context=context, initializer=_prepare, initargs=(make,))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """What a process measures."""

    run: Callable[[], object]
    held_bytes: int
    """Before the first pass."""
    making_peak_bytes: int


_prepared: list[_Prepared] = []
"""One in a process of `_process_for`, none elsewhere."""


def _prepare(make: Callable[[], Callable[[], object]]) -> None:
    run, device = make(), choose_device("auto")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = making_peak = torch.cuda.memory_allocated(device)
    else:
        held, making_peak = psutil.Process(os.getpid()).memory_info().rss, peak_memory_bytes(device)
    _prepared.append(_Prepared(run=run, held_bytes=held, making_peak_bytes=making_peak))


def _pass() -> Pass:
    (prepared,) = _prepared
    synchronise()
    start = time.perf_counter()
    prepared.run()
    synchronise()
    seconds = time.perf_counter() - start
    peak = peak_memory_bytes(choose_device("auto"))
    if peak <= prepared.making_peak_bytes:  # on a CPU a process's peak never falls
        raise RuntimeError(f"the inputs took {peak} bytes to make, and the pass no more: measure a larger one")
    return Pass(seconds=seconds, peak_bytes=peak - prepared.held_bytes)


def times_of(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[tuple[float, object]]]:
    """Case -> (seconds, what it returned) of each repeat, all cases in turn; one round before is not counted."""
    taken: dict[str, list[tuple[float, object]]] = {case: [] for case in runs}
    for number in range(repeats + 1):
        for case, run in runs.items():
            synchronise()
            start = time.perf_counter()
            returned = run()
            synchronise()
            if number > 0:
                taken[case].append((time.perf_counter() - start, returned))
    return taken


def synchronise() -> None:
    """Wait for what was launched on a card."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
