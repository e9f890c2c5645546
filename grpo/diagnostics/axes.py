"""Lines, bands and panels, drawn in one style. Knows rows of metrics.jsonl by name; knows no figure of the run's.

Figures are built as objects, never through pyplot: nothing global, safe in a thread. Missing values are gaps in a line.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from grpo import metrics as names

Row = Mapping[str, Any]
Series = NDArray[np.float64]

# Okabe & Ito 2008: told apart under every common colour blindness. Yellow left out: too pale on white.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#333333"
GREY = "#999999"
MARKER_STEPS = 60  # up to here a dot a step stays readable, and a lone step between gaps stays visible


def steps_of(metrics: Sequence[Row]) -> Series:
    """[S] number of each row's step."""
    return np.array([row.get(names.STEP, index) for index, row in enumerate(metrics, start=1)], dtype=np.float64)


def series_of(metrics: Sequence[Row], name: str) -> Series:
    """[S] the metric at each step; NaN, which every line leaves out, where it is missing."""
    values = [row.get(name) for row in metrics]
    series = np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)
    return np.where(np.isfinite(series), series, np.nan)


def has_values(metrics: Sequence[Row], name: str) -> bool:
    """Whether any row has the metric."""
    return bool(np.isfinite(series_of(metrics, name)).any())


def smoothed(values: Series, window: int) -> Series:
    """[S] centred mean over `window` steps, shorter at the ends, of the values that are there; NaN where none is."""
    is_there = np.isfinite(values)
    kernel = np.ones(window)
    half = window // 2
    total = np.convolve(np.where(is_there, values, 0.0), kernel)[half : half + len(values)]
    count = np.convolve(is_there.astype(np.float64), kernel)[half : half + len(values)]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0.5)


def draw_smoothed(ax: Axes, steps: Series, values: Series, color: str, label: str | None = None) -> None:
    """The values, and over them their centred mean where there are enough of them."""
    window = max(3, len(steps) // 8) | 1  # odd, so that it is centred
    if len(steps) < 2 * window:
        draw_line(ax, steps, values, color=color, label=label or "mean")
        return
    draw_line(ax, steps, values, color=color, alpha=0.45, linewidth=1.0, label=None if label else "mean")
    ax.plot(steps, smoothed(values, window), color=color, linewidth=2.2, label=label or f"mean over {window} steps")


def draw_line(
    ax: Axes, steps: Series, values: Series, *, label: str | None, linewidth: float = 1.8, **style: Any
) -> None:
    """A line, with a dot a step where they stay apart."""
    marker = "o" if len(steps) <= MARKER_STEPS else None
    ax.plot(steps, values, label=label, linewidth=linewidth, marker=marker, markersize=linewidth + 1.2, **style)


def shade(ax: Axes, band: tuple[float, float], color: str, label: str, *, gid: str) -> None:
    """A band over the whole width, or a line where it has no height."""
    if band[0] == band[1]:  # a target: a band without height would not be seen
        ax.axhline(band[0], color=color, linewidth=1.6, alpha=0.9, label=label, gid=gid)
        return
    ax.axhspan(*band, facecolor=color, alpha=0.22, linewidth=0, label=label, gid=gid)
    for edge in band:
        ax.axhline(edge, color=color, linewidth=0.8, alpha=0.8)


def new_panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes, two a row."""
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(10, 3.4 * rows), layout="constrained", facecolor="white")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def finish(ax: Axes, *, size: float = 10.5, x_is_step: bool = True) -> None:
    """Grid, fonts, legend. Args: size: of the labels, in points."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=size - 0.5, colors=INK)
    ax.yaxis.label.set(size=size, color=INK)
    ax.title.set(size=size + 1, color=INK)
    if x_is_step:
        ax.set_xlabel("step", fontsize=size, color=INK)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        ax.legend(handles, labels, fontsize=size - 1, frameon=True, framealpha=0.8, edgecolor="none")


def palette(count: int) -> list[str]:
    """Colours, the first ones again where there are not so many."""
    return list(islice(cycle(_PALETTE), count))


def plain(text: str) -> str:
    """A name as matplotlib shows it: `$` would start a formula, a leading `_` would keep it out of the legend."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def rendered(figure: Figure, format: str) -> bytes:
    """Args: format: svg or png."""
    buffer = io.BytesIO()
    # No date: the same run gives the same picture.
    figure.savefig(buffer, format=format, metadata={"Date": None} if format == "svg" else None)
    return buffer.getvalue()
