"""Do the controllers of beta hold the KL? Each in closed loop with a simulated policy whose KL answers to beta.

    python benchmarks/beta_controllers.py --json beta_controllers.json --figure benchmarks/results/beta_controllers.png

The plant: in each window the true KL goes a share `response` of the way to

    gain * 0.04 * (0.02 / beta of `delay` windows before) ** slope        (nats per token; at least 1 window late)

and the controller sees it times log-normal noise of 20 % (few completions), so that at gain 1 the initial beta, 0.02,
holds the target, 0.04. Slope 1 is a KL in inverse proportion to beta; slope 2 is what the fully optimised policy has
near the reference (KL = var(reward) / (2 beta^2)), and twice as hard to control. The spike is one token of 10 nats, the
bound of what a controller is shown, in one window of 1000 tokens.

Deterministic, seconds on a CPU; `--quick` takes one seed and two delays. Exits 1 where an adaptive controller does not
settle, swings, or is moved by the spike.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from results_file import circumstances, write_results

from grpo.update.beta import SMOOTHING, BandBeta, BetaController, DualBeta, FixedBeta, ProportionalBeta

TARGET, LOW, HIGH = 0.04, 0.02, 0.06  # nats per token
INITIAL = 0.02
GAINS = (0.1, 1.0, 10.0)
DELAYS = (0, 1, 2, 3, 4, 5)
ROWS = 64
NOISE = 0.2
SPIKE = 10.0 / 1000  # one token of 10 nats in a window of 1000
AFTER_SPIKE = 100  # windows
NEAR_TARGET = 0.25
MIN_INSIDE = 0.95  # share of noisy windows
MAX_SWING = 1.05  # highest over lowest KL, noise-free: a settled loop has 1, a cycling one 2 and more

PLANTS = {"slope 1": (1.0, 0.3), "slope 1, slow": (1.0, 0.1), "slope 2": (2.0, 0.3), "slope 2, slow": (2.0, 0.1)}
"""Slope and response of the plants whose limits are looked for."""

_COLORS = {0.1: "#0072B2", 1.0: "#009E73", 10.0: "#D55E00"}  # Okabe & Ito 2008, safe for colour-blind readers
_INK, _BAND = "#333333", "#999999"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One controller at one setting."""

    build: Callable[[], BetaController]
    """A fresh controller."""
    low: float
    """Lower end of where the smoothed KL must stay, nats per token."""
    high: float
    """Upper end."""
    windows: int
    """Length of a run; the spike comes AFTER_SPIKE windows before its end."""
    spike_moves: float
    """Largest relative change of beta that a spike may cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One run in closed loop, each [windows]."""

    kl: list[float]
    """True KL, nats per token."""
    smoothed: list[float]
    """Moving average of the observed KL, nats per token."""
    beta: list[float]
    """Beta after each window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A controller at one gain: the worst over delays and seeds."""

    controller: str
    gain: float
    settled_after: int | None
    """Windows until the smoothed KL is in the band, or near the target, for good, without noise; None: never."""
    windows: int
    """Length of a run."""
    inside_frac: float
    """Share of the last 100 windows, of all noisy runs, that have the smoothed KL in the band or near the target."""
    lowest_kl: float
    """Lowest true KL of the last 100 windows."""
    highest_kl: float
    """Highest true KL of the last 100 windows."""
    swing: float
    """Highest over lowest true KL of the last 100 windows, without noise."""
    swing_before: float
    """The same of the 100 windows before: a growing oscillation has swing > swing_before."""
    highest_beta: float
    """Peak of beta on the way."""
    spike_moves: float
    """Largest relative change of beta by the spike, against the same run without it."""


def adaptive(kind: type, **settings: float) -> Callable[[], BetaController]:
    """A builder of controllers that start at INITIAL and hold the common band or target."""
    held = {"low": LOW, "high": HIGH} if kind is BandBeta else {"target": TARGET}
    return partial(kind, initial=INITIAL, **held, **settings)


def near(build: Callable[[], BetaController], *, windows: int) -> Case:
    """A case that must stay near TARGET."""
    low, high = TARGET * (1 - NEAR_TARGET), TARGET * (1 + NEAR_TARGET)
    return Case(build=build, low=low, high=high, windows=windows, spike_moves=0.03)


CASES = {
    "fixed": Case(build=partial(FixedBeta, value=INITIAL), low=LOW, high=HIGH, windows=500, spike_moves=0.0),
    # at an edge of the band a spike may cost a step of the rate
    "band": Case(build=adaptive(BandBeta), low=LOW, high=HIGH, windows=500, spike_moves=0.12),
    "proportional, horizon 2000": near(adaptive(ProportionalBeta, horizon=2000), windows=500),
    "proportional, horizon 10000": near(adaptive(ProportionalBeta), windows=2500),
    "dual": near(adaptive(DualBeta), windows=500),
}

LIMITS: dict[str, Callable[[], BetaController]] = {
    **{f"band, rate {rate}": adaptive(BandBeta, rate=rate) for rate in (0.1, 0.05, 0.03)},
    **{f"proportional, horizon {h}": adaptive(ProportionalBeta, horizon=h) for h in (1000, 2000, 10_000)},
    **{f"dual, rate {rate}": adaptive(DualBeta, rate=rate) for rate in (0.1, 0.05, 0.03)},
}


def closed_loop(
    controller: BetaController,
    *,
    gain: float,
    delay: int,
    windows: int,
    slope: float = 1.0,
    response: float = 0.3,
    noise: float = NOISE,
    seed: int = 0,
    spike_at: int | None = None,
) -> Trace:
    """Run a controller against the plant of the module's docstring, from a policy equal to its reference (KL 0)."""
    rng = random.Random(seed)
    betas = deque([controller.value] * (delay + 1), maxlen=delay + 1)
    kl = 0.0
    trace = Trace(kl=[], smoothed=[], beta=[])
    for window in range(windows):
        betas.append(controller.value)
        kl += response * (gain * TARGET * (INITIAL / betas[0]) ** slope - kl)
        observed = kl * math.exp(noise * rng.gauss(0, 1) - noise**2 / 2)  # mean 1, so the noise has no bias
        observed += SPIKE if window == spike_at else 0.0
        controller.observe(observed, rows=ROWS)
        smoothed = SMOOTHING * trace.smoothed[-1] + (1 - SMOOTHING) * observed if trace.smoothed else observed
        trace.kl.append(kl)
        trace.smoothed.append(smoothed)
        trace.beta.append(controller.value)
    return trace


def summarise(name: str, case: Case, gain: float, *, delays: Sequence[int], seeds: Sequence[int]) -> Summary:
    """The worst of a controller's runs at one gain."""
    spike_at = case.windows - AFTER_SPIKE
    moves, lowest, highest, peak = 0.0, math.inf, 0.0, 0.0
    inside: list[bool] = []
    for delay in delays:
        for seed in seeds:
            run = partial(closed_loop, gain=gain, delay=delay, windows=case.windows, seed=seed)
            calm, spiked = run(case.build()), run(case.build(), spike_at=spike_at)
            inside += [case.low <= kl <= case.high for kl in spiked.smoothed[-100:]]
            moves = max(moves, *(abs(a / b - 1) for a, b in zip(spiked.beta, calm.beta, strict=True)))
            lowest, highest = min(lowest, *spiked.kl[-100:]), max(highest, *spiked.kl[-100:])
            peak = max(peak, *spiked.beta)
    run = partial(closed_loop, gain=gain, windows=case.windows, noise=0.0)
    free = [run(case.build(), delay=delay) for delay in delays]
    settled = max(_settled_after(trace.smoothed, case) for trace in free)
    return Summary(
        controller=name,
        gain=gain,
        settled_after=None if math.isinf(settled) else int(settled),
        windows=case.windows,
        inside_frac=sum(inside) / len(inside),
        lowest_kl=lowest,
        highest_kl=highest,
        swing=max(swing(trace.kl[-100:]) for trace in free),
        swing_before=max(swing(trace.kl[-200:-100]) for trace in free),
        highest_beta=peak,
        spike_moves=moves,
    )


def swing(kl: Sequence[float]) -> float:
    """Highest over lowest."""
    return max(kl) / min(kl)


def steady_delays(build: Callable[[], BetaController], *, slope: float, response: float) -> int:
    """Delays 0, 1, ... up to 5 at which no gain leaves a lasting oscillation; how many of them, without noise."""
    for delay in DELAYS:
        for gain in GAINS:
            run = closed_loop(build(), gain=gain, delay=delay, windows=2500, slope=slope, response=response, noise=0.0)
            if swing(run.kl[-500:]) > MAX_SWING:
                return delay
    return len(DELAYS)


def failures(summaries: Sequence[Summary]) -> list[str]:
    """What an adaptive controller should do and did not."""
    complaints = []
    for summary in summaries:
        if summary.controller == "fixed":
            continue
        name = f"{summary.controller} at gain {summary.gain:g}"
        if summary.settled_after is None:
            complaints.append(f"{name} does not settle")
        if summary.inside_frac < MIN_INSIDE:
            complaints.append(f"{name} is in its place in {summary.inside_frac:.1%} of the windows only")
        if summary.swing > MAX_SWING:
            complaints.append(f"{name} swings by {summary.swing:.2f}")
        if summary.spike_moves > CASES[summary.controller].spike_moves:
            complaints.append(f"{name} is moved by {summary.spike_moves:.1%} by the spike")
    return complaints


def summary_table(summaries: Sequence[Summary]) -> str:
    """Markdown, one line a controller and gain."""
    lines = [
        "| controller | gain | settled after (windows) | swing | with noise: inside | KL | highest beta "
        "| spike moves beta by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for s in summaries:
        settled = "never" if s.settled_after is None else str(s.settled_after)
        lines.append(
            f"| {s.controller} | {s.gain:g} | {settled} | {s.swing:.2f} | {s.inside_frac:.1%} "
            f"| {s.lowest_kl:.3f} to {s.highest_kl:.3f} | {s.highest_beta:.3f} | {s.spike_moves:.1%} |"
        )
    return "\n".join(lines)


def limit_table(limits: dict[str, dict[str, int]]) -> str:
    """Markdown, one line a setting: up to which delay it is steady on each plant."""
    lines = ["| steady up to delay | " + " | ".join(PLANTS) + " |", "|---" * (len(PLANTS) + 1) + "|"]
    for name, counts in limits.items():
        cells = ["never" if counts[plant] == 0 else f"{counts[plant] - 1}" for plant in PLANTS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(target: Path) -> None:
    """A PNG of four panels, one a controller: the smoothed KL above, beta below."""
    figure = Figure(figsize=(12, 9), dpi=150, layout="constrained", facecolor="white")
    figure.suptitle("Four controllers of beta against a simulated policy whose KL answers to beta", fontsize=13)
    panels = ("fixed", "band", "proportional, horizon 2000", "dual")
    notes = (
        "nothing holds the KL",
        "rests inside the band",
        "smooth and slow (10000: five times slower)",
        "holds the target; overshoots where far above it",
    )
    subfigures = figure.subfigures(2, 2, squeeze=False, hspace=0.03, wspace=0.03).flat
    for subfigure, name, note in zip(subfigures, panels, notes, strict=True):
        case = CASES[name]
        above, below = subfigure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
        subfigure.suptitle(f"{name}: {note}", fontsize=10.5, color=_INK)
        _draw_runs(above, below, case)
        above.axhspan(case.low, case.high, color=_BAND, alpha=0.25, linewidth=0)
        above.set_ylim(0.002, 0.8)
        below.set_ylim(4e-4, 20)
        above.set_ylabel("smoothed KL (nats/token)", fontsize=9)
        below.set_ylabel("beta", fontsize=9)
        below.set_xlabel("window", fontsize=9)
    handles = [Line2D([], [], color=color, label=f"gain {gain:g}") for gain, color in _COLORS.items()]
    handles += [
        Line2D([], [], color=_INK, label="no delay"),
        Line2D([], [], color=_INK, linestyle=(0, (3, 1.5)), label="delay of 5 windows"),
        Line2D([], [], color=_INK, linewidth=0.8, linestyle=":", label="one token of 10 nats"),
        Line2D([], [], color=_BAND, alpha=0.4, linewidth=8, label="band, or target ± 25 %"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def _draw_runs(above: Axes, below: Axes, case: Case) -> None:
    windows, spike_at = 500, 500 - AFTER_SPIKE
    for gain, color in _COLORS.items():
        for delay, style in ((0, "-"), (5, (0, (3, 1.5)))):
            trace = closed_loop(case.build(), gain=gain, delay=delay, windows=windows, spike_at=spike_at)
            above.plot(trace.smoothed, color=color, linestyle=style, linewidth=1.3)
            below.plot(trace.beta, color=color, linestyle=style, linewidth=1.3)
    for axes in (above, below):
        axes.axvline(spike_at, color=_INK, linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(0, windows)
        axes.tick_params(labelsize=8, colors=_INK)
        axes.spines[["top", "right"]].set_visible(False)


def _settled_after(smoothed: Sequence[float], case: Case) -> float:
    """Windows until the KL stays in [low, high]; infinite where it was outside in the last 100 windows."""
    outside = [window for window, kl in enumerate(smoothed) if not case.low <= kl <= case.high]
    first = outside[-1] + 1 if outside else 0
    return math.inf if first > len(smoothed) - 100 else first


def main() -> None:
    """Parse, run, tabulate, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write figures, machine, versions and command here")
    parser.add_argument("--figure", type=Path, help="write the picture of the four controllers here, as PNG")
    parser.add_argument("--quick", action="store_true", help="one seed, delays 0 and 5, no search for limits")
    arguments = parser.parse_args()
    delays, seeds = ((0, 5), (0,)) if arguments.quick else (DELAYS, range(10))
    summaries = [
        summarise(name, case, gain, delays=delays, seeds=seeds) for name, case in CASES.items() for gain in GAINS
    ]
    limits: dict[str, dict[str, int]] = {}
    if not arguments.quick:
        for name, build in LIMITS.items():
            limits[name] = {plant: steady_delays(build, slope=s, response=r) for plant, (s, r) in PLANTS.items()}
    print(summary_table(summaries))
    if limits:
        print("\n" + limit_table(limits))
    if arguments.figure is not None:
        draw(arguments.figure)
    if arguments.json is not None:
        document = {
            **circumstances("matplotlib"),
            "results": [asdict(summary) for summary in summaries],
            "steady_delays": limits,
        }
        write_results(arguments.json, document)
    if complaints := failures(summaries):
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
