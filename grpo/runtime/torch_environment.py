"""Environment variables that torch and OpenMP read once, when torch is imported: this imports nothing of it."""

from __future__ import annotations

from collections.abc import Mapping

SPINS = 20_000
"""Looks at a barrier before a thread sleeps, a fifth of a millisecond."""


def torch_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment, for a process that computes on a CPU: `waiting`, and huge pages for tensors.

    Tensors of 2 MiB and more then come in pages of 2 MiB, where Linux has them on request. An update frees and takes
    gigabytes; faults for pages of 4 KiB took 30% of its time where it was measured (benchmarks/README.md).
    """
    pages = {} if "THP_MEM_ALLOC_ENABLE" in environment else {"THP_MEM_ALLOC_ENABLE": "1"}
    return waiting(environment) | pages


def waiting(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment that says nothing of it: idle threads sleep, after a short spin.

    Sleeping at once makes small products three times slower on a free CPU. libgomp's own 3 ms, or spinning for good
    (`OMP_WAIT_POLICY=ACTIVE`), take from whatever else runs there; a fifth of a millisecond was not found to.
    """
    if "OMP_WAIT_POLICY" in environment:
        return {}
    return {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": environment.get("GOMP_SPINCOUNT", str(SPINS))}
