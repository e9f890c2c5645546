"""What each phase of a running job was planned to hold, by the phases' names at run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from grpo.diagnostics.doctor.resources import room
from grpo.diagnostics.watch import Usage
from grpo.errors import InputError
from grpo.recipe_loader import load_run_config
from grpo.runtime.machine import MachineFacts
from grpo.runtime.memory import PROCESS_BYTES, plan
from grpo.runtime.memory_model import read_shape
from grpo.runtime.prompt_lengths import longest_prompt

PLANNED_AS = {
    "start": "load",
    "rollout": "sampling",
    "backward": "update",
    "optimizer": "update",
    "checkpoint_write": "checkpoint",
}
"""Phase of a run -> the plan's. The others hold what stays, and have no plan of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """What a run was planned to hold on this machine."""

    phases: Mapping[str, Usage] = field(default_factory=dict)
    """Phase of the run -> what the process holds in it, CUDA's context, Python and its libraries included."""
    note: str = ""
    """What the plan assumes, or why there is none."""


def planned_run(run_dir: Path, facts: MachineFacts) -> PlannedRun:
    """The plan of a run's own recipe. Args: facts: of the machine that it runs on; the run has its memory already."""
    try:
        config = load_run_config(run_dir)
        hardware = room(facts, config)
        if not hardware.is_cpu:  # what is free now is what the run has left
            card = min(facts.gpus, key=lambda gpu: gpu.free_bytes)
            hardware = replace(hardware, device_bytes=card.total_bytes)
        shape, length = read_shape(config.model, config.base_dir), longest_prompt(config)
        found = plan(config, hardware, prompt_tokens=length.tokens, shape=shape)
    except InputError as exc:
        return PlannedRun(note=f"there is no plan to compare with: {exc}")
    sizes = {phase.name: phase for phase in found.phases}
    on_device = {
        name: None if hardware.is_cpu else phase.peak_bytes + found.reserve_bytes for name, phase in sizes.items()
    }
    return PlannedRun(
        phases={
            ours: Usage(host_bytes=sizes[theirs].host_bytes + PROCESS_BYTES, device_bytes=on_device[theirs])
            for ours, theirs in PLANNED_AS.items()
        },
        note=f"planned for prompts of {found.prompt_tokens} tokens{' (assumed)' if length.is_assumed else ''} and "
        f"completions of {found.completion_tokens}",
    )
