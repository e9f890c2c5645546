"""A running job's memory, phase by phase, seen from another process: its process tree, and the cards that it is on."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from grpo.errors import ConfigError
from grpo.run_directory import RunDirectory
from grpo.run_lock import owner_of
from grpo.runtime.machine import TOOL_TIMEOUT_S

TIGHT = 0.9
"""Of what there is: above it, the next longer prompt may be the one that does not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Bytes that a run holds at one moment."""

    host_bytes: int
    """Resident, of the process and all its children; pages that they share are counted in each."""
    device_bytes: int | None
    """On all cards; None where no driver answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a phase has come to so far."""

    phase: str
    peak: Usage
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """The state of the watch after one look."""

    step: int
    """Steps done."""
    phase: str
    now: Usage
    phases: Mapping[str, Seen]
    """In the order in which they were first seen."""


def watch(
    run_dir: Path,
    *,
    interval_s: float = 1.0,
    sleep: Callable[[float], None] = time.sleep,
    measure: Callable[[int], Usage | None] | None = None,
) -> Iterator[Watched]:
    """Look again and again until the run ends.

    A phase shorter than the interval may be missed in some steps; over many, each is seen.

    Args:
        measure: process id -> what it holds, None where it has ended; this machine's where None.
    Raises:
        ConfigError: no run is going on there.
    """
    directory = RunDirectory(run_dir)
    owner = owner_of(run_dir)
    if owner is None or not owner.may_be_alive:
        raise ConfigError(f"no run is going on in {run_dir}. Start one: grpo train {run_dir} --resume")
    look = measure or usage_of
    phases: dict[str, Seen] = {}
    while (now := look(owner.pid)) is not None:
        phase = directory.phase() or "start"
        so_far = phases.get(phase)
        phases[phase] = Seen(
            phase=phase,
            peak=now if so_far is None else _larger(so_far.peak, now),
            samples=1 if so_far is None else so_far.samples + 1,
        )
        yield Watched(step=directory.last_step(), phase=phase, now=now, phases=dict(phases))
        sleep(interval_s)
        if owner_of(run_dir) != owner:  # it has ended, or another has begun
            return


def usage_of(pid: int) -> Usage | None:
    """Of a process tree on this machine; None where it has ended."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return None
    total, pids = 0, set()
    for process in processes:
        try:
            total += process.memory_info().rss
            pids.add(process.pid)
        except psutil.NoSuchProcess:  # a worker that has just ended
            continue
    return Usage(host_bytes=total, device_bytes=_device_bytes(pids)) if pids else None


def hint(watched: Watched, *, host_bytes: int, device_bytes: int | None) -> str:
    """What to do about the phase that holds most; "" where there is room. Args: what the machine has, or may use."""
    for seen in sorted(watched.phases.values(), key=lambda one: one.peak.device_bytes or 0, reverse=True):
        if device_bytes and (seen.peak.device_bytes or 0) > TIGHT * device_bytes:
            return f"{seen.phase} fills the card to {seen.peak.device_bytes / device_bytes:.0%}: {_remedy(seen.phase)}"  # pyright: ignore[reportOptionalOperand]
    seen = max(watched.phases.values(), key=lambda one: one.peak.host_bytes)
    if seen.peak.host_bytes > TIGHT * host_bytes:
        return f"{seen.phase} fills host memory to {seen.peak.host_bytes / host_bytes:.0%}: {_remedy(seen.phase)}"
    return ""


def _remedy(phase: str) -> str:
    remedies = {
        "rollout": "lower rollout.max_rows or rollout.max_batch_tokens; what is sampled stays the same",
        "backward": "lower update.micro_batch_tokens; the gradient stays the same",
        "optimizer": "a lower LoRA rank, or optim.type=adamw_8bit",
        "start": "the weights alone nearly fill it: a smaller model, or dtype=bfloat16",
    }
    return remedies.get(phase, "grpo plan RECIPE says what would fit")


def _larger(first: Usage, second: Usage) -> Usage:
    on_device = [one for one in (first.device_bytes, second.device_bytes) if one is not None]
    return Usage(
        host_bytes=max(first.host_bytes, second.host_bytes), device_bytes=max(on_device) if on_device else None
    )


def _device_bytes(pids: set[int]) -> int | None:
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    rows = [line.split(",") for line in done.stdout.splitlines() if line.count(",") == 1]
    return sum(int(used) << 20 for pid, used in rows if pid.strip().isdigit() and int(pid) in pids)
