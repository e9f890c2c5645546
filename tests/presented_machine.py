"""Machines that are presented to the doctor instead of this one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grpo.runtime.machine import Gpu, MachineFacts, Package

GIB = 1 << 30
SITE = Path("/env/site-packages")
A100 = Gpu(name="NVIDIA A100-PCIE-40GB", capability=(8, 0), total_bytes=40 * GIB, free_bytes=40 * GIB)
HEALTHY = MachineFacts(
    python="3.11.7",
    platform="Linux",
    cores=16,
    host_bytes=128 * GIB,
    available_bytes=120 * GIB,
    shared_memory_bytes=64 * GIB,
    packages={
        "torch": Package(version="2.13.0+cu124", folder=SITE / "torch", home=SITE / "torch"),
        "transformers": Package(version="5.18.0", folder=SITE / "transformers", home=SITE / "transformers"),
    },
    own_folders={name: SITE / name for name in ("grpo", "rewards", "judges")},
    torch_cuda="12.4",
    torch_archs=("sm_80", "sm_90"),
    driver_version="550.54",
    driver_cuda="12.4",
    gpus=(A100,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PresentedMachine:
    """Any machine one likes."""

    given: MachineFacts = HEALTHY
    free_disk: int = 100 * GIB
    variables: dict[str, str] = field(default_factory=dict)
    broken_imports: dict[str, str] = field(default_factory=dict)
    taken_ports: tuple[int, ...] = ()
    listening: tuple[tuple[str, int], ...] = ()

    def facts(self) -> MachineFacts:
        return self.given

    def free_disk_bytes(self, path: Path) -> int:
        return self.free_disk

    def environment(self, name: str) -> str | None:
        return self.variables.get(name)

    def import_problem(self, module: str) -> str:
        return self.broken_imports.get(module, "")

    def is_listening(self, host: str, port: int) -> bool:
        return (host, port) in self.listening

    def is_port_free(self, port: int) -> bool:
        return port not in self.taken_ports


def presented(**changes: Any) -> PresentedMachine:
    return PresentedMachine(given=replace(HEALTHY, **changes))
