"""Disk, memory, shared memory: is there room for the run?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from grpo.checkpoint import list_checkpoints
from grpo.config import RunConfig
from grpo.diagnostics.findings import Finding
from grpo.diagnostics.memory_tables import amount
from grpo.errors import InputError
from grpo.runtime.machine import BFLOAT16_CAPABILITY, Machine, MachineFacts
from grpo.runtime.memory import DEFAULT_PROMPT_TOKENS, plan
from grpo.runtime.memory_hardware import Hardware, hardware_named
from grpo.runtime.memory_model import read_shape
from grpo.runtime.memory_rows import largest_micro_batch
from grpo.runtime.memory_terms import FULL, Terms
from grpo.runtime.prompt_lengths import longest_prompt

LEAST_SHARED_MEMORY = 1 << 30
"""NCCL and vLLM's workers pass tensors through it; a container's default of 64 MiB ends them with a bus error."""
LEAST_DISK = 1 << 30
"""Where there is no recipe whose checkpoints could be counted."""


def check_resources(
    machine: Machine, facts: MachineFacts, config: RunConfig | None, *, ranks: int
) -> Iterator[Finding]:
    """Every finding about room. Args: ranks: processes that are going to be launched."""
    yield _memory(facts)
    yield _disk(machine, config)
    if config is not None:
        yield _plan(facts, config)
    needs_shared = ranks > 1 or (config is not None and config.rollout.engine.type != "transformers")
    if facts.shared_memory_bytes is not None:
        yield _shared_memory(facts.shared_memory_bytes, is_needed=needs_shared)


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


def _plan(facts: MachineFacts, config: RunConfig) -> Finding:
    """What `grpo plan` says, for the room that there is now."""
    hardware = room(facts, config)
    try:
        shape, length = read_shape(config.model, config.base_dir), longest_prompt(config)
        planned = plan(config, hardware, prompt_tokens=length.tokens, shape=shape)
    except InputError as exc:
        return Finding(
            check="memory plan",
            status="warning",
            what=f"not known: {exc}",
            meaning="whether the run fits is seen only when it runs",
            remedy="what the message says; grpo verify RECIPE takes one real step",
        )
    largest = max(planned.phases, key=lambda phase: phase.peak_bytes)
    needed = planned.peak_bytes + planned.reserve_bytes
    what = (
        f"{gib(needed)} GiB in its largest phase ({largest.name}) with prompts of {planned.prompt_tokens} tokens"
        f"{' (assumed)' if length.is_assumed else ''}, of {gib(hardware.device_bytes)} GiB on {hardware.name}; "
        f"completions a step: {planned.packing}"
    )
    host_room = _host_room(facts)
    figures = {"needed_bytes": needed, "host_bytes": planned.host_peak_bytes, "room_bytes": hardware.device_bytes}
    if planned.fits and planned.host_peak_bytes <= host_room:
        return Finding(check="memory plan", status="ok", what=what, figures=figures)
    if planned.fits:
        return Finding(
            check="memory plan",
            status="failed",
            what=f"{what}; {gib(planned.host_peak_bytes)} GiB of host memory, of {gib(host_room)} that can be had",
            meaning="loading alone passes what the host or its container allows, and is ended with signal 9",
            remedy="a larger container, or weights in safetensors, which are read in parts",
            figures=figures,
        )
    best = next((change for change in planned.changes if change.fits), None)
    return Finding(
        check="memory plan",
        status="failed",
        what=what,
        meaning="the run would end for want of memory, or (on a CPU) with signal 9",
        remedy=f"{' '.join(best.overrides)}: {best.why}" + (f", {best.packing} completions" if best.packing else "")
        if best
        else "grpo plan RECIPE shows what each change would buy",
        figures=figures,
    )


def room(facts: MachineFacts, config: RunConfig) -> Hardware:
    """What a run on this machine may still take: of the fullest card, or of the host."""
    if facts.gpus and facts.torch_cuda is not None and config.device != "cpu":
        card = min(facts.gpus, key=lambda gpu: gpu.free_bytes)
        return Hardware(
            name=card.name,
            device_bytes=card.free_bytes,
            is_cpu=False,
            has_bfloat16=card.capability >= BFLOAT16_CAPABILITY,
        )
    return replace(hardware_named(f"cpu:{_host_room(facts) / 2**30:.3f}"), name="the host")


def _host_room(facts: MachineFacts) -> int:
    if facts.limit_bytes is None:
        return facts.available_bytes
    return min(facts.available_bytes, facts.limit_bytes - (facts.limit_used_bytes or 0))


def _disk(machine: Machine, config: RunConfig | None) -> Finding:
    """Room for the checkpoints that are kept and the one that is written before the oldest goes."""
    folder = config.output_dir if config else Path.cwd()
    free = machine.free_disk_bytes(folder)
    what, needed, figures = f"{gib(free)} GiB free for {folder}", LEAST_DISK, {}
    each = checkpoint_bytes(config) if config else None
    if config is not None and each is not None:
        count = max(config.checkpoint.keep + 1 - len(list_checkpoints(folder)), 1)
        needed, figures = count * each, {"checkpoint_bytes": each, "needed_bytes": count * each}
        what = f"{what}; {count} more checkpoints of {amount(each)} at most take {amount(needed)}"
    if free >= needed:
        return Finding(check="disk", status="ok", what=what, figures=figures)
    return Finding(
        check="disk",
        status="failed",
        what=what,
        meaning="checkpoints and completions.jsonl may not fit",
        remedy="make room, or set output_dir to another disk"
        + (", or a smaller checkpoint.keep" if each is not None and config and config.checkpoint.keep > 1 else ""),
        figures=figures,
    )


def checkpoint_bytes(config: RunConfig) -> int | None:
    """What a checkpoint will take at most, by the formula of `grpo.checkpoint.checkpoint_bytes`, from the model's sizes
    alone; None where they cannot be had, which the plan's row tells."""
    try:
        shape = read_shape(config.model, config.base_dir)
        rows = largest_micro_batch(config, DEFAULT_PROMPT_TOKENS)  # on which no size that is read here depends
        terms = Terms(shape=shape, config=config, rows=rows, width=FULL, is_cpu=True)
        learning = FULL * terms.learning
    except InputError:
        return None
    weights = FULL * shape.parameters if terms.is_full else learning
    copies = 3 if config.warmup is not None else 2  # both moments, and the reference that a warm-up left
    return weights + copies * learning + 256 * shape.vocabulary + (1 << 18)


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


def gib(number: int) -> str:
    """Bytes as GiB, one digit."""
    return f"{number / 2**30:.1f}"
