"""One point, timed or weighed: `python -m growth.work KIND SPEC.json` prints one JSON object. A process of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grpo.bench.probe import PeakMeter
from grpo.bench.stages import Stages
from grpo.recipe_loader import parse_recipe
from grpo.runtime.devices import choose_device
from grpo.update.logprobs import token_logprobs


def timed_step(spec: dict[str, Any]) -> dict[str, float]:
    """Fastest of so many updates and samplings, in seconds, after one of each."""
    folder = Path(spec["recipe"]["model"])
    config = parse_recipe(spec["recipe"], base_dir=folder.parent, source="a point of growth")
    stages = Stages(config, prompt_tokens=spec["prompt_tokens"])
    stages.load()
    stages.make_engine()
    stages.prepare()
    return {
        "update_s": fastest(stages.update, spec["repeats"], stages.device),
        "sampling_s": fastest(stages.sample, spec["repeats"], stages.device),
    }


def head(spec: dict[str, Any]) -> dict[str, float]:
    """A frozen head's log-probabilities, forward and backward: seconds, or bytes above what its inputs take."""
    device = choose_device("auto")
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, spec["dtype"])

    def made(rows: int) -> torch.Tensor:
        return torch.randn(rows, spec["hidden"], generator=generator, device=device).to(dtype)

    hidden, weight = made(spec["tokens"]), made(spec["vocabulary"]).mul_(0.1)
    targets = torch.randint(spec["vocabulary"], (spec["tokens"],), generator=generator, device=device)

    def run() -> None:
        logprobs, _ = token_logprobs(hidden.detach().requires_grad_(), weight, targets)
        logprobs.sum().backward()

    run()
    if not spec["weigh"]:
        return {"head_s": fastest(run, spec["repeats"], device)}
    meter = PeakMeter(device)
    meter("head", run)
    found = meter.peaks["head"]
    return {"head_bytes": found["host_bytes" if device.type == "cpu" else "device_bytes"] - found["before_bytes"]}


def fastest(do: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds."""
    taken: list[float] = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        do()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


if __name__ == "__main__":
    kinds = {"step": timed_step, "head": head}
    print(json.dumps(kinds[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))))
