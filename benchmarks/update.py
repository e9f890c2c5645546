"""What does an update cost in time and memory: its log-probabilities, its gradients, the whole step against TRL's?

    python benchmarks/update.py --json benchmarks/results/update.json

head: forward and backward of log-probabilities and entropy from hidden states [N, 576] and a head [V, 576], for
V = 49,152 and 151,936; memory with N = 4096, time with N = 1024. Ours, materialised logits in plain torch, TRL's
function over materialised logits, and the chunked one that TRL's GRPOTrainer calls. gradients: an optimizer step of a
small Llama with LoRA and two objectives, `sum` against `pcgrad`. agreement: the gradient of the whole update of the
packaged 135M model, against that of TRL's GRPOTrainer on the same completions. step-60, step-600: its time and memory,
after prompts of so many tokens. `--parts` runs some of these.

Peak memory is taken first, one process a case (on a CPU a process's peak never falls), less what was there before the
pass; time afterwards, all cases in turn in one process, so that a slow moment of the machine meets them all. Needs some
10 GiB of memory for the materialised logits and 20 for the long prompts; `--quick` takes some two minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from results_file import circumstances, write_results
from update_cost import gradients, head, whole_step


def run_head(quick: bool) -> tuple[dict[str, Any], list[str]]:
    """Prints a table. Returns the part's figures, and the targets that it misses; none of them where quick."""
    sizes = head.QUICK if quick else head.HeadSizes()
    results = head.measure_head(sizes)
    print(
        f"Time of {sizes.timed_tokens} tokens and peak memory of {sizes.tokens}, relative to materialised logits with"
    )
    print(f"the same kind of head:\n\n{head.head_table(results)}\n", flush=True)
    figures = {"sizes": asdict(sizes) | {"hidden": head.HIDDEN}, "results": [asdict(result) for result in results]}
    return figures, [] if quick else head.misses(results)


def run_gradients(quick: bool) -> tuple[dict[str, Any], list[str]]:
    """As `run_head`; there is no target."""
    sizes = gradients.QUICK if quick else gradients.GradientSizes()
    results = gradients.measure_gradients(sizes)
    print(
        f"Step of a small Llama with LoRA, two objectives, relative to sum:\n\n{gradients.gradients_table(results)}\n"
    )
    return {"sizes": asdict(sizes), "results": [asdict(result) for result in results]}, []


def run_agreement(quick: bool) -> tuple[dict[str, Any], list[str]]:
    """As `run_head`; the target is one gradient in float32, without which costs cannot be compared."""
    agreements = whole_step.measure_agreement()
    print(f"Gradients of the whole update, against TRL's in float32:\n\n{whole_step.agreement_table(agreements)}\n")
    return {"results": [asdict(entry) for entry in agreements]}, whole_step.disagreements(agreements)


def run_step(prompt_tokens: int, quick: bool) -> tuple[dict[str, Any], list[str]]:
    """As `run_head`; there is no target."""
    sizes = whole_step.SIZES[prompt_tokens]
    sizes = replace(sizes, repeats=1, cases=("ours", "TRL")) if quick else sizes
    results = whole_step.measure_steps(sizes)
    print(f"The whole update after prompts of {prompt_tokens} tokens, relative to ours:\n")
    print(f"{whole_step.step_table(results)}\n", flush=True)
    fixed = {"completion_tokens": whole_step.COMPLETION_TOKENS, "beta": whole_step.BETA, "rank": whole_step.LORA.rank}
    return {"sizes": asdict(sizes) | fixed, "results": [asdict(result) for result in results]}, []


PARTS: dict[str, Callable[[bool], tuple[dict[str, Any], list[str]]]] = {
    "head": run_head,
    "gradients": run_gradients,
    "agreement": run_agreement,
    "step-60": partial(run_step, 60),
    "step-600": partial(run_step, 600),
}


def main() -> None:
    """Parse, run, tabulate. Exits 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write figures, machine, versions and command here")
    parser.add_argument("--quick", action="store_true", help="small sizes: a check of the script")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure")
    arguments = parser.parse_args()
    document: dict[str, Any] = {
        **circumstances("torch", "transformers", "trl", "peft", device="auto"),
    }
    complaints: list[str] = []
    for part in arguments.parts:
        document[part], missed = PARTS[part](arguments.quick)
        complaints += missed
    if arguments.json is not None:
        write_results(arguments.json, document)
    if complaints:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
