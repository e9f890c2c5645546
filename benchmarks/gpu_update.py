"""On a GPU: does a 7B recipe train within 40 GiB as `grpo plan` says, and how near is the update to the card's rate?

    python benchmarks/gpu_update.py --json benchmarks/results/gpu_update.json

Shapes of 1.5B and 7B parameters (Qwen2's sizes, random weights) with LoRA of rank 16 in bfloat16, K = 8, prompts and
completions of 512 tokens, 2 prompts a step. torch may take 40 GiB of the card (`--limit-gib`), which stands in for an
A100-40G; the micro-batches are the largest that the plan lets into that. Each shape takes some steps in a process of
its own: peaks by phase as torch counts them, beside the plan's.

The update's rate counts the arithmetic that the step needs, once: forward and backward of the policy, forward of the
reference, the head at completion tokens alone, each prompt once a group. It is set beside the card's rate of a large
bfloat16 product, measured here.

Exits 1 where a phase's prediction is off by more than 5 %, a micro-batch had to be halved, or the update runs at less
than 45 % of the card's rate. The 7B model's files take 15 GB of the temporary folder. `--quick` takes a tiny shape, on
a CPU too, and checks no target: a check of the script.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from results_file import circumstances, write_results

from grpo.bench.cases import MemoryCase
from grpo.bench.memory import STAGES_OF, predict, probed
from grpo.config import LoraTrainable
from grpo.runtime.devices import choose_device
from grpo.runtime.memory_hardware import GIB
from grpo.runtime.memory_model import ModelShape, shape_of

QWEN2: dict[str, Any] = {"model_type": "qwen2", "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": {
        **QWEN2,
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7B": {
        **QWEN2,
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
TINY = {
    **QWEN2,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
LORA = LoraTrainable(rank=16)
CASE = MemoryCase(
    name="7B", dtype="bfloat16", trainable=LORA.model_dump(), prompts=2, prompt_tokens=512, max_new_tokens=512
)
STEPS = 6
MOST_ERROR = 0.05
LEAST_RATE = 0.45


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One shape."""

    name: str
    parameters: int
    micro_batch_tokens: int
    peaks: dict[str, int]
    """Phase -> bytes above the process without a model."""
    predicted: dict[str, int]
    halvings: int
    """Times that a micro-batch was halved for want of memory."""
    update_s: float
    """Median of the steps but the first."""
    flops: int
    """Of one update."""
    matrix_rate: float
    """Operations a second of a large bfloat16 product."""

    @property
    def rate(self) -> float:
        """The update's share of the matrix rate."""
        return self.flops / self.update_s / self.matrix_rate

    def errors(self) -> dict[str, float]:
        """Phase -> of the prediction; above 0 it was too much."""
        return {phase: self.predicted[phase] / peak - 1 for phase, peak in self.peaks.items()}


def update_flops(case: MemoryCase, shape: ModelShape) -> int:
    """Operations that one update with LoRA on all linear layers needs: policy forward, its gradient by activations and
    by the adapters, reference forward. A multiplication and an addition are two; nothing is counted twice."""
    own = case.prompts * case.group_size * case.max_new_tokens
    tokens = case.prompts * case.prompt_tokens + own - case.prompts * case.group_size  # last ones predict nothing
    frozen = tokens * shape.linear_parameters + own * shape.head_parameters
    ends = sum(linear.inputs + linear.outputs for linear in shape.linears)
    adapters = tokens * shape.layers * ends * LORA.rank
    prompt, length = case.prompt_tokens, case.max_new_tokens - 1
    per_completion = length * prompt + length * (length + 1) // 2
    pairs = case.prompts * (prompt * (prompt + 1) // 2 + case.group_size * per_completion)
    attention = 2 * pairs * shape.query_size * shape.layers  # scores, and the values' sum
    return 2 * ((2 + 1) * frozen + 3 * adapters + (3 + 1) * attention)


def matrix_rate(device: torch.device, *, size: int) -> float:
    """Operations a second of a bfloat16 product of squares, the fastest of ten."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    fastest = float("inf")
    for _ in range(12):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def fitted(case: MemoryCase, *, device: str, device_bytes: int) -> MemoryCase:
    """With the largest micro-batches that the plan lets into so much memory; all of a step where they fit.

    Exits where the plan says that none fits.
    """
    limit = predict(case, device=device, device_bytes=device_bytes).limits[0]
    if limit.largest is None:
        sys.exit(f"{case.name}: no micro-batch fits {device_bytes / GIB:.1f} GiB, says the plan")
    return replace(case, micro_batch_tokens=limit.largest)


def measure(case: MemoryCase, *, device: str, limit_bytes: int | None, rate: float, place: Path) -> Result:
    """One shape in a process of its own."""
    if limit_bytes is not None:
        case = fitted(case, device=device, device_bytes=limit_bytes)
    answer = probed(case, place, device=device, steps=STEPS, device_limit_bytes=limit_bytes)
    kind = "host_bytes" if device == "cpu" else "device_bytes"
    shape = shape_of({**case.model, "dtype": case.dtype}, source=case.name)
    found = predict(case, device=device)
    return Result(
        name=case.name,
        parameters=shape.parameters,
        micro_batch_tokens=found.micro_batch_tokens,
        peaks={name: max(answer["stages"][stage][kind] for stage in stages) for name, stages in STAGES_OF.items()},
        predicted={phase.name: phase.peak_bytes for phase in found.phases},
        halvings=answer["halvings"],
        update_s=statistics.median(answer["seconds"]["update"][1:]),
        flops=update_flops(case, shape),
        matrix_rate=rate,
    )


def table(result: Result) -> str:
    """Markdown: its phases, then its update."""
    lines = [
        f"{result.name}: {result.parameters / 1e9:.2f} billion parameters, micro-batches of "
        f"{result.micro_batch_tokens} tokens",
        "",
        "| phase | measured | predicted | error |",
        "|---|---|---|---|",
    ]
    for phase, error in result.errors().items():
        measured, predicted = (sizes[phase] / GIB for sizes in (result.peaks, result.predicted))
        lines.append(f"| {phase} | {measured:.2f} GiB | {predicted:.2f} GiB | {error:+.1%} |")
    lines += [
        "",
        f"update {result.update_s:.2f} s, {result.flops / result.update_s / 1e12:.1f} TFLOP/s, {result.rate:.0%} of "
        f"the {result.matrix_rate / 1e12:.1f} of a large product",
        "",
    ]
    return "\n".join(lines)


def misses(result: Result) -> list[str]:
    """Targets that do not hold."""
    found = [
        f"{result.name}: {phase} was predicted {error:+.1%} off; the target is {MOST_ERROR:.0%}"
        for phase, error in result.errors().items()
        if abs(error) > MOST_ERROR
    ]
    if result.halvings:
        found.append(f"{result.name}: micro-batches that the plan lets in were halved {result.halvings} times")
    if result.rate < LEAST_RATE:
        found.append(f"{result.name}: the update is at {result.rate:.0%} of the card; the target is {LEAST_RATE:.0%}")
    return found


def as_json(result: Result) -> dict[str, Any]:
    """With what follows from it."""
    fields = {name: getattr(result, name) for name in Result.__dataclass_fields__}
    return {**fields, "errors": result.errors(), "rate": result.rate}


def main() -> None:
    """Parse, measure, tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write figures, machine, versions and command here")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, no targets: a check of the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu for --quick alone")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="what to measure")
    parser.add_argument("--limit-gib", type=float, default=40.0, help="what torch may take of the card")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("--device cpu is a check of the script: add --quick")
    device = choose_device(arguments.device)
    rate = matrix_rate(device, size=512 if arguments.quick else 8192)
    torch.cuda.empty_cache()
    cases = [replace(CASE, name=name, model=SHAPES[name]) for name in arguments.shapes]
    if arguments.quick:
        cases = [replace(CASE, name="tiny", model=TINY, prompt_tokens=16, max_new_tokens=8)]
    limit_bytes = None if device.type == "cpu" else int(arguments.limit_gib * GIB)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as place:
        for case in cases:
            results.append(
                measure(case, device=arguments.device, limit_bytes=limit_bytes, rate=rate, place=Path(place))
            )
            print(table(results[-1]), flush=True)
    if arguments.json is not None:
        document = {
            **circumstances("torch", "transformers", "peft", device=arguments.device, dtype=CASE.dtype),
            "limit_bytes": limit_bytes,
            "shapes": [as_json(result) for result in results],
        }
        write_results(arguments.json, document)
    problems = [] if arguments.quick else [problem for result in results for problem in misses(result)]
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
