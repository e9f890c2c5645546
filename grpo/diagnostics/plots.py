"""metrics.jsonl rows and the resolved config -> pictures, drawn by `axes`. Knows no file and no HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from grpo import metrics as names
from grpo.diagnostics.axes import (
    GREY,
    INK,
    MARKER_STEPS,
    Row,
    draw_line,
    draw_smoothed,
    finish,
    has_values,
    new_panels,
    palette,
    plain,
    rendered,
    series_of,
    shade,
    steps_of,
)

_STACK = ("rollout", "judge_wait", "update", "sync")  # in the order of a step; these do not overlap


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
        reward, held_out, kl, beta, length, truncated, time, grad_norm -> SVG, in that order. A figure without a single
        value to draw is absent, so a run of 0 steps has none, and one that evaluates only before and after training no
        held_out.
    """
    builders = {
        "reward": _reward_figure,
        "held_out": _held_out_figure,
        "kl": _kl_figure,
        "beta": _beta_figure,
        "length": partial(_per_objective_figure, names.length_mean_name, "completion length (tokens, mean)"),
        "truncated": partial(_per_objective_figure, names.truncated_frac_name, "cut at max_new_tokens (share)"),
        "time": _time_figure,
        "grad_norm": _grad_norm_figure,
    }
    figures = {name: build(metrics, config) for name, build in builders.items()}
    return {name: rendered(figure, "svg") for name, figure in figures.items() if figure is not None}


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
        finish(ax, size=11.5, x_is_step=ax is not held_out)
    return rendered(figure, "png")


# --- figures of the report ---


def _reward_figure(metrics: Sequence[Row], config: Mapping[str, Any]) -> Figure | None:
    objectives = [o for o in objectives_of(config) if has_values(metrics, names.reward_mean_name(o))]
    if not objectives:
        return None
    figure, panels = new_panels(len(objectives))
    for ax, objective, color in zip(panels, objectives, palette(len(objectives)), strict=True):
        steps, mean = steps_of(metrics), series_of(metrics, names.reward_mean_name(objective))
        std = series_of(metrics, names.reward_std_name(objective))
        ax.fill_between(steps, mean - std, mean + std, color=color, alpha=0.13, linewidth=0, label="mean ± std")
        draw_smoothed(ax, steps, mean, color)
        ax.set_title(plain(objective))
        ax.set_ylabel("reward (objective's own scale)")
        finish(ax)
    return figure


def _held_out_figure(metrics: Sequence[Row], config: Mapping[str, Any]) -> Figure | None:
    """Of the evaluations during the run: its steps without one are left out, and a line joins those with one."""
    evaluated = [row for row in metrics if any(row.get(names.eval_name(o)) is not None for o in objectives_of(config))]
    if not evaluated:
        return None
    objectives = list(objectives_of(config))
    figure, (ax,) = new_panels(1)
    steps = steps_of(evaluated)
    for objective, color in zip(objectives, palette(len(objectives)), strict=True):
        low, high = (series_of(evaluated, names.eval_name(objective, edge)) for edge in ("low", "high"))
        ax.fill_between(steps, low, high, color=color, alpha=0.13, linewidth=0)
        draw_line(ax, steps, series_of(evaluated, names.eval_name(objective)), color=color, label=plain(objective))
    ax.set_ylabel("held-out reward (mean, 95% interval)")
    finish(ax)
    return figure


def _kl_figure(metrics: Sequence[Row], config: Mapping[str, Any]) -> Figure | None:
    objectives = {
        o: section
        for o, section in objectives_of(config).items()
        if has_values(metrics, names.kl_name(o)) or has_values(metrics, names.kl_penalty_name(o))
    }
    if not objectives:
        return None
    figure, panels = new_panels(len(objectives))
    for ax, (objective, section), color in zip(panels, objectives.items(), palette(len(objectives)), strict=True):
        beta = section.get("beta") or {}
        observed = names.observed_kl_name(objective, beta.get("observe"))
        band = band_of(beta)
        if band is not None:
            shade(ax, band, GREY, band_text(band), gid=f"band-{objective}")
        for name, label in (
            (names.kl_name(objective), "KL(policy ‖ reference)"),
            (names.kl_penalty_name(objective), "penalty"),
        ):
            if not has_values(metrics, name):
                continue
            is_main = name == observed
            is_observed = is_main and band is not None  # a fixed beta observes nothing
            draw_line(
                ax,
                steps_of(metrics),
                series_of(metrics, name),
                color=color if is_main else INK,
                linestyle="-" if is_main else "--",
                linewidth=1.9 if is_main else 1.1,
                label=f"{label}, observed by beta" if is_observed else label,
            )
        ax.set_title(plain(objective))
        ax.set_ylabel("nats per token")
        finish(ax)
    return figure


def _beta_figure(metrics: Sequence[Row], config: Mapping[str, Any]) -> Figure | None:
    if not any(has_values(metrics, names.beta_name(o)) for o in objectives_of(config)):
        return None
    figure, (ax,) = new_panels(1)
    _draw_betas(ax, metrics, config)
    finish(ax)
    return figure


def _per_objective_figure(
    name_of: Callable[[str | None], str], ylabel: str, metrics: Sequence[Row], config: Mapping[str, Any]
) -> Figure | None:
    objectives = list(objectives_of(config))
    drawn = [
        (o, name_of(o), color)
        for o, color in zip(objectives, palette(len(objectives)), strict=True)
        if has_values(metrics, name_of(o))
    ]
    if not drawn and has_values(metrics, name_of(None)):
        drawn = [("all completions", name_of(None), INK)]
    if not drawn:
        return None
    figure, (ax,) = new_panels(1)
    for label, name, color in drawn:
        draw_line(ax, steps_of(metrics), series_of(metrics, name), color=color, label=plain(label))
    ax.set_ylim(bottom=0)
    ax.set_ylabel(ylabel)
    finish(ax)
    return figure


def _time_figure(metrics: Sequence[Row], config: Mapping[str, Any]) -> Figure | None:
    stages = [stage for stage in _STACK if has_values(metrics, names.time_name(stage))]
    if not stages:
        return None
    figure, (ax,) = new_panels(1)
    steps = steps_of(metrics)
    times = [series_of(metrics, names.time_name(stage)) for stage in stages]
    heights = [np.nan_to_num(series) for series in times]  # no time: nothing stacked
    labels = [stage.replace("_", " ") for stage in stages]
    if len(steps) <= MARKER_STEPS:  # an area would not show a run of one step
        bottom = np.zeros(len(steps))
        for height, label, color in zip(heights, labels, palette(len(stages)), strict=True):
            ax.bar(steps, height, width=0.85, bottom=bottom, color=color, label=label)
            bottom = bottom + height
    else:
        ax.stackplot(steps, *heights, labels=labels, colors=palette(len(stages)), linewidth=0)
    for stage, label, style in (("step", "whole step", "-"), ("judge", "judge (beside the rollout)", ":")):
        if has_values(metrics, names.time_name(stage)):
            series = series_of(metrics, names.time_name(stage))
            draw_line(ax, steps, series, color=INK, linestyle=style, linewidth=1.2, label=label)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("seconds a step")
    finish(ax)
    legend = ax.get_legend()
    if legend is not None:  # beside the bars: they fill the panel
        legend.set_loc("upper left")
        legend.set_bbox_to_anchor((1.0, 1.0))
    return figure


def _grad_norm_figure(metrics: Sequence[Row], config: Mapping[str, Any]) -> Figure | None:
    if not has_values(metrics, names.GRAD_NORM):
        return None
    figure, (ax,) = new_panels(1)
    draw_line(ax, steps_of(metrics), series_of(metrics, names.GRAD_NORM), color=INK, label=None)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("gradient norm")
    finish(ax)
    return figure


# --- panels that the README's figure shares or owns ---


def _draw_rewards(ax: Axes, metrics: Sequence[Row], config: Mapping[str, Any]) -> None:
    objectives = list(objectives_of(config))
    steps = steps_of(metrics)
    for objective, color in zip(objectives, palette(len(objectives)), strict=True):
        mean = series_of(metrics, names.reward_mean_name(objective))
        std = series_of(metrics, names.reward_std_name(objective))
        ax.fill_between(steps, mean - std, mean + std, color=color, alpha=0.10, linewidth=0)
        draw_smoothed(ax, steps, mean, color, label=plain(objective))
    ax.set_title("Reward in training (mean, band: ± std)")
    ax.set_ylabel("reward")


def _draw_shared_kl(ax: Axes, metrics: Sequence[Row], config: Mapping[str, Any]) -> None:
    objectives = objectives_of(config)
    colors = palette(len(objectives))
    bands = {o: band for o, section in objectives.items() if (band := band_of(section.get("beta"))) is not None}
    is_one_band = len(set(bands.values())) == 1
    for objective, color in zip(objectives, colors, strict=True):
        if objective not in bands or (is_one_band and objective != next(iter(bands))):
            continue
        band = bands[objective]
        label = band_text(band) if is_one_band else f"{band_text(band).split()[0]} of {plain(objective)}"
        shade(ax, band, GREY if is_one_band else color, label, gid=f"band-{objective}")
    for (objective, section), color in zip(objectives.items(), colors, strict=True):
        observed = names.observed_kl_name(objective, (section.get("beta") or {}).get("observe"))
        label = f"{plain(objective)} (penalty)" if observed.endswith("/penalty") else plain(objective)
        draw_line(ax, steps_of(metrics), series_of(metrics, observed), color=color, label=label)
    ax.set_title("KL to the reference, and where beta holds it")
    ax.set_ylabel("nats per token")


def _draw_betas(ax: Axes, metrics: Sequence[Row], config: Mapping[str, Any]) -> None:
    objectives = list(objectives_of(config))
    drawn = []
    for objective, color in zip(objectives, palette(len(objectives)), strict=True):
        series = series_of(metrics, names.beta_name(objective))
        if np.isfinite(series).any():
            draw_line(ax, steps_of(metrics), series, color=color, label=plain(objective))
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
        ax.text(0.5, 0.5, "no held-out evaluation", ha="center", va="center", color=INK, transform=ax.transAxes)
        ax.set_xticks([])
        return
    width = 0.8 / len(phases)
    for offset, phase in enumerate(phases):
        for index, (objective, color) in enumerate(zip(objectives, palette(len(objectives)), strict=True)):
            entry = eval[phase].get(objective) or {}
            if entry.get("mean") is None:
                continue
            x = index + (offset - (len(phases) - 1) / 2) * width
            _draw_bar(ax, x, entry, width=width * 0.92, color=color, is_filled=phase == phases[-1])
    # Grey in the legend: colour says the objective, filling says before or after.
    faces = {phase: GREY if phase == phases[-1] else "white" for phase in phases}
    for phase, face in faces.items():
        ax.add_patch(Rectangle((0, 0), 0, 0, facecolor=face, edgecolor=INK, label=phase))
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.set_xticks(range(len(objectives)), [plain(o) for o in objectives])
    ax.margins(y=0.16)


def _draw_bar(ax: Axes, x: float, entry: Mapping[str, Any], *, width: float, color: str, is_filled: bool) -> None:
    mean = float(entry["mean"])
    ax.bar([x], [mean], width=width, facecolor=color if is_filled else "white", edgecolor=color, linewidth=1.6)
    low, high = entry.get("low"), entry.get("high")
    if low is not None and high is not None:
        ax.plot([x, x], [low, high], color=INK, linewidth=1.6, solid_capstyle="butt")
        ax.plot([x, x], [low, high], color=INK, marker="_", markersize=9, linestyle="none")
    top = max(mean, high if high is not None else mean)
    ax.annotate(
        f"{mean:.2f}", (x, max(top, 0.0)), (0, 4), textcoords="offset points", ha="center", fontsize=11, color=INK
    )
