"""A running job's memory, phase by phase, seen from another process: its process tree, and the cards that it is on.

What each phase was planned to take stands beside it (`grpo.diagnostics.watch_plan`).
"""

from __future__ import annotations

import subprocess
import time
from collections import Counter
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
WELL_ABOVE = 1.25
"""Times what was planned: above it the plan was made for other texts, or something else lies in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Bytes that a run holds at one moment."""

    host_bytes: int
    """Resident, of the process and all its children; pages that they share are counted in each."""
    device_bytes: int | None
    """On the card of which it holds most: each card has to hold its own part. None where no driver answers, or where
    the driver names none of the processes (a run on the CPU; another process namespace)."""
    card: str = ""
    """Which one that is, by its uuid."""


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
    if not pids:
        return None
    device_bytes, card = _on_fullest_card(pids)
    return Usage(host_bytes=total, device_bytes=device_bytes, card=card)


def hint(
    watched: Watched, *, host_bytes: int, cards: Mapping[str, int], planned: Mapping[str, Usage] | None = None
) -> str:
    """What to do about the phase that holds most, or most more than planned; "" where there is nothing to do.

    Args:
        host_bytes: what the machine has, or may use.
        cards: uuid -> what the card has.
        planned: phase -> what it was planned to hold.
    """
    for seen in sorted(watched.phases.values(), key=lambda one: one.peak.device_bytes or 0, reverse=True):
        held, has = seen.peak.device_bytes, cards.get(seen.peak.card)
        if held is not None and has is not None and held > TIGHT * has:
            return f"{seen.phase} fills the card to {held / has:.0%}: {_remedy(seen.phase)}"
    seen = max(watched.phases.values(), key=lambda one: one.peak.host_bytes)
    if seen.peak.host_bytes > TIGHT * host_bytes:
        return f"{seen.phase} fills host memory to {seen.peak.host_bytes / host_bytes:.0%}: {_remedy(seen.phase)}"
    return _above_plan(watched, planned or {})


def _above_plan(watched: Watched, planned: Mapping[str, Usage]) -> str:
    """Against the largest plan of the phases so far: allocators keep what an earlier phase took, so that sampling
    after an update holds what the update needed."""
    plans = [planned[phase] for phase in watched.phases if phase in planned]
    on_card = any(one.device_bytes is not None for one in plans)  # where the host's plan leaves out CUDA's libraries

    def bytes_of(usage: Usage) -> int:
        return (usage.device_bytes or 0) if on_card else usage.host_bytes

    most = max(map(bytes_of, plans), default=0)
    seen = max(watched.phases.values(), key=lambda one: bytes_of(one.peak))
    if not most or bytes_of(seen.peak) <= WELL_ABOVE * most:
        return ""
    return (
        f"{seen.phase} holds {bytes_of(seen.peak) / most:.1f} times the {'device' if on_card else 'host'} memory that "
        "was planned: its texts are longer than the plan assumes (grpo plan RECIPE --prompt-tokens N), or the process "
        "holds something of its own"
    )


def _remedy(phase: str) -> str:
    remedies = {
        "rollout": "lower rollout.max_rows or rollout.max_batch_tokens; what is sampled stays the same",
        "backward": "lower update.micro_batch_tokens; the gradient stays the same",
        "optimizer": "a lower LoRA rank, or optim.type=adamw_8bit",
        "start": "the weights alone nearly fill it: a smaller model, or dtype=bfloat16",
    }
    return remedies.get(phase, "grpo plan RECIPE says what would fit")


def _larger(first: Usage, second: Usage) -> Usage:
    """The larger of each."""
    device = max(first, second, key=lambda one: -1 if one.device_bytes is None else one.device_bytes)
    return Usage(
        host_bytes=max(first.host_bytes, second.host_bytes), device_bytes=device.device_bytes, card=device.card
    )


def _on_fullest_card(pids: set[int]) -> tuple[int | None, str]:
    command = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None, ""
    return fullest_card(done.stdout if done.returncode == 0 else "", pids)


def fullest_card(listed: str, pids: set[int]) -> tuple[int | None, str]:
    """(bytes, uuid) of the card of which these processes hold most; (None, "") where none of them is listed.

    Args: listed: lines of `uuid, process id, MiB`, as nvidia-smi writes them.
    """
    held: Counter[str] = Counter()
    for line in listed.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 3 and cells[1].isdigit() and int(cells[1]) in pids and cells[2].isdigit():  # some say [N/A]
            held[cells[0]] += int(cells[2]) << 20
    card, most = next(iter(held.most_common(1)), ("", None))
    return most, card
