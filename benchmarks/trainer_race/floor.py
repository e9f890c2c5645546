"""The least time that a step's matrix products take at the machine's own rate, to hold the stages against."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from trainer_race.task import MODEL, Case

from grpo.runtime.devices import choose_device, choose_dtype
from grpo.runtime.memory_model import ModelShape, read_shape

ROUNDS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Of products with the model's own weights; adapters, attention, norms and all else count nothing."""

    operations_per_s: float
    """Of a product as the update's largest, multiplications and additions."""
    rollout_s: float
    update_s: float


def floor_of(case: Case) -> Floor:
    """Prompts once, each sampled token once; the update's tokens through policy, reference and back to the inputs."""
    shape = read_shape(MODEL, base_dir=Path())
    rate = matrix_rate(shape, case.micro_batch_tokens)
    prompts, sampled = case.prompts * case.prompt_tokens, case.rows * case.new_tokens
    blocks, head = 2 * shape.linear_parameters, 2 * shape.head_parameters
    rollout = prompts * blocks + sampled * (blocks + head)
    # a completion's last token goes through no block; the head's logits, their derivative, and the reference's logits
    update = 3 * (prompts + sampled - case.rows) * blocks + 3 * sampled * head
    return Floor(operations_per_s=rate, rollout_s=rollout / rate, update_s=update / rate)


def matrix_rate(shape: ModelShape, rows: int) -> float:
    """Operations per second of [rows, hidden] @ [hidden, intermediate], the median of some rounds.

    Over as many weights and inputs as the model has blocks, so that they come from memory as they do in a pass.
    """
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    pairs = [
        (
            torch.randn(rows, shape.hidden).to(device, dtype),
            torch.randn(shape.hidden, shape.intermediate).to(device, dtype),
        )
        for _ in range(shape.layers)
    ]
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for left, right in pairs:
            _ = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * rows * shape.hidden * shape.intermediate * shape.layers / statistics.median(seconds[1:])
