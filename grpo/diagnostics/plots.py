"""metrics.jsonl rows and the resolved config -> pictures. The only home of matplotlib; knows no file and no HTML.

Figures are built as objects, never through pyplot: nothing global, safe in a thread. Missing values are gaps in a line.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from grpo import metrics as names

Row = Mapping[str, Any]
Series = NDArray[np.float64]

# Okabe & Ito 2008: told apart under every common colour blindness. Yellow left out: too pale on white.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK = "#333333"
_BAND = "#999999"
_STACK = ("rollout", "judge_wait", "update", "sync")  # in the order of a step; these do not overlap
_MARKER_STEPS = 60  # up to here a dot a step stays readable, and a lone step between gaps stays visible


def band_of(beta: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """(low, high) that the beta controller of a resolved config holds the observed KL in: a band, or a target twice.

    None where it holds nothing.
    """
    beta = beta or {}
    low, high = (beta.get("target"),) * 2 if beta.get("target") is not None else (beta.get("low"), beta.get("high"))
    return None if low is None or high is None else (float(low), float(high))


def band_text(band: tuple[float, float]) -> str:
    """A band, or a target, in words."""
    return f"target {band[0]:g}" if band[0] == band[1] else f"band {band[0]:g} to {band[1]:g}"


def objectives_of(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Each objective's section of a resolved config, by name, in its order."""
    return {str(name): section or {} for name, section in (config.get("objectives") or {}).items()}


def run_figures(metrics: Sequence[Row], config: Mapping[str, Any]) -> dict[str, bytes]:
    """Every figure of a run, as SVG.

    Args:
        metrics: rows of metrics.jsonl; any name may be missing from any row.
        config: the resolved config.yaml.
    Returns:
        reward, kl, beta, length, truncated, time, grad_norm -> SVG, in that order. A figure without a single value
        to draw is absent, so a run of 0 steps has none.
    """
    builders = {
        "reward": _reward_figure,
        "kl": _kl_figure,
        "beta": _beta_figure,
        "length": partial(_per_objective_figure, names.length_mean_name, "completion length (tokens, mean)"),
        "truncated": partial(_per_objective_figure, names.truncated_frac_name, "cut at max_new_tokens (share)"),
        "time": _time_figure,
        "grad_norm": _grad_norm_figure,
    }
    figures = {name: build(metrics, config) for name, build in builders.items()}
    return {name: _rendered(figure, "svg") for name, figure in figures.items() if figure is not None}


def readme_figure(metrics: Sequence[Row], config: Mapping[str, Any], eval: Mapping[str, Any] | None) -> bytes:
    """One wide PNG, 2400 pixels: reward, KL against its band, beta, and the held-out means with 95% intervals.

    Args:
        metrics: rows of metrics.jsonl.
        config: the resolved config.yaml.
        eval: eval.json, or None where the run has none.
    """
    figure = Figure(figsize=(12, 7), dpi=200, layout="constrained", facecolor="white")
    reward, kl, beta, held_out = figure.subplots(2, 2).flat
    _draw_rewards(reward, metrics, config)
    _draw_shared_kl(kl, metrics, config)
    _draw_betas(beta, metrics, config)
    _draw_held_out(held_out, eval or {}, list(objectives_of(config)))
    for ax in (reward, kl, beta, held_out):
        _finish(ax, size=11.5, x_is_step=ax is not held_out)
    return _rendered(figure, "png")


# --- figures of the report ---


def _reward_figure(metrics: Sequence[Row], config: Mapping[str, Any]) -> Figure | None:
    objectives = [o for o in objectives_of(config) if _has(metrics, names.reward_mean_name(o))]
    if not objectives:
        return None
    figure, panels = _panels(len(objectives))
    for ax, objective, color in zip(panels, objectives, _colors(len(objectives)), strict=True):
        steps, mean = _steps(metrics), _series(metrics, names.reward_mean_name(objective))
        std = _series(metrics, names.reward_std_name(objective))
        ax.fill_between(steps, mean - std, mean + std, color=color, alpha=0.13, linewidth=0, label="mean ± std")
        _draw_smoothed(ax, steps, mean, color)
        ax.set_title(_plain(objective))
        ax.set_ylabel("reward (objective's own scale)")
        _finish(ax)
    return figure


def _kl_figure(metrics: Sequence[Row], config: Mapping[str, Any]) -> Figure | None:
    objectives = {
        o: section
        for o, section in objectives_of(config).items()
        if _has(metrics, names.kl_name(o)) or _has(metrics, names.kl_penalty_name(o))
    }
    if not objectives:
        return None
    figure, panels = _panels(len(objectives))
    for ax, (objective, section), color in zip(panels, objectives.items(), _colors(len(objectives)), strict=True):
        beta = section.get("beta") or {}
        observed = names.observed_kl_name(objective, beta.get("observe"))
        band = band_of(beta)
        if band is not None:
            _shade(ax, band, _BAND, band_text(band), gid=f"band-{objective}")
        for name, label in (
            (names.kl_name(objective), "KL(policy ‖ reference)"),
            (names.kl_penalty_name(objective), "penalty"),
        ):
            if not _has(metrics, name):
                continue
            is_main = name == observed
            is_observed = is_main and band is not None  # a fixed beta observes nothing
            _line(
                ax,
                _steps(metrics),
                _series(metrics, name),
                color=color if is_main else _INK,
                linestyle="-" if is_main else "--",
                linewidth=1.9 if is_main else 1.1,
                label=f"{label}, observed by beta" if is_observed else label,
            )
        ax.set_title(_plain(objective))
        ax.set_ylabel("nats per token")
        _finish(ax)
    return figure


def _beta_figure(metrics: Sequence[Row], config: Mapping[str, Any]) -> Figure | None:
    if not any(_has(metrics, names.beta_name(o)) for o in objectives_of(config)):
        return None
    figure, (ax,) = _panels(1)
    _draw_betas(ax, metrics, config)
    _finish(ax)
    return figure


def _per_objective_figure(
    name_of: Callable[[str | None], str], ylabel: str, metrics: Sequence[Row], config: Mapping[str, Any]
) -> Figure | None:
    objectives = list(objectives_of(config))
    drawn = [
        (o, name_of(o), color)
        for o, color in zip(objectives, _colors(len(objectives)), strict=True)
        if _has(metrics, name_of(o))
    ]
    if not drawn and _has(metrics, name_of(None)):
        drawn = [("all completions", name_of(None), _INK)]
    if not drawn:
        return None
    figure, (ax,) = _panels(1)
    for label, name, color in drawn:
        _line(ax, _steps(metrics), _series(metrics, name), color=color, label=_plain(label))
    ax.set_ylim(bottom=0)
    ax.set_ylabel(ylabel)
    _finish(ax)
    return figure


def _time_figure(metrics: Sequence[Row], config: Mapping[str, Any]) -> Figure | None:
    stages = [stage for stage in _STACK if _has(metrics, names.time_name(stage))]
    if not stages:
        return None
    figure, (ax,) = _panels(1)
    steps = _steps(metrics)
    heights = [np.nan_to_num(_series(metrics, names.time_name(stage))) for stage in stages]  # no time: nothing stacked
    labels = [stage.replace("_", " ") for stage in stages]
    if len(steps) <= _MARKER_STEPS:  # an area would not show a run of one step
        bottom = np.zeros(len(steps))
        for height, label, color in zip(heights, labels, _colors(len(stages)), strict=True):
            ax.bar(steps, height, width=0.85, bottom=bottom, color=color, label=label)
            bottom = bottom + height
    else:
        ax.stackplot(steps, *heights, labels=labels, colors=_colors(len(stages)), linewidth=0)
    for stage, label, style in (("step", "whole step", "-"), ("judge", "judge (beside the rollout)", ":")):
        if _has(metrics, names.time_name(stage)):
            series = _series(metrics, names.time_name(stage))
            _line(ax, steps, series, color=_INK, linestyle=style, linewidth=1.2, label=label)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("seconds a step")
    _finish(ax)
    legend = ax.get_legend()
    if legend is not None:  # beside the bars: they fill the panel
        legend.set_loc("upper left")
        legend.set_bbox_to_anchor((1.0, 1.0))
    return figure


def _grad_norm_figure(metrics: Sequence[Row], config: Mapping[str, Any]) -> Figure | None:
    if not _has(metrics, names.GRAD_NORM):
        return None
    figure, (ax,) = _panels(1)
    _line(ax, _steps(metrics), _series(metrics, names.GRAD_NORM), color=_INK, label=None)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("gradient norm")
    _finish(ax)
    return figure


# --- panels that the README's figure shares or owns ---


def _draw_rewards(ax: Axes, metrics: Sequence[Row], config: Mapping[str, Any]) -> None:
    objectives = list(objectives_of(config))
    steps = _steps(metrics)
    for objective, color in zip(objectives, _colors(len(objectives)), strict=True):
        mean = _series(metrics, names.reward_mean_name(objective))
        std = _series(metrics, names.reward_std_name(objective))
        ax.fill_between(steps, mean - std, mean + std, color=color, alpha=0.10, linewidth=0)
        _draw_smoothed(ax, steps, mean, color, label=_plain(objective))
    ax.set_title("Reward in training (mean, band: ± std)")
    ax.set_ylabel("reward")


def _draw_shared_kl(ax: Axes, metrics: Sequence[Row], config: Mapping[str, Any]) -> None:
    objectives = objectives_of(config)
    colors = _colors(len(objectives))
    bands = {o: band for o, section in objectives.items() if (band := band_of(section.get("beta"))) is not None}
    is_one_band = len(set(bands.values())) == 1
    for objective, color in zip(objectives, colors, strict=True):
        if objective not in bands or (is_one_band and objective != next(iter(bands))):
            continue
        band = bands[objective]
        label = band_text(band) if is_one_band else f"{band_text(band).split()[0]} of {_plain(objective)}"
        _shade(ax, band, _BAND if is_one_band else color, label, gid=f"band-{objective}")
    for (objective, section), color in zip(objectives.items(), colors, strict=True):
        observed = names.observed_kl_name(objective, (section.get("beta") or {}).get("observe"))
        label = f"{_plain(objective)} (penalty)" if observed.endswith("/penalty") else _plain(objective)
        _line(ax, _steps(metrics), _series(metrics, observed), color=color, label=label)
    ax.set_title("KL to the reference, and where beta holds it")
    ax.set_ylabel("nats per token")


def _draw_betas(ax: Axes, metrics: Sequence[Row], config: Mapping[str, Any]) -> None:
    objectives = list(objectives_of(config))
    drawn = []
    for objective, color in zip(objectives, _colors(len(objectives)), strict=True):
        series = _series(metrics, names.beta_name(objective))
        if np.isfinite(series).any():
            _line(ax, _steps(metrics), series, color=color, label=_plain(objective))
            drawn.append(series)
    ax.set_title("beta, the KL's weight")
    ax.set_ylabel("beta")
    lowest = min((float(np.nanmin(series)) for series in drawn), default=0.0)
    if lowest <= 0:
        return  # beta = 0 (no penalty) has no place on a log axis
    ax.set_yscale("log")
    ax.set_ylabel("beta (log scale)")
    # At least a factor of 1.7^2 = 2.9 high, so that one of the ticks 1, 2, 5 (at most 2.5 apart) is in sight.
    ax.set_ylim(lowest / 1.7, max(float(np.nanmax(series)) for series in drawn) * 1.7)
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _draw_held_out(ax: Axes, eval: Mapping[str, Any], objectives: Sequence[str]) -> None:
    ax.set_title("Held-out reward (mean, 95% interval)")
    ax.set_ylabel("reward")
    phases = [phase for phase in ("before", "after") if eval.get(phase)]
    if not phases or not objectives:
        ax.text(0.5, 0.5, "no held-out evaluation", ha="center", va="center", color=_INK, transform=ax.transAxes)
        ax.set_xticks([])
        return
    width = 0.8 / len(phases)
    for offset, phase in enumerate(phases):
        for index, (objective, color) in enumerate(zip(objectives, _colors(len(objectives)), strict=True)):
            entry = eval[phase].get(objective) or {}
            if entry.get("mean") is None:
                continue
            x = index + (offset - (len(phases) - 1) / 2) * width
            _draw_bar(ax, x, entry, width=width * 0.92, color=color, is_filled=phase == phases[-1])
    # Grey in the legend: colour says the objective, filling says before or after.
    faces = {phase: _BAND if phase == phases[-1] else "white" for phase in phases}
    for phase, face in faces.items():
        ax.add_patch(Rectangle((0, 0), 0, 0, facecolor=face, edgecolor=_INK, label=phase))
    ax.axhline(0, color=_INK, linewidth=0.8)
    ax.set_xticks(range(len(objectives)), [_plain(o) for o in objectives])
    ax.margins(y=0.16)


def _draw_bar(ax: Axes, x: float, entry: Mapping[str, Any], *, width: float, color: str, is_filled: bool) -> None:
    mean = float(entry["mean"])
    ax.bar([x], [mean], width=width, facecolor=color if is_filled else "white", edgecolor=color, linewidth=1.6)
    low, high = entry.get("low"), entry.get("high")
    if low is not None and high is not None:
        ax.plot([x, x], [low, high], color=_INK, linewidth=1.6, solid_capstyle="butt")
        ax.plot([x, x], [low, high], color=_INK, marker="_", markersize=9, linestyle="none")
    top = max(mean, high if high is not None else mean)
    ax.annotate(
        f"{mean:.2f}", (x, max(top, 0.0)), (0, 4), textcoords="offset points", ha="center", fontsize=11, color=_INK
    )


# --- parts ---


def _steps(metrics: Sequence[Row]) -> Series:
    return np.array([row.get(names.STEP, index) for index, row in enumerate(metrics, start=1)], dtype=np.float64)


def _series(metrics: Sequence[Row], name: str) -> Series:
    """[S] the metric at each step; NaN, which every line leaves out, where it is missing."""
    values = [row.get(name) for row in metrics]
    series = np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)
    return np.where(np.isfinite(series), series, np.nan)


def _has(metrics: Sequence[Row], name: str) -> bool:
    return bool(np.isfinite(_series(metrics, name)).any())


def smoothed(values: Series, window: int) -> Series:
    """[S] centred mean over `window` steps, shorter at the ends, of the values that are there; NaN where none is."""
    is_there = np.isfinite(values)
    kernel = np.ones(window)
    half = window // 2
    total = np.convolve(np.where(is_there, values, 0.0), kernel)[half : half + len(values)]
    count = np.convolve(is_there.astype(np.float64), kernel)[half : half + len(values)]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0.5)


def _draw_smoothed(ax: Axes, steps: Series, values: Series, color: str, label: str | None = None) -> None:
    window = max(3, len(steps) // 8) | 1  # odd, so that it is centred
    if len(steps) < 2 * window:
        _line(ax, steps, values, color=color, label=label or "mean")
        return
    _line(ax, steps, values, color=color, alpha=0.45, linewidth=1.0, label=None if label else "mean")
    ax.plot(steps, smoothed(values, window), color=color, linewidth=2.2, label=label or f"mean over {window} steps")


def _line(ax: Axes, steps: Series, values: Series, *, label: str | None, linewidth: float = 1.8, **style: Any) -> None:
    marker = "o" if len(steps) <= _MARKER_STEPS else None
    ax.plot(steps, values, label=label, linewidth=linewidth, marker=marker, markersize=linewidth + 1.2, **style)


def _shade(ax: Axes, band: tuple[float, float], color: str, label: str, *, gid: str) -> None:
    if band[0] == band[1]:  # a target: a band without height would not be seen
        ax.axhline(band[0], color=color, linewidth=1.6, alpha=0.9, label=label, gid=gid)
        return
    ax.axhspan(*band, facecolor=color, alpha=0.22, linewidth=0, label=label, gid=gid)
    for edge in band:
        ax.axhline(edge, color=color, linewidth=0.8, alpha=0.8)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes, two a row."""
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(10, 3.4 * rows), layout="constrained", facecolor="white")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _finish(ax: Axes, *, size: float = 10.5, x_is_step: bool = True) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=size - 0.5, colors=_INK)
    ax.yaxis.label.set(size=size, color=_INK)
    ax.title.set(size=size + 1, color=_INK)
    if x_is_step:
        ax.set_xlabel("step", fontsize=size, color=_INK)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        ax.legend(handles, labels, fontsize=size - 1, frameon=True, framealpha=0.8, edgecolor="none")


def _colors(count: int) -> list[str]:
    return list(islice(cycle(_PALETTE), count))


def _plain(text: str) -> str:
    """A name as matplotlib shows it: `$` would start a formula, a leading `_` would keep it out of the legend."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _rendered(figure: Figure, format: str) -> bytes:
    buffer = io.BytesIO()
    # No date: the same run gives the same picture.
    figure.savefig(buffer, format=format, metadata={"Date": None} if format == "svg" else None)
    return buffer.getvalue()
