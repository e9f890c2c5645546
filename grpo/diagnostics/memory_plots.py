"""A memory plan, or measured memory beside it -> PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from grpo.runtime.memory import MemoryPlan
from grpo.runtime.memory_hardware import GIB

_COLORS = ("#4c72b0", "#8172b3", "#55a868", "#937860", "#8c8c8c")
_ON_TOP, _PREDICTED = "#dd8452", "#c44e52"


def plan_figure(plan: MemoryPlan) -> bytes:
    """A bar for each phase, of what is held and what comes on top, against the memory there is."""
    figure = Figure(figsize=(9, 0.6 * len(plan.phases) + 1.8), layout="constrained")
    ax = figure.subplots()
    names = list(dict.fromkeys(name for phase in plan.phases for name in phase.held))
    left = [0.0] * len(plan.phases)
    places = range(len(plan.phases))
    parts = [(name, [phase.held.get(name, 0) for phase in plan.phases]) for name in names]
    parts.append(("on top of it", [phase.transient_bytes for phase in plan.phases]))
    for number, (name, sizes) in enumerate(parts):
        widths = [size / GIB for size in sizes]
        color = _ON_TOP if name == "on top of it" else _COLORS[number % len(_COLORS)]
        ax.barh(places, widths, left=left, label=name, color=color)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    room = (plan.hardware.device_bytes - plan.reserve_bytes) / GIB
    ax.axvline(room, color="black", linestyle="--", label=f"{plan.hardware.name}, less the reserve")
    ax.set_yticks(places, [phase.name for phase in plan.phases])
    ax.invert_yaxis()
    ax.set_xlabel("GiB")
    ax.set_title(f"{plan.shape.model_type}, {plan.shape.parameters / 1e6:,.0f}M parameters, {plan.dtype}")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return _png(figure)


def bench_figure(cases: Sequence[Mapping[str, Any]]) -> bytes:
    """Measured and predicted peak of each case. Args: cases: of the JSON of `grpo bench memory`."""
    figure = Figure(figsize=(9, 0.42 * len(cases) + 1.2), layout="constrained")
    ax = figure.subplots()
    places = list(range(len(cases)))
    sizes = [case["peak_bytes"] / GIB for case in cases]
    ax.barh(places, sizes, color=_COLORS[0], label="measured")
    predicted = [case["predicted_bytes"] / GIB for case in cases]
    ax.scatter(predicted, places, marker="|", s=180, color=_PREDICTED, zorder=3, label="predicted")
    for place, case, size in zip(places, cases, sizes, strict=True):
        end = max(size, case["predicted_bytes"] / GIB)
        ax.annotate(f" {case['error']:+.1%}", (end, place), va="center", fontsize=8)
    labels = [case["name"] + (" (calibration)" if case["is_calibration"] else "") for case in cases]
    ax.set_yticks(places, labels)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_xlabel("peak above the process without a model, GiB")
    ax.legend(loc="lower right", fontsize=8)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
