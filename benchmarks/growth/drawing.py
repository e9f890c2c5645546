"""Fits -> one picture: time and memory of the update, of sampling and of the head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from growth.fits import Fit
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

_STAGES = ("update", "sampling", "head")
_COLORS = {
    "K": "#4c72b0",
    "prompts": "#dd8452",
    "completions": "#55a868",
    "micro-batches": "#8172b3",
    "vocabulary": "#c44e52",
    "head alone": "#c44e52",
}
_UNITS = {"s": ("time, s", 1.0), "bytes": ("memory above what is held, MiB", 2.0**20)}


def draw(fits: Sequence[Fit], target: Path) -> None:
    """Args: target: a PNG."""
    figure = Figure(figsize=(14, 7.5), dpi=130, layout="constrained", facecolor="white")
    rows = figure.subplots(2, len(_STAGES))
    for axes_of_kind, (kind, (label, unit)) in zip(rows, _UNITS.items(), strict=True):
        for axes, stage in zip(axes_of_kind, _STAGES, strict=True):
            shown = [fit for fit in fits if fit.expected.cost == f"{stage}_{kind}" and fit.series != "vocabulary"]
            for fit in shown:
                _line(axes, fit, unit)
            axes.set(xscale="log", yscale="log", title=stage, ylabel=label)
            axes.set_xlabel("vocabulary" if stage == "head" else "tokens")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
                axis.set_minor_formatter(NullFormatter())
            if shown:
                axes.legend(fontsize=8)
            axes.grid(which="major", alpha=0.3)
    figure.suptitle("Cost of a step; dotted: linear from the first point", fontsize=11)
    figure.savefig(target)


def _line(axes: Axes, fit: Fit, unit: float) -> None:
    color = _COLORS[fit.series]
    values = [value / unit for value in fit.values]
    axes.plot(fit.sizes, values, marker="o", color=color, label=f"{fit.series}: power {fit.exponent:.2f}")
    linear = [values[0] * size / fit.sizes[0] for size in fit.sizes]
    axes.plot(fit.sizes, linear, linestyle=":", linewidth=0.8, color=color)  # what linear would be
