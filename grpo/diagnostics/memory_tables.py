"""A memory plan, or measured memory beside it -> what a terminal shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo.runtime.memory import MemoryPlan
from grpo.runtime.memory_hardware import GIB
from grpo.runtime.memory_search import Change, Limit
from grpo.runtime.memory_terms import MIB

_BAR_WIDTH = 40


def amount(num_bytes: float) -> str:
    """GiB, or MiB where it is less than one."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"


def show_memory_plan(plan: MemoryPlan, *, console: Console | None = None) -> None:
    """Phases with a bar each, whether they fit, how far keys can go, and what to change."""
    console = console or Console()
    room, where = plan.hardware.device_bytes, "host" if plan.hardware.is_cpu else "device"
    console.print(
        f"[bold]{plan.shape.model_type}[/bold] of {plan.shape.parameters:,} parameters in {plan.dtype} on "
        f"{plan.hardware.name} ({amount(room)}); prompts of at most {plan.prompt_tokens} tokens assumed, micro-batches "
        f"of at most {plan.micro_batch_tokens} (completions a step: {plan.packing})"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("phase")
    table.add_column(f"held on {where}", justify="right")
    table.add_column("on top", justify="right")
    table.add_column("peak", justify="right")
    if not plan.hardware.is_cpu:
        table.add_column("host", justify="right")
    table.add_column("share of the memory")
    for phase in plan.phases:
        peak = phase.peak_bytes + plan.reserve_bytes
        color = "green" if peak <= room else "red"
        cells = [phase.name, amount(sum(phase.held.values())), amount(phase.transient_bytes), amount(phase.peak_bytes)]
        if not plan.hardware.is_cpu:
            cells.append(amount(phase.host_bytes) if phase.host_bytes else "-")
        table.add_row(*cells, Bar(room, 0, min(peak, room), width=_BAR_WIDTH, color=color))
    console.print(table)
    held = max(plan.phases, key=lambda phase: phase.peak_bytes)
    parts = ", ".join(f"{name} {amount(size)}" for name, size in held.held.items() if size)
    console.print(
        f"largest: {held.name}, of which {parts}; {amount(plan.reserve_bytes)} set aside for " + _reserve(plan)
    )
    if not plan.hardware.is_cpu:
        console.print(
            f"host memory: at most {amount(plan.host_peak_bytes)}, in the phases above and the process itself"
        )
    verdict = Text("it fits", style="green") if plan.fits else Text("it does not fit", style="bold red")
    console.print(verdict + Text(f": {amount(plan.peak_bytes + plan.reserve_bytes)} of {amount(room)}"))
    for limit in plan.limits:
        console.print(f"  {_limit_text(limit)}")
    if plan.changes:
        console.print("what to change, the best first:")
        for change in plan.changes:
            console.print(f"  {_change_text(change)}", highlight=False)


def _reserve(plan: MemoryPlan) -> str:
    return "Python and its libraries" if plan.hardware.is_cpu else "CUDA's context"


def _limit_text(limit: Limit) -> str:
    if limit.largest is None:
        return f"{limit.key} = {limit.now}: no value of it fits"
    if limit.is_bounded:
        return f"{limit.key} = {limit.now}: memory does not bound it (tried up to {limit.largest})"
    return f"{limit.key} = {limit.now}: up to {limit.largest} fits"


def _change_text(change: Change) -> str:
    fits = "fits" if change.fits else "does not suffice alone"
    packing = f"; {change.packing} completions" if change.packing else ""
    return f"{' '.join(change.overrides)}: peak {amount(change.peak_bytes)}, {fits} ({change.why}{packing})"


def show_memory_bench(cases: Sequence[Mapping[str, Any]], *, console: Console | None = None) -> None:
    """Args: cases: of the JSON of `grpo bench memory`."""
    console = console or Console()
    table = Table(box=None, pad_edge=False)
    table.add_column("case")
    for name in ("measured", "predicted", "error", "worst of a phase", "update tokens/s"):
        table.add_column(name, justify="right")
    table.add_column("")
    for case in cases:
        is_close = abs(case["error"]) <= 0.1
        table.add_row(
            case["name"],
            amount(case["peak_bytes"]),
            amount(case["predicted_bytes"]),
            Text(f"{case['error']:+.1%}", style="green" if is_close else "red"),
            _worst_phase(case),
            f"{case['tokens_per_s']['update']:.0f}",
            "calibration" if case["is_calibration"] else "",
        )
    console.print(table)
    checked = [case["error"] for case in cases if not case["is_calibration"]]
    if checked:
        worst = max(checked, key=abs)
        console.print(
            f"cases that nothing was calibrated on: {len(checked)}; the largest error among them is {worst:+.1%}"
        )


def _worst_phase(case: Mapping[str, Any]) -> str:
    errors = {phase: case["predicted"][phase] / peak - 1 for phase, peak in case["peaks"].items()}
    phase = max(errors, key=lambda name: abs(errors[name]))
    return f"{phase} {errors[phase]:+.1%}"
