"""What there is room on: cards by name, and hosts with so much memory. Imports no torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from grpo.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What there is room on."""

    name: str
    device_bytes: int
    """Of the card, or of the host where the run is on the CPU."""
    is_cpu: bool
    has_bfloat16: bool
    """In its matrix units: what dtype = auto goes by."""
    threads: int = 2
    """Of a CPU's products; nothing on a card depends on it."""


def _card(name: str, gib: float, *, has_bfloat16: bool = True) -> Hardware:
    return Hardware(name=name, device_bytes=int(gib * GIB), is_cpu=False, has_bfloat16=has_bfloat16)


CARDS = {
    card.name: card
    for card in (
        _card("t4", 14.6, has_bfloat16=False),
        _card("l4", 22.0),
        _card("rtx3090", 23.6),
        _card("rtx4090", 23.5),
        _card("a100-40g", 39.4),
        _card("a100-80g", 79.2),
        _card("h100-80g", 79.1),
        _card("h200", 139.8),
    )
}
"""By name; the bytes are about what a driver leaves of the number on the box."""


def hardware_named(name: str) -> Hardware:
    """A card of `CARDS`, cuda:GIB, another with so much memory, or cpu:GIB, a host. Raises ConfigError."""
    wanted = name.lower().replace(" ", "").replace("_", "-")
    if wanted in CARDS:
        return CARDS[wanted]
    if found := re.fullmatch(r"(cpu|cuda):(\d+(?:\.\d+)?)(?:gi?b?)?", wanted):
        if found[1] == "cuda":
            return _card(wanted, float(found[2]))
        return Hardware(
            name=wanted,
            device_bytes=int(float(found[2]) * GIB),
            is_cpu=True,
            has_bfloat16=_cpu_bfloat16(),
            threads=num_threads(),
        )
    raise ConfigError(
        f"hardware {name!r} is not known; expected cpu:GIB, a host with so much memory, such as cpu:24, cuda:GIB, a "
        f"card with so much, or one of {', '.join(CARDS)}."
    )


def num_threads() -> int:
    """As torch counts them: OMP_NUM_THREADS, else this machine's cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def _cpu_bfloat16() -> bool:
    """As `devices.has_fast_bfloat16`, without torch; a plan for another machine's CPU names its dtype in the recipe."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "amx_tile" in flags
