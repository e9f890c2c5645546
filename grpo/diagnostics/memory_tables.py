"""A memory plan, or measured memory beside it -> what a terminal shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo.runtime.memory import MemoryPlan
from grpo.runtime.memory_hardware import GIB
from grpo.runtime.memory_search import Change, Limit
from grpo.runtime.memory_terms import MIB

_BAR_WIDTH, _WITHIN, _FREE, _BEYOND = 40, "█", "░", "▒"
_TIGHT = 0.05
"""Of the room: what fits with less than that to spare is called tight, since a plan may be off by as much."""
_CELLS_WIDTH = 60
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
    room = plan.hardware.device_bytes
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
    console.print(f"{_WITHIN} taken, {_FREE} free, {_BEYOND} beyond; what is set aside is counted in")
    console.print(_largest_text(plan))
    if not plan.hardware.is_cpu:
        console.print(_host_text(plan))
    verdict = Text("it fits", style="green") if plan.fits else Text("it does not fit", style="bold red")
    tight = ", tight: a plan may be off by as much as is left" if plan.fits and _is_tight(plan, plan.peak_bytes) else ""
    console.print(verdict + Text(f": {_needed(plan, plan.peak_bytes)} of {amount(room)}{tight}"))
    for line in [*_context_lines(plan), *_limit_lines(plan), *_change_lines(plan)]:
        console.print(line, highlight=False, markup=False)


def _needed(plan: MemoryPlan, peak_bytes: int) -> str:
    return amount(peak_bytes + plan.reserve_bytes)


def _is_tight(plan: MemoryPlan, peak_bytes: int) -> bool:
    return peak_bytes + plan.reserve_bytes > (1 - _TIGHT) * plan.hardware.device_bytes


def _context_lines(plan: MemoryPlan) -> Iterator[str]:
    tokens, context = plan.prompt_tokens + plan.completion_tokens, plan.shape.context
    if context is not None and tokens > context:
        yield (
            f"prompt and completion are {tokens} tokens, more than the model's context of {context}: `grpo train` "
            "refuses such a prompt"
        )


def _limit_lines(plan: MemoryPlan) -> Iterator[str]:
    if all(limit.largest is None for limit in plan.limits):
        yield f"the smallest {', '.join(limit.key for limit in plan.limits)} do not fit, all else as it is"
        return
    yield "how far each key can go, the others as they are but for smaller micro-batches:"
    yield from (f"  {_limit_text(limit)}" for limit in plan.limits)


def _change_lines(plan: MemoryPlan) -> Iterator[str]:
    if plan.fits:
        return
    if not any(change.fits for change in plan.changes):
        yield "no change that is tried here makes it fit: a smaller model, or a larger card"
    if plan.changes:
        any_fits = any(change.fits for change in plan.changes)
        yield "what to change, the best first:" if any_fits else "what saves most, the best first:"
        yield from (f"  {_change_text(plan, change)}" for change in plan.changes)


def _phase_table(plan: MemoryPlan, *, width: int) -> Table:
    """Args: width: of the longest bar."""
    room = plan.hardware.device_bytes
    table = Table(box=None, pad_edge=False)
    table.add_column("phase")
    for name in ("held", "on top", "peak", *([] if plan.hardware.is_cpu else ["host"])):
        table.add_column(name, justify="right", no_wrap=True)
    scale = max(room, plan.peak_bytes + plan.reserve_bytes)
    table.add_column(f"of {amount(room)}", no_wrap=True)
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
    if limit.bounded_by == "the step" and limit.largest == limit.now:
        return f"{key}: a whole step at once fits"
    up_to = "" if limit.bounded_by == "the search" else "up to "
    found = f"{up_to}{limit.largest} fits"
    if limit.micro_batch_tokens is not None:
        found += f" with update.micro_batch_tokens={limit.micro_batch_tokens}"
    if limit.packing:
        found += f": {_packing_text(limit.packing)}"
    ends = {
        None: "",
        "the step": ", a whole step at once",
        "the search": "; nothing larger was tried",
        "the context": ", all that the model's context leaves beside the prompt",
    }
    return f"{key}: {found}{ends[limit.bounded_by]}"


def _change_text(plan: MemoryPlan, change: Change) -> str:
    tight = ", but tight" if _is_tight(plan, change.peak_bytes) else ""
    fits = f"fits{tight}" if change.fits else "does not suffice"
    packing = f"; {_packing_text(change.packing)}" if change.packing else ""
    return f"{' '.join(change.overrides)}: {_needed(plan, change.peak_bytes)}, {fits} ({change.why}{packing})"


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
