"""How fast does a whole training run go beside TRL's GRPOTrainer, in how much memory, and does it learn as much?

    python benchmarks/vs_trl.py --json benchmarks/results/vs_trl.json

The packaged 135M model with LoRA (rank 16), K = 8 completions of at most 32 tokens for each of 8 prompts a step,
prompts of 60 and of 600 tokens, dapo, beta 0.04, temperature 1, one optimizer step a batch. The reward is one function,
called as TRL calls it on both sides: the share of digits in the answer. The two take their steps in turn, each in a
process of its own.

TRL runs at what is best for it here: weights in bfloat16 where the machine is fast at it, under a float32 adapter, its
own chunked log-probabilities, no gradient checkpointing (its default, which saves memory for time: `--checkpointing`
adds it as a third run), sampling for the whole step at once, micro-batches of one group (of 8 rows, its default). Ours
hold four groups.

Exits 1 where a target is missed: tokens/s at least 6 times TRL's after 60 tokens and 12 times after 600, half the peak
memory, and a reward that is not worse after the same number of steps. `--cases` runs a part, which joins what the JSON
file holds; `--quick` is a check of the script, without targets.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from results_file import circumstances, command, held_figures, write_results
from trainer_race.pacing import RunFigures, Train, race
from trainer_race.task import MODEL, Case, make_prompts

from grpo.runtime.torch_environment import torch_environment

CASES = {60: Case(prompt_tokens=60, steps=12), 600: Case(prompt_tokens=600, steps=4)}
TARGETS = {60: 6.0, 600: 12.0}
MOST_MEMORY = 0.5


def ours() -> Train:
    """Imports it."""
    from trainer_race import ours

    return ours.train


def trl() -> Train:
    """Imports it."""
    from trainer_race import theirs

    return theirs.train


def trl_checkpointing() -> Train:
    """Imports it."""
    from trainer_race import theirs

    return partial(theirs.train, checkpoints=True)


def figures_of(run: RunFigures) -> dict[str, Any]:
    """Medians over the steps but the first, seconds; tokens/s of completions; the reward's mean in each step."""
    counted = run.steps[1:]
    step_s = statistics.median(step.step_s for step in counted)
    return {
        "step_s": step_s,
        "rollout_s": statistics.median(step.rollout_s for step in counted),
        "scoring_s": statistics.median(step.scoring_s for step in counted),
        "update_s": statistics.median(step.update_s for step in counted),
        "tokens_per_s": statistics.median(step.tokens for step in counted) / step_s,
        "peak_bytes": run.peak_bytes,
        "reward": [step.reward for step in run.steps],
    }


def last_reward(figures: dict[str, Any]) -> float:
    """Mean of the last third of the steps."""
    rewards = figures["reward"]
    return statistics.fmean(rewards[-max(len(rewards) // 3, 1) :])


def measure(case: Case, trainers: dict[str, Callable[[], Train]]) -> dict[str, Any]:
    """One case, all trainers in turn."""
    from trainer_race.floor import floor_of

    from grpo.runtime.models import load_tokenizer

    runs = race(trainers, case, make_prompts(case, load_tokenizer(MODEL, base_dir=Path())))
    figures = {name: figures_of(run) for name, run in runs.items()}
    return {
        "prompt_tokens": case.prompt_tokens,
        "group_size": case.group_size,
        "prompts": case.prompts,
        "new_tokens": case.new_tokens,
        "steps": case.steps,
        **figures,
        "floor": asdict(floor_of(case)),
        "speedup": figures["ours"]["tokens_per_s"] / figures["trl"]["tokens_per_s"],
        "memory_ratio": figures["ours"]["peak_bytes"] / figures["trl"]["peak_bytes"],
    }


def table(cases: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| prompt | trainer | step | sampling | scoring | update | tokens/s | peak memory | reward, first -> last |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        for name in ("ours", "trl", "trl_checkpointing"):
            if name in case:
                one = case[name]
                lines.append(
                    f"| {case['prompt_tokens']} | {name} | {one['step_s']:.1f} s | {one['rollout_s']:.1f} s "
                    f"| {one['scoring_s']:.2f} s | {one['update_s']:.1f} s | {one['tokens_per_s']:.0f} "
                    f"| {one['peak_bytes'] / 2**30:.2f} GiB | {one['reward'][0]:.3f} -> {last_reward(one):.3f} |"
                )
        if floor := case.get("floor"):
            lines.append(
                f"| {case['prompt_tokens']} | the products alone, at {floor['operations_per_s'] / 1e9:.0f} GFLOP/s | "
                f"| {floor['rollout_s']:.1f} s | | {floor['update_s']:.1f} s | | | |"
            )
        lines.append(
            f"| {case['prompt_tokens']} | **ours over trl** | | | | | **{case['speedup']:.1f}x** "
            f"| **{case['memory_ratio']:.2f}x** | |"
        )
    return "\n".join(lines)


def misses(case: dict[str, Any]) -> list[str]:
    """Targets that a case does not reach."""
    prompt = case["prompt_tokens"]
    missed = []
    if case["speedup"] < TARGETS[prompt]:
        missed.append(f"{prompt} tokens: {case['speedup']:.2f} times TRL's tokens/s; the target is {TARGETS[prompt]:g}")
    if case["memory_ratio"] > MOST_MEMORY:
        missed.append(f"{prompt} tokens: {case['memory_ratio']:.2f} of TRL's memory; the target is {MOST_MEMORY:g}")
    if last_reward(case["ours"]) < 0.8 * last_reward(case["trl"]):  # two runs of one seed: chance has its part
        missed.append(f"{prompt} tokens: our reward ends at {last_reward(case['ours']):.3f}, below TRL's")
    return missed


def main() -> None:
    """Parse, run, tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write figures, machine, versions and command here")
    parser.add_argument("--quick", action="store_true", help="small sizes: a check of the script")
    parser.add_argument("--cases", nargs="+", type=int, choices=list(CASES), default=list(CASES), help="prompt tokens")
    parser.add_argument("--checkpointing", action="store_true", help="TRL with gradient checkpointing too")
    parser.add_argument("--steps", type=int, help="of each run, in place of the cases' own")
    arguments = parser.parse_args()
    os.environ.update(torch_environment(os.environ))
    trainers: dict[str, Callable[[], Train]] = {"ours": ours, "trl": trl}
    if arguments.checkpointing:
        trainers["trl_checkpointing"] = trl_checkpointing
    begun = {**circumstances("torch", "transformers", "trl", "peft", device="auto"), "cases": []}
    document = begun | {"cases": held_figures(arguments.json, begun, "machine", "versions")["cases"]}
    known: dict[int, dict[str, Any]] = {case["prompt_tokens"]: case for case in document["cases"]}
    for prompt_tokens in arguments.cases:
        case = CASES[prompt_tokens]
        if arguments.steps:
            case = replace(case, steps=arguments.steps)
        if arguments.quick:
            case = replace(case, prompts=2, group_size=2, new_tokens=4, steps=2)
        known[prompt_tokens] = measure(case, trainers) | {"command": command()}
        document["cases"] = [known[tokens] for tokens in sorted(known)]
        print(f"{table(document['cases'])}\n", flush=True)
        if arguments.json is not None:
            write_results(arguments.json, document)
    complaints = [line for tokens in arguments.cases for line in misses(known[tokens])]
    if complaints and not arguments.quick:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
