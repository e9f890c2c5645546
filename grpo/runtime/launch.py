"""Several processes that were asked for, and not started: starts them. Knows environment and command lines only."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence

from grpo.errors import ConfigError

SHUTDOWN_TIMEOUT_S = "600"
"""Interrupted ranks finish a step and save within this; torchrun kills what is left, after 30 seconds by default."""

_KNOWS_ITS_RANK = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def start_missing_ranks() -> None:
    """Become the launcher of N ranks where `accelerate launch --cpu --num_processes N` started one process.

    On CPUs accelerate leaves it to mpirun to start more than one (accelerate 1.15, simple_launcher), and says nothing:
    the run would be another than was asked for. Returns where nothing is missing.

    Raises:
        ConfigError: it cannot be seen how many were asked for.
    """
    if not is_alone_of_several(os.environ):
        return
    count = count_asked_for(_command_of_parent())
    if count == 1:
        return
    if count is None:
        raise ConfigError(
            "accelerate launch --cpu was asked for several processes, but started this one alone, and how many were "
            f"asked for cannot be seen. Start them with: torchrun --nproc_per_node N -m grpo {' '.join(sys.argv[1:])}"
        )
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_TIMEOUT_S)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    # one machine: names of it that resolve to elsewhere, or not at all, must not matter
    launcher += ["--local_addr", "127.0.0.1", "-m", "grpo", *sys.argv[1:]]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, launcher)  # in this process's place: accelerate waits for it


def is_alone_of_several(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's launcher for CPUs names an address where ranks meet, but gave this process no rank."""
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes", "on", "y", "t"}
    return on_cpu and "MASTER_ADDR" in environment and not any(name in environment for name in _KNOWS_ITS_RANK)


def count_asked_for(command: Sequence[str]) -> int | None:
    """N of `accelerate launch ... --num_processes N ... script`; None where it is not on the command line, or where
    several machines are."""
    found: dict[str, int] = {}
    for place, word in enumerate(command):
        if word in {"-m", "--module"} and "launch" in " ".join(command[:place]):
            break  # what follows is the script's own
        option = re.fullmatch(r"--(num[-_](?:processes|machines))(?:=(\d+))?", word)
        if option is None:
            continue
        value = option[2] or (command[place + 1] if place + 1 < len(command) else "")
        if value.isdigit():
            found[option[1].replace("-", "_")] = int(value)
    return found.get("num_processes") if found.get("num_machines", 1) == 1 else None


def _command_of_parent() -> list[str]:
    import psutil  # accelerate needs it too

    try:
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    except psutil.Error:
        return []
