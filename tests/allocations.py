"""What torch gives out on a CPU, by its own count: memory of a process cannot be read so finely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def allocated_at_most(do: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator had given out at a time during `do`, above what was out before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        do()
    results = recorded.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    held = peak = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
