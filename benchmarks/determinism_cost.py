"""What does `determinism: strict` cost an update?

    python benchmarks/determinism_cost.py --json benchmarks/results/determinism_cost.json

Optimizer steps of a small Llama (6 layers, hidden size 192, 49,152 tokens) on 4 groups of 8 completions, with an
adapter and with all weights: strict and default in turn, so that a slow moment meets both. Two copies of the
model take the same steps, one under each setting, and are compared bit for bit at the end. Exits 1 where two copies
under `strict` differ. `--quick` takes a smaller model and fewer steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from results_file import circumstances, write_results
from update_cost.gradients import QUICK, GradientSizes, small_updater, two_objectives
from update_cost.measuring import synchronise

from grpo.config import FullTrainable, LoraTrainable
from grpo.runtime.determinism import determinism

Kind = Literal["default", "strict"]
TRAINABLE = {"adapter": LoraTrainable(rank=16, alpha=32), "all weights": FullTrainable(type="full")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Steps under both settings."""

    trained: str
    """"adapter" or "all weights"."""
    steps: int
    """Timed ones, of each."""
    default_s: float
    """Median of a step."""
    strict_s: float
    """Median of a step."""
    min_ratio: float
    """Fastest strict step over fastest default one."""
    default_repeats: bool
    """Whether two copies end with the same bits under the default."""
    strict_repeats: bool
    """Whether they do under strict."""
    same_bits: bool
    """Whether strict and default end with the same bits."""

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return self.strict_s / self.default_s


def measure(trained: str, sizes: GradientSizes) -> Cost:
    """Steps of two copies under each setting, all four in turn; the first of each is not timed."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    batch = two_objectives(sizes)
    copies = {(kind, copy): small_updater(sizes, TRAINABLE[trained]) for kind in kinds for copy in (0, 1)}
    taken: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    for number in range(sizes.repeats + 1):
        for kind, copy in (*copies,) if number % 2 else reversed(copies):
            with determinism(kind):
                synchronise()
                begun = time.perf_counter()
                copies[kind, copy].step(batch)
                synchronise()
            if number:
                taken[kind].append(time.perf_counter() - begun)
    weights = {key: updater.policy.trainable_parameters() for key, updater in copies.items()}

    def are_same(one: tuple[Kind, int], other: tuple[Kind, int]) -> bool:
        return all(torch.equal(weight, weights[other][name]) for name, weight in weights[one].items())

    return Cost(
        trained=trained,
        steps=len(taken["strict"]),
        default_s=statistics.median(taken["default"]),
        strict_s=statistics.median(taken["strict"]),
        min_ratio=min(taken["strict"]) / min(taken["default"]),
        default_repeats=are_same(("default", 0), ("default", 1)),
        strict_repeats=are_same(("strict", 0), ("strict", 1)),
        same_bits=are_same(("default", 0), ("strict", 0)),
    )


def table(costs: list[Cost]) -> str:
    """Markdown: a row for each set of trained weights."""
    lines = [
        "| trained | step, default | step, strict | strict / default (fastest steps) | default repeats itself "
        "| strict repeats itself | same bits |",
        "|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        cells = [f"{cost.default_s:.3f} s", f"{cost.strict_s:.3f} s", f"{cost.ratio:.2f} ({cost.min_ratio:.2f})"]
        cells += ["yes" if one else "no" for one in (cost.default_repeats, cost.strict_repeats, cost.same_bits)]
        lines.append(f"| {cost.trained} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write figures, machine, versions and command here")
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer steps: a check of the script")
    options = parser.parse_args()
    sizes = QUICK if options.quick else GradientSizes()
    costs = [measure(trained, sizes) for trained in TRAINABLE]
    print(table(costs))
    if options.json:
        document: dict[str, Any] = {
            **circumstances("torch", "transformers", "peft", device="auto"),
            "sizes": asdict(sizes),
            "results": [asdict(cost) | {"ratio": cost.ratio} for cost in costs],
        }
        write_results(options.json, document)
    return 0 if all(cost.strict_repeats for cost in costs) else 1


if __name__ == "__main__":
    sys.exit(main())
