"""A memory plan, or measured memory beside it -> what a terminal shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo.runtime.memory import MemoryPlan
from grpo.runtime.memory_hardware import GIB
from grpo.runtime.memory_search import Change, Limit
from grpo.runtime.memory_terms import MIB

_BAR_WIDTH, _WITHIN, _FREE, _BEYOND = 40, "█", "░", "▒"
_CELLS_WIDTH = 58
"""Of the other columns of the table of phases, and what is between them."""


def amount(num_bytes: float) -> str:
    """GiB, or MiB where it is less than one."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"


def show_memory_plan(plan: MemoryPlan, *, prompts: str = "as given", console: Console | None = None) -> None:
    """Phases with a bar each, whether they fit, how far keys can go, and what to change.

    Args:
        prompts: where the plan's length of prompts comes from.
    """
    console = console or Console()
    room, needed = plan.hardware.device_bytes, plan.peak_bytes + plan.reserve_bytes
    console.print(
        f"[bold]{plan.shape.model_type}[/bold] of {plan.shape.parameters:,} parameters in {plan.dtype} on "
        f"{plan.hardware.name} ({amount(room)})"
    )
    console.print(
        f"prompts of at most {plan.prompt_tokens} tokens ({prompts}; --prompt-tokens N plans with another length), "
        f"completions of {plan.completion_tokens}, their full length; micro-batches of at most "
        f"{plan.micro_batch_tokens} tokens: {_packing_text(plan.packing)}",
        highlight=False,
    )
    console.print(_phase_table(plan, width=max(min(console.width - _CELLS_WIDTH, _BAR_WIDTH), 10)))
    console.print(_largest_text(plan))
    if not plan.hardware.is_cpu:
        console.print(_host_text(plan))
    verdict = Text("it fits", style="green") if plan.fits else Text("it does not fit", style="bold red")
    console.print(verdict + Text(f": {amount(needed)} of {amount(room)}"))
    console.print("how far each key can go, the others as they are but for smaller micro-batches:")
    for limit in plan.limits:
        console.print(f"  {_limit_text(limit)}", highlight=False)
    if plan.changes:
        console.print("what to change, the best first:")
        for change in plan.changes:
            console.print(f"  {_change_text(change)}", highlight=False)
    elif not plan.fits:
        console.print("no change that is tried here lowers it: a smaller model, or a larger card")


def _phase_table(plan: MemoryPlan, *, width: int) -> Table:
    """Args: width: of the longest bar."""
    room, where = plan.hardware.device_bytes, "host" if plan.hardware.is_cpu else "device"
    table = Table(box=None, pad_edge=False)
    table.add_column("phase")
    table.add_column(f"held on {where}", justify="right")
    table.add_column("on top", justify="right")
    table.add_column("peak", justify="right")
    if not plan.hardware.is_cpu:
        table.add_column("host", justify="right")
    scale = max(room, plan.peak_bytes + plan.reserve_bytes)
    table.add_column(f"{_WITHIN} taken {_FREE} free {_BEYOND} beyond", no_wrap=True)
    for phase in plan.phases:
        cells = [phase.name, amount(sum(phase.held.values())), amount(phase.transient_bytes), amount(phase.peak_bytes)]
        if not plan.hardware.is_cpu:
            cells.append(amount(phase.host_bytes) if phase.host_bytes else "-")
        table.add_row(*cells, _bar(phase.peak_bytes + plan.reserve_bytes, room=room, scale=scale, width=width))
    return table


def _bar(size: int, *, room: int, scale: int, width: int) -> Text:
    """What is taken of the room, what is left of it, and what is beyond it."""
    cells, of_room = round(width * size / scale), int(width * room / scale)
    if size > room:
        within = min(cells, of_room)
        return Text(_WITHIN * within, style="red") + Text(_BEYOND * max(cells - within, 1), style="bold red")
    within = min(max(cells, 1), of_room)
    return Text(_WITHIN * within, style="green") + Text(_FREE * (of_room - within), style="dim")


def _packing_text(packing: str) -> str:
    return f"{packing} completions a step"


def _largest_text(plan: MemoryPlan) -> str:
    largest = max(plan.phases, key=lambda phase: phase.peak_bytes)
    parts = ", ".join(f"{name} {amount(size)}" for name, size in largest.held.items() if size)
    on_top = ", ".join(f"{name} {amount(size)}" for name, size in largest.on_top.items() if size)
    return (
        f"largest: {largest.name}. Held: {parts}. On top: {on_top or amount(largest.transient_bytes)}. "
        f"Set aside: {amount(plan.reserve_bytes)} for {_reserve(plan)}"
    )


def _host_text(plan: MemoryPlan) -> str:
    """A load that peaks in the host's memory gets a job killed before its first step."""
    largest = max(plan.phases, key=lambda phase: phase.host_bytes)
    return (
        f"host memory: {amount(plan.host_peak_bytes)} at its peak ({largest.name}), Python and its libraries included; "
        "in a job with less, the kernel ends the run with signal 9"
    )


def _reserve(plan: MemoryPlan) -> str:
    return "Python and its libraries" if plan.hardware.is_cpu else "CUDA's context"


def _limit_text(limit: Limit) -> str:
    key = f"{limit.key} = {limit.now}"
    if limit.largest is None:
        return f"{key}: nothing fits, whatever it is"
    found = {
        None: f"up to {limit.largest} fits",
        "the step": "a whole step at once fits",
        "the search": f"{limit.largest} fits, and nothing larger was tried",
        "the context": f"up to {limit.largest} fits, all that the model's context leaves beside the prompt",
    }[limit.bounded_by]
    if limit.packing:
        found += f": {_packing_text(limit.packing)}"
    if limit.micro_batch_tokens is not None:
        found += f", with update.micro_batch_tokens={limit.micro_batch_tokens}"
    return f"{key}: {found}"


def _change_text(change: Change) -> str:
    fits = "fits" if change.fits else "does not suffice"
    packing = f"; {_packing_text(change.packing)}" if change.packing else ""
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
