"""How do time and memory of a step grow with K, with the prompt's and the completions' length, with the vocabulary?

    python benchmarks/cost_growth.py --json benchmarks/results/cost_growth.json \\
        --figure benchmarks/results/cost_growth.png

One prompt with K = 8 completions of 64 tokens, and from there K = 4 to 32, prompts of 60 to 2,000 tokens, completions
of 32 to 512, a vocabulary of 49,152 or 151,936; a Llama of random weights (6 layers of width 256) with LoRA. Each point
takes the run's own sampling and update (reference pass, forward, backward, AdamW), in a process of its own for its
times (fastest of 7) and in another for its peaks, less what was held before the stage. The whole step is one
micro-batch, but for "micro-batches", whose budget is 600 tokens. The head alone: 1,024 tokens, four vocabularies.

A cost's growth is the slope of the straight line through the logarithms: 1 is linear. Exits 1 where one is outside of
what is expected. `--limit-s` takes it in parts: what the JSON file holds is not measured again. `--quick` takes small
sizes and checks no growth.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from growth.drawing import draw
from growth.fits import fit_table, fits_of, misses
from growth.points import HEAD_TOKENS, HEADS, MODEL, POINT, SERIES, Point
from results_file import circumstances, held_figures, write_results

from grpo.bench.memory import ALLOCATOR, model_folder, probed
from grpo.runtime.devices import choose_device
from grpo.runtime.torch_environment import torch_environment

REPEATS = 7
QUICK = (replace(POINT, group_size=2, completion_tokens=8, vocabulary=512),)
QUICK_HEADS = (4096, 8192)


def step_figures(point: Point, place: Path, *, device: str, dtype: str) -> dict[str, float]:
    """Seconds, and bytes above what was held before, of sampling and update."""
    case = point.case(dtype)
    stages = probed(case, place, device=device)["stages"]
    kind = "host_bytes" if device == "cpu" else "device_bytes"
    spec = {
        "recipe": case.recipe(model_folder(case, place), device=device),
        "prompt_tokens": point.prompt_tokens,
        "repeats": REPEATS,
    }
    return {
        **work("step", spec, place),
        **{f"{stage}_bytes": stages[stage][kind] - stages[stage]["before_bytes"] for stage in ("update", "sampling")},
    }


def head_figures(vocabulary: int, place: Path, *, dtype: str, tokens: int) -> dict[str, float]:
    """Seconds and bytes of a frozen head's forward and backward pass."""
    spec = {
        "vocabulary": vocabulary,
        "tokens": tokens,
        "hidden": MODEL["hidden_size"],
        "dtype": dtype,
        "repeats": REPEATS,
    }
    return work("head", {**spec, "weigh": False}, place) | work("head", {**spec, "weigh": True}, place)


def work(kind: str, spec: dict[str, Any], place: Path) -> dict[str, float]:
    """What `growth.work` answers, from a process of its own."""
    path = place / "work.json"
    path.write_text(json.dumps(spec))
    environment = {**os.environ, **(ALLOCATOR if spec.get("weigh") else {})}
    command = [sys.executable, "-m", "growth.work", kind, str(path)]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def due(document: dict[str, Any], place: Path, *, is_quick: bool) -> Iterator[Callable[[], None]]:
    """What the document lacks yet, one measurement at a time; each puts its figures into it."""
    device, dtype = choose_device("auto").type, document["machine"]["dtype"]
    points = QUICK if is_quick else list(dict.fromkeys(p for series in SERIES.values() for p in series.points))
    for point in points:

        def measure_step(point: Point = point) -> None:
            document["points"][point.name] = step_figures(point, place, device=device, dtype=dtype)

        if point.name not in document["points"]:
            yield measure_step
    tokens = 64 if is_quick else HEAD_TOKENS
    for vocabulary in QUICK_HEADS if is_quick else HEADS:

        def measure_head(vocabulary: int = vocabulary) -> None:
            document["heads"][str(vocabulary)] = head_figures(vocabulary, place, dtype=dtype, tokens=tokens)

        if str(vocabulary) not in document["heads"]:
            yield measure_head


def opened(path: Path | None) -> dict[str, Any]:
    """The document to go on with. Exits where the file's figures are of another machine or other versions."""
    begun: dict[str, Any] = {
        **circumstances("torch", "transformers", "peft", device="auto"),
        "model": MODEL,
        "points": {},
        "heads": {},
    }
    held = held_figures(path, begun, "machine", "versions", "model")
    return {**begun, "points": held["points"], "heads": held["heads"]}


def main() -> None:
    """Parse, measure, tabulate, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write figures, machine, versions and command here")
    parser.add_argument("--figure", type=Path, help="write the picture here, as PNG")
    parser.add_argument("--quick", action="store_true", help="small sizes: a check of the script")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="begin nothing after so many seconds")
    arguments = parser.parse_args()
    os.environ.update(torch_environment(os.environ))
    document = opened(arguments.json)
    end, is_done = time.monotonic() + arguments.limit_s, True
    with tempfile.TemporaryDirectory() as place:
        for measure in due(document, Path(place), is_quick=arguments.quick):
            if time.monotonic() > end:
                is_done = False
                break
            measure()
            if arguments.json is not None:
                write_results(arguments.json, document)
    fits = list(fits_of(document))
    print(fit_table(fits))
    if arguments.figure is not None:
        draw(fits, arguments.figure)
    problems = [] if arguments.quick else misses(fits)
    if not is_done:
        problems.append("stopped at --limit-s; the same command goes on")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
