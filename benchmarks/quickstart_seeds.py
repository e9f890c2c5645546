"""Does the quickstart learn both objectives, whatever the seed? Runs it once per seed and tabulates held-out scores.

    python benchmarks/quickstart_seeds.py --json benchmarks/results/quickstart_seeds.json \
        --figure benchmarks/results/quickstart.png

A run that is complete in --runs, under the same recipe, is read and not repeated. `--quick` takes two seeds and few
steps: it shows that the script works, not that anything is learned.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from results_file import circumstances, write_results

from grpo.diagnostics.plots import readme_figure
from grpo.metrics import read_metrics
from grpo.recipe_loader import load_recipe, load_run_config

QUICK = ["steps=2", "eval.num_prompts=8", "prompts.per_step=4", "rollout.group_size=4"]


def run_seed(seed: int, runs: Path, overrides: list[str]) -> Path:
    """Train the quickstart with a seed, unless its run is there already; returns the run directory."""
    run_dir = runs.absolute() / f"seed-{seed}"
    wanted = [f"seed={seed}", f"output_dir={run_dir}", *overrides]
    if (run_dir / "wall_s.json").exists():
        if load_run_config(run_dir) != load_recipe("quickstart", wanted):
            sys.exit(f"{run_dir} was made under another recipe; give another folder with --runs")
    else:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "grpo", "train", "quickstart", *wanted], check=True)
        (run_dir / "wall_s.json").write_text(json.dumps(time.perf_counter() - start))
    return run_dir


def figures(run_dir: Path, seed: int) -> dict[str, Any]:
    """Held-out scores of one run, and whether every objective's paired difference lies above 0."""
    evaluation = json.loads((run_dir / "eval.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    kl = {}
    for objective, settings in config["objectives"].items():
        name = f"kl/{objective}" + ("/penalty" if settings["beta"].get("observe") == "penalty" else "")
        last = [row[name] for row in rows[len(rows) // 2 :] if name in row]
        kl[objective] = sum(last) / len(last)
    return {
        "seed": seed,
        "before": evaluation["before"],
        "after": evaluation["after"],
        "difference": evaluation["difference"],
        "observed_kl_second_half": kl,
        "is_success": all(entry["low"] > 0 for entry in evaluation["difference"].values()),
        "kinds_not_worse": all(
            evaluation["after"][o]["kinds"][kind] >= evaluation["before"][o]["kinds"][kind]
            for o in evaluation["difference"]
            for kind in evaluation["before"][o]["kinds"]
        ),
        "step_s": sum(row["time/step_s"] for row in rows) / len(rows),
        "wall_s": json.loads((run_dir / "wall_s.json").read_text()),
        "peak_bytes": max(row["memory/peak_bytes"] for row in rows),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, one line a seed and objective."""
    lines = [
        "| seed | objective | before | after | difference [95%] | kinds before -> after |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        for objective, change in result["difference"].items():
            before, after = result["before"][objective], result["after"][objective]
            kinds = ", ".join(f"{k} {before['kinds'][k]:.2f} -> {after['kinds'][k]:.2f}" for k in before["kinds"])
            lines.append(
                f"| {result['seed']} | {objective} | {before['mean']:.2f} | {after['mean']:.2f} "
                f"| {change['mean']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}] | {kinds} |"
            )
    return "\n".join(lines)


def write_figure(run_dir: Path, target: Path) -> None:
    """The picture that the README opens with."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    evaluation = json.loads((run_dir / "eval.json").read_text())
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(readme_figure(read_metrics(run_dir / "metrics.jsonl"), config, evaluation))


def main() -> None:
    """Parse, run, tabulate. Exits 1 where fewer than 4 of 5 seeds improve every objective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write figures, machine, versions and command here")
    parser.add_argument("--figure", type=Path, help="write the first seed's run as a picture here")
    parser.add_argument("--quick", action="store_true", help="two seeds, two steps: a check of the script")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, help="where the runs go; runs/quickstart-seeds[-quick] by default")
    arguments = parser.parse_args()
    arguments.runs = arguments.runs or Path(f"runs/quickstart-seeds{'-quick' if arguments.quick else ''}")
    seeds = arguments.seeds[:2] if arguments.quick else arguments.seeds
    overrides = QUICK if arguments.quick else []
    results = [figures(run_seed(seed, arguments.runs, overrides), seed) for seed in seeds]
    print(table(results))
    successes = sum(result["is_success"] for result in results)
    kept = sum(result["kinds_not_worse"] for result in results)
    print(f"\n{successes} of {len(results)} seeds improve every objective (95% interval above 0)")
    print(f"{kept} of {len(results)} seeds make no kind of question worse")
    minutes = ", ".join(f"{result['wall_s'] / 60:.1f}" for result in results)
    print(f"wall time of a run: {minutes} minutes")
    if arguments.figure is not None:
        write_figure(arguments.runs.absolute() / f"seed-{seeds[0]}", arguments.figure)
    if arguments.json is not None:
        document = {
            **circumstances("torch", "transformers", "peft", device="auto"),
            "results": results,
        }
        write_results(arguments.json, document)
    if not arguments.quick and successes < 0.8 * len(results):
        sys.exit(1)


if __name__ == "__main__":
    main()
