"""Disk, memory, shared memory, ports: is there room for the run?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from grpo.config import RunConfig
from grpo.diagnostics.findings import Finding
from grpo.runtime.machine import Machine, MachineFacts

LEAST_SHARED_MEMORY = 1 << 30
"""NCCL and vLLM's workers pass tensors through it; a container's default of 64 MiB ends them with a bus error."""
LEAST_DISK = 1 << 30
LAUNCH_PORT = 29_500
"""On which accelerate's and torch's launchers meet, unless told otherwise."""


def check_resources(
    machine: Machine, facts: MachineFacts, config: RunConfig | None, *, ranks: int
) -> Iterator[Finding]:
    """Every finding about room. Args: ranks: processes that are going to be launched."""
    yield _memory(facts)
    yield _disk(machine, config.output_dir if config else Path.cwd())
    needs_shared = ranks > 1 or (config is not None and config.rollout.engine.type != "transformers")
    if facts.shared_memory_bytes is not None:
        yield _shared_memory(facts.shared_memory_bytes, is_needed=needs_shared)
    if ranks > 1:
        yield _port(machine)


def _memory(facts: MachineFacts) -> Finding:
    what = f"{gib(facts.available_bytes)} of {gib(facts.host_bytes)} GiB can be had"
    if facts.limit_bytes is None:
        return Finding(check="host memory", status="ok", what=f"{what}; this process has no limit of its own")
    used = f", of which {gib(facts.limit_used_bytes)} are taken" if facts.limit_used_bytes is not None else ""
    what = f"{what}; the container's limit is {gib(facts.limit_bytes)} GiB{used}"
    if facts.limit_bytes < facts.host_bytes // 2:
        return Finding(
            check="host memory",
            status="warning",
            what=what,
            meaning="the machine's memory is not this container's: past its limit the kernel ends the run with signal "
            "9, without a message",
            remedy="compare the limit with `grpo plan RECIPE`, where loading has a row of its own; ask for more memory "
            "for the container",
        )
    return Finding(check="host memory", status="ok", what=what)


def _disk(machine: Machine, folder: Path) -> Finding:
    free = machine.free_disk_bytes(folder)
    what = f"{gib(free)} GiB free for {folder}"
    if free >= LEAST_DISK:
        return Finding(check="disk", status="ok", what=what)
    return Finding(
        check="disk",
        status="failed",
        what=what,
        meaning="checkpoints and completions.jsonl may not fit",
        remedy="make room, or set output_dir to another disk",
    )


def _shared_memory(free: int, *, is_needed: bool) -> Finding:
    what = f"{gib(free)} GiB free in /dev/shm"
    if free >= LEAST_SHARED_MEMORY or not is_needed:
        return Finding(check="shared memory", status="ok", what=what)
    return Finding(
        check="shared memory",
        status="warning",
        what=what,
        meaning="processes that pass tensors through it (vLLM, several ranks) may end with a bus error",
        remedy="start the container with --shm-size=8g, or --ipc=host",
    )


def _port(machine: Machine) -> Finding:
    if machine.is_port_free(LAUNCH_PORT):
        return Finding(check="ports", status="ok", what=f"{LAUNCH_PORT}, where ranks meet, is free")
    return Finding(
        check="ports",
        status="warning",
        what=f"{LAUNCH_PORT} is taken",
        meaning="accelerate launch waits or ends there: another launched run most likely has it",
        remedy="accelerate launch --main_process_port 0 (a free one)",
    )


def gib(number: int) -> str:
    """Bytes as GiB, one digit."""
    return f"{number / 2**30:.1f}"
