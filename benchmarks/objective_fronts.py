"""Two objectives that conflict: which compromises do the ways of combining their gradients reach?

    python benchmarks/objective_fronts.py --seeds 3 --json benchmarks/results/objective_fronts.json \\
        --figure benchmarks/results/objective_fronts.png

A tiny random Llama answers with 8 of 12 tokens. Objective "a" scores 1 - (1 - share of token A)^2, objective "b" the
same of token B, in the same completion: every place given to one is lost to the other, and the front is known, k places
for A and 8 - k for B. It bends outwards, so each weight w of "a" (1 - w of "b") has a best split of its own, a share of
A near w. Engine, batches and update are the real ones; there is no KL term, which would pull both objectives one way.

About 20 s of one core for each seed; `--quick` takes one seed, three weights and few steps: it shows that the script
works, not where anything ends.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from models.tiny_llama import END, START, VOCABULARY, numbers_as_words, tiny_llama
from results_file import circumstances, write_results

from grpo.batching import build_batch
from grpo.config import FullTrainable, GradientsConfig, OptimConfig, UpdateConfig
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import SamplingParams
from grpo.rollout.transformers_engine import TransformersEngine
from grpo.runtime.policy import Policy
from grpo.types import Completion, Message, Prompt, RolloutGroup, ScoredGroup, Verdict
from grpo.update.beta import FixedBeta
from grpo.update.step import Updater

Method = Literal["sum", "pcgrad", "cagrad", "mgda"]
METHODS: tuple[Method, ...] = ("sum", "pcgrad", "cagrad", "mgda")
WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)
STEPS = 20

TOKENS = {"a": 2, "b": 3}
NUM_TOKENS = 8
NUM_PROMPTS, GROUP_SIZE = 1, 32
LEARNING_RATE = 0.01
PARAMS = SamplingParams(end_token_ids=(END,), max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS)

_COLORS = dict(zip(WEIGHTS, ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00"), strict=True))
"""Okabe & Ito 2008, safe for colour-blind readers."""
_INK, _FRONT = "#333333", "#999999"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run."""

    method: Method
    weight: float
    """Of objective "a"; "b" has the rest."""
    seed: int
    path: list[tuple[float, float]]
    """[steps + 1] mean scores of "a" and "b" over the completions sampled before each step, and after the last."""
    cosines: list[float | None]
    """[steps] cosine of the two objectives' gradients; None where one of them is 0."""
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A method at one weight, over seeds."""

    method: Method
    weight: float
    a: float
    """Mean score of objective "a" after the last step."""
    b: float
    """The same of "b"."""
    of_best: float
    """weight * a + (1 - weight) * b over the most that any split reaches."""
    lowest_of_best: float
    """The same of the worst seed."""
    mean_cosine: float | None
    """Over all steps and seeds where both gradients are above 0."""
    conflict_frac: float | None
    """Share of those with a cosine below 0."""


def score(completion: Completion, token: int) -> float:
    """1 - (1 - share)^2: the first places are worth more than the last, so that a compromise is worth it."""
    share = completion.token_ids.count(token) / NUM_TOKENS
    return 1 - (1 - share) ** 2


def front() -> list[tuple[float, float]]:
    """[NUM_TOKENS + 1] what the completions score that hold nothing but A and B, from all B to all A."""
    shares = [k / NUM_TOKENS for k in range(NUM_TOKENS + 1)]
    return [(1 - (1 - share) ** 2, 1 - share**2) for share in shares]


def best_weighted(weight: float) -> float:
    """The most that weight * a + (1 - weight) * b can be."""
    return max(weight * a + (1 - weight) * b for a, b in front())


def train(method: Method, weight: float, *, seed: int, steps: int) -> Run:
    """Train one policy."""
    start = time.perf_counter()
    policy = Policy(tiny_llama(seed), FullTrainable(type="full"), seed=seed)
    update = UpdateConfig(gradients=GradientsConfig(method=method, cosine_every=1))
    weights = {"a": weight, "b": 1 - weight}
    updater = Updater(
        policy,
        {name: FixedBeta(value=0.0) for name in weights},
        observed=dict.fromkeys(weights, "k3"),
        params=PARAMS,
        update=update,
        # falling to 0: at a constant rate the last point would be one of a wandering path. No proof of convergence
        optim=OptimConfig(learning_rate=LEARNING_RATE, schedule="linear"),
    )
    engine = TransformersEngine(policy, numbers_as_words(), max_rows=NUM_PROMPTS * GROUP_SIZE)
    path: list[tuple[float, float]] = []
    cosines: list[float | None] = []
    for step in range(steps + 1):
        groups = _sampled(engine, seed=1000 * seed + step)
        path.append((_mean(groups, "a"), _mean(groups, "b")))
        if step == steps:
            break
        batch = build_batch(
            groups,
            weights,
            combine=update.combine,
            scale=update.score_scale,
            micro_batch_tokens=update.micro_batch_tokens,
            max_new_tokens=NUM_TOKENS,
        )
        stats = updater.step(batch, step=step, steps=steps)
        cosines.append(stats.cosines.get(("a", "b")))
        engine.load_weights(policy)
    return Run(method=method, weight=weight, seed=seed, path=path, cosines=cosines, wall_s=time.perf_counter() - start)


def _sampled(engine: TransformersEngine, *, seed: int) -> list[ScoredGroup]:
    prompts = [
        EncodedPrompt(
            prompt=Prompt(id=f"p{n}", messages=(Message(role="user", content=str(n)),), objectives=tuple(TOKENS)),
            token_ids=(START, VOCABULARY - 1 - n),
        )
        for n in range(NUM_PROMPTS)
    ]
    groups = engine.sample(prompts, GROUP_SIZE, params=PARAMS, seed=seed)
    return [_scored(group) for group in sorted(groups, key=lambda group: group.prompt.id)]


def _scored(group: RolloutGroup) -> ScoredGroup:
    verdicts: list[Mapping[str, Verdict]] = [
        {name: Verdict(value=score(completion, token), parts={}) for name, token in TOKENS.items()}
        for completion in group.completions
    ]
    return ScoredGroup(rollout=group, verdicts=tuple(verdicts))


def _mean(groups: Sequence[ScoredGroup], objective: str) -> float:
    scores = [score(row, TOKENS[objective]) for group in groups for row in group.rollout.completions]
    return sum(scores) / len(scores)


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """One summary for each method and weight, in the order of the runs."""
    return [
        _summary([run for run in runs if (run.method, run.weight) == case])
        for case in dict.fromkeys((run.method, run.weight) for run in runs)
    ]


def _summary(runs: Sequence[Run]) -> Summary:
    weight = runs[0].weight
    ends = [run.path[-1] for run in runs]
    of_best = [(weight * a + (1 - weight) * b) / best_weighted(weight) for a, b in ends]
    cosines = [cosine for run in runs for cosine in run.cosines if cosine is not None]
    return Summary(
        method=runs[0].method,
        weight=weight,
        a=sum(a for a, _ in ends) / len(ends),
        b=sum(b for _, b in ends) / len(ends),
        of_best=sum(of_best) / len(of_best),
        lowest_of_best=min(of_best),
        mean_cosine=sum(cosines) / len(cosines) if cosines else None,
        conflict_frac=sum(cosine < 0 for cosine in cosines) / len(cosines) if cosines else None,
    )


def table(summaries: Sequence[Summary]) -> str:
    """Markdown, one line a method and weight."""
    lines = [
        "| method | weight of a | score a | score b | of the best (worst seed) | mean cosine | below 0 |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in summaries:
        cosine = "-" if s.mean_cosine is None else f"{s.mean_cosine:.2f}"
        conflict = "-" if s.conflict_frac is None else f"{s.conflict_frac:.0%}"
        lines.append(
            f"| {s.method} | {s.weight:g} | {s.a:.2f} | {s.b:.2f} | {s.of_best:.1%} ({s.lowest_of_best:.1%}) "
            f"| {cosine} | {conflict} |"
        )
    return "\n".join(lines)


def draw(runs: Sequence[Run], target: Path) -> None:
    """A PNG with a column for each method: the paths to the points reached above, the gradients' cosine below."""
    figure = Figure(figsize=(14, 7.4), dpi=150, layout="constrained", facecolor="white")
    figure.suptitle(
        "Two objectives for the same 8 tokens: where four ways of combining their gradients end", fontsize=13
    )
    above, below = figure.subplots(2, len(METHODS), sharex="row", sharey="row", height_ratios=(2, 1))
    for method, front_axes, cosine_axes in zip(METHODS, above, below, strict=True):
        own = [run for run in runs if run.method == method]
        _draw_front(front_axes, own)
        _draw_cosines(cosine_axes, own)
        front_axes.set_title(method, fontsize=12, color=_INK)
        front_axes.set_xlabel("score of a", fontsize=9)
        cosine_axes.set_xlabel("step", fontsize=9)
        for axes in (front_axes, cosine_axes):
            axes.tick_params(labelsize=8, colors=_INK)
            axes.spines[["top", "right"]].set_visible(False)
    above[0].set_ylabel("score of b", fontsize=9)
    below[0].set_ylabel("cosine of the two gradients\n(mean over seeds)", fontsize=9)
    weights = list(dict.fromkeys(run.weight for run in runs))
    handles = [Line2D([], [], color=_COLORS[w], marker="o", markersize=5, label=f"weight of a: {w:g}") for w in weights]
    handles += [
        Line2D([], [], color=_FRONT, marker="|", label="the front: k times A, 8 - k times B"),
        Line2D([], [], color=_INK, linewidth=0, marker="*", markersize=9, fillstyle="none", label="best for a weight"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def _draw_front(axes: Axes, runs: Sequence[Run]) -> None:
    axes.plot(*zip(*front(), strict=True), color=_FRONT, linewidth=1.2, marker="|", markersize=6, zorder=1)
    for weight in dict.fromkeys(run.weight for run in runs):
        a, b = max(front(), key=lambda point: weight * point[0] + (1 - weight) * point[1])
        axes.plot(a, b, marker="*", markersize=15, fillstyle="none", color=_COLORS[weight], zorder=2)
    for run in runs:
        color = _COLORS[run.weight]
        axes.plot(*zip(*run.path, strict=True), color=color, linewidth=0.7, alpha=0.45, zorder=3)
        axes.plot(*run.path[-1], marker="o", markersize=5, color=color, markeredgecolor="white", zorder=4)
    axes.set_xlim(0, 1.06)
    axes.set_ylim(0, 1.06)
    axes.set_aspect("equal")


def _draw_cosines(axes: Axes, runs: Sequence[Run]) -> None:
    for weight in dict.fromkeys(run.weight for run in runs):
        seeds = [run.cosines for run in runs if run.weight == weight]
        points = []
        for step, values in enumerate(zip(*seeds, strict=True)):
            known = [value for value in values if value is not None]
            points.append((step, sum(known) / len(known) if known else float("nan")))
        axes.plot(*zip(*points, strict=True), color=_COLORS[weight], linewidth=1.0)
    axes.axhline(0, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_ylim(-1.05, 1.05)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def main() -> None:
    """Parse, train, tabulate, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write figures, machine, versions and command here")
    parser.add_argument("--figure", type=Path, help="write the picture of fronts and cosines here, as PNG")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method and weight; default 1")
    parser.add_argument("--quick", action="store_true", help="one seed, three weights, 5 steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # matrices of 32 columns: a second thread costs more than it gives
    weights, num_seeds, steps = ((0.1, 0.5, 0.9), 1, 5) if arguments.quick else (WEIGHTS, arguments.seeds, STEPS)
    runs = [
        train(method, weight, seed=seed, steps=steps)
        for method in METHODS
        for weight in weights
        for seed in range(num_seeds)
    ]
    summaries = summarise(runs)
    print(table(summaries))
    if arguments.figure is not None:
        draw(runs, arguments.figure)
    if arguments.json is not None:
        document = {
            **circumstances("torch", "transformers", "matplotlib"),
            "results": [asdict(summary) for summary in summaries],
            "runs": [asdict(run) for run in runs],
        }
        write_results(arguments.json, document)


if __name__ == "__main__":
    main()
