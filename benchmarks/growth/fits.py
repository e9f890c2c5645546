"""Figures of points -> the power of the tokens that a cost grows by, beside what is expected. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from growth.points import HEAD_EXPECTED, SERIES, Expected

NAMES = {"s": "time", "bytes": "memory"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Of one cost over one series."""

    series: str
    expected: Expected
    exponent: float
    """Slope of the least-squares line through the logarithms."""
    sizes: tuple[float, ...]
    """Tokens, or entries of the vocabulary."""
    values: tuple[float, ...]
    """Seconds or bytes."""

    @property
    def off_line(self) -> float:
        """The largest distance of a value from the best straight line with a fixed part, as a share of the value."""
        return distance_from_line(self.sizes, self.values)

    @property
    def is_met(self) -> bool:
        straight = self.expected.straight
        is_straight = straight is None or self.off_line <= straight
        return self.expected.least <= self.exponent <= self.expected.most and is_straight

    @property
    def name(self) -> str:
        """As "update time"."""
        stage, _, kind = self.expected.cost.partition("_")
        return f"{stage} {NAMES[kind]}"


def exponent_of(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of log value against log size. Raises ValueError where a value is not above 0."""
    if min(values) <= 0:
        raise ValueError(f"a cost of {min(values)} has no logarithm: measure a larger point")
    return float(np.polyfit([math.log(size) for size in sizes], [math.log(value) for value in values], 1)[0])


def distance_from_line(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of the line a + b * size whose errors, as shares of the values, have the least squares."""
    measured = np.array(values)
    slope, fixed = np.polyfit(sizes, measured, 1, w=1 / measured)
    return float(np.abs((fixed + slope * np.array(sizes)) / measured - 1).max())


def fits_of(document: Mapping[str, Any]) -> Iterator[Fit]:
    """Of all series whose points are in the JSON document."""
    points: Mapping[str, Mapping[str, float]] = document["points"]
    for name, series in SERIES.items():
        if all(point.name in points for point in series.points):
            for expected in series.expected:
                sizes = [float(getattr(point, expected.against)) for point in series.points]
                yield _fit(name, expected, sizes, [points[point.name][expected.cost] for point in series.points])
    heads: Mapping[str, Mapping[str, float]] = document["heads"]
    sizes = sorted(heads, key=int)
    if len(sizes) > 1:
        for expected in HEAD_EXPECTED:
            values = [heads[size][expected.cost] for size in sizes]
            yield _fit("head alone", expected, [float(size) for size in sizes], values)


def _fit(series: str, expected: Expected, sizes: Sequence[float], values: Sequence[float]) -> Fit:
    return Fit(
        series=series,
        expected=expected,
        exponent=exponent_of(sizes, values),
        sizes=tuple(sizes),
        values=tuple(values),
    )


def fit_table(fits: Sequence[Fit]) -> str:
    """Markdown."""
    lines = [
        "| varied | cost | from | to | against | exponent | expected | because | off a straight line |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for fit in fits:
        low, high = (_shown(value, fit.expected.cost) for value in (fit.values[0], fit.values[-1]))
        against = f"{fit.expected.against.replace('_', ' ')}, {fit.sizes[0]:,.0f} to {fit.sizes[-1]:,.0f}"
        limits = f"{fit.expected.least:g} to {fit.expected.most:g}"
        lines.append(
            f"| {fit.series} | {fit.name} | {low} | {high} | {against} | {fit.exponent:.2f} | {limits} "
            f"| {fit.expected.why} | {fit.off_line:.0%} |"
        )
    return "\n".join(lines)


def _shown(value: float, cost: str) -> str:
    return f"{value:.2f} s" if cost.endswith("_s") else f"{value / 2**20:.0f} MiB"


def misses(fits: Sequence[Fit]) -> list[str]:
    """Costs that grow by another power than expected."""
    return [
        f"{fit.series}: the {fit.name} grows by the power {fit.exponent:.2f} of the {fit.expected.against}, "
        f"{fit.off_line:.0%} off a straight line; expected {fit.expected.least:g} to {fit.expected.most:g} "
        f"({fit.expected.why})"
        for fit in fits
        if not fit.is_met
    ]
