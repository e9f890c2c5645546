"""An optimizer step of a small Llama with LoRA and two objectives: `sum` against `pcgrad`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from update_cost.groups import END, random_groups
from update_cost.measuring import Result, peak_of, synchronise, times_of

from grpo.batching import TrainBatch, build_batch
from grpo.config import FullTrainable, GradientsConfig, LoraTrainable, OptimConfig, UpdateConfig
from grpo.rollout.base import SamplingParams
from grpo.runtime.devices import choose_device, choose_dtype
from grpo.runtime.policy import Policy
from grpo.update.beta import FixedBeta
from grpo.update.gradients import GradientWindow
from grpo.update.step import Updater

OBJECTIVES = ("a", "b")
PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSizes:
    """How large the small Llama is, and how often it steps."""

    vocabulary: int = 49_152
    layers: int = 6
    completion_tokens: int = 48
    repeats: int = 9


QUICK = GradientSizes(vocabulary=1024, layers=2, completion_tokens=16, repeats=6)


class TimedWindow(GradientWindow):
    """Knows how long its backward passes took."""

    seconds = 0.0

    def add(self, loss: Tensor, *, objective: int | None = None, keep_graph: bool = False) -> None:
        """As the window does."""
        synchronise()
        start = time.perf_counter()
        super().add(loss, objective=objective, keep_graph=keep_graph)
        synchronise()
        self.seconds += time.perf_counter() - start


def step_pass(method: str, sizes: GradientSizes) -> Callable[[], TimedWindow]:
    """An optimizer step of a small Llama with LoRA under two objectives; returns the window with its time."""
    updater = small_updater(sizes, LoraTrainable(rank=16, alpha=32), method=method)
    batch = two_objectives(sizes)

    def run() -> TimedWindow:
        window = TimedWindow(updater.policy.trainable_parameters())
        updater.gradients = window
        updater.step(batch)
        return window

    return run


def small_updater(sizes: GradientSizes, trainable: LoraTrainable | FullTrainable, *, method: str = "sum") -> Updater:
    """Of a small Llama under two objectives; the same bits each time."""
    device = choose_device("auto")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=sizes.layers,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    # transformers wraps its own, and hides its types
    nn.Module.to(model, device=device, dtype=choose_dtype("auto", device))
    return Updater(
        Policy(model, trainable, seed=0),
        {name: FixedBeta(value=0.02) for name in OBJECTIVES},
        observed=dict.fromkeys(OBJECTIVES, "k3"),
        params=SamplingParams(end_token_ids=(END,), max_new_tokens=sizes.completion_tokens),
        update=UpdateConfig(gradients=GradientsConfig.model_validate({"method": method})),
        optim=OptimConfig(learning_rate=1e-4),
    )


def two_objectives(sizes: GradientSizes) -> TrainBatch:
    """4 groups of 8 completions, in micro-batches of 2 groups."""
    groups = random_groups(
        4,
        prompt_tokens=PROMPT_TOKENS,
        completion_tokens=sizes.completion_tokens,
        vocabulary=sizes.vocabulary,
        objectives=OBJECTIVES,
    )
    return build_batch(
        groups,
        dict.fromkeys(OBJECTIVES, 1.0),
        combine="decoupled",
        scale="group",
        micro_batch_tokens=2 * (PROMPT_TOKENS + 8 * sizes.completion_tokens),
        max_new_tokens=sizes.completion_tokens,
    )


def measure_gradients(sizes: GradientSizes) -> list[Result]:
    """A step under each method."""
    peaks = {method: peak_of(partial(step_pass, method, sizes)) for method in ("sum", "pcgrad")}
    results = []
    for case, taken in times_of({method: step_pass(method, sizes) for method in peaks}, sizes.repeats).items():
        seconds, window = min(taken, key=lambda pair: pair[0])
        assert isinstance(window, TimedWindow)
        results.append(
            Result(
                part="gradients",
                case=case,
                vocabulary=sizes.vocabulary,
                min_s=seconds,
                median_s=statistics.median(s for s, _ in taken),
                peak_bytes=peaks[case],
                backward_s=window.seconds,
            )
        )
    return results


def gradients_table(results: Sequence[Result]) -> str:
    """Markdown: a step under each method over one under `sum`."""
    base = results[0]
    lines = [
        "| method | step (min) | step (median) | backward passes | the rest of the step | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    assert base.backward_s is not None
    for result in results:
        assert result.backward_s is not None
        rest = (result.min_s - result.backward_s) / (base.min_s - base.backward_s)
        lines.append(
            f"| {result.case} | {result.min_s / base.min_s:.2f} | {result.median_s / base.median_s:.2f} "
            f"| {result.backward_s / base.backward_s:.2f} | {rest:.2f} | {result.peak_bytes / base.peak_bytes:.2f} |"
        )
    return "\n".join(lines)
