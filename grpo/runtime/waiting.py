"""How OpenMP's threads wait for one another. torch reads it when it is imported, so this imports nothing of it."""

from __future__ import annotations

from collections.abc import Mapping

SPINS = 20_000
"""Looks at a barrier before a thread sleeps, a fifth of a millisecond."""


def waiting(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment that says nothing of it: idle threads sleep, after a short spin.

    Sleeping at once makes small products three times slower on a free CPU. libgomp's own 3 ms, or spinning for good
    (`OMP_WAIT_POLICY=ACTIVE`), take from whatever else runs there; a fifth of a millisecond was not found to.
    """
    if "OMP_WAIT_POLICY" in environment:
        return {}
    return {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": environment.get("GOMP_SPINCOUNT", str(SPINS))}
