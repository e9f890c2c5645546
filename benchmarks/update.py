"""What do an update's log-probabilities, and its gradients taken objective by objective, cost in time and memory?

    python benchmarks/update.py --json benchmarks/results/update.json

head: forward and backward of log-probabilities and entropy from hidden states [N, 576] and a head [V, 576], for
V = 49,152 and 151,936; memory with N = 4096, time with N = 1024. Ours, materialised logits in plain torch, TRL's
function over materialised logits, and the chunked one that TRL's GRPOTrainer calls. gradients: an optimizer step of a
small Llama with LoRA and two objectives, `sum` against `pcgrad`.

Peak memory is taken first, one process a case (on a CPU a process's peak never falls), less what was there before the
pass; time afterwards, all cases in turn in one process, so that a slow moment of the machine meets them all. Needs some
10 GiB of memory for the materialised logits; `--quick` is small and takes seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import selective_log_softmax_and_entropy

from grpo.batching import TrainBatch, build_batch
from grpo.config import GradientsConfig, LoraTrainable, OptimConfig, UpdateConfig
from grpo.rollout.base import SamplingParams
from grpo.runtime.devices import choose_device, has_native_bfloat16, peak_memory_bytes
from grpo.runtime.policy import Policy
from grpo.types import Completion, Message, Prompt, RolloutGroup, ScoredGroup, Verdict
from grpo.update.beta import FixedBeta
from grpo.update.gradients import GradientWindow
from grpo.update.logprobs import token_logprobs
from grpo.update.step import Updater

HIDDEN = 576
TRL_VOCABULARY_CHUNK = 32_768  # TRL 1.16's own
ROWS = 8
"""TRL's functions take [B, T]: the tokens are laid out as so many completions."""
OBJECTIVES = ("a", "b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large a run is."""

    tokens: int
    """Of the passes whose memory is taken."""
    timed_tokens: int
    """Of those that are timed, many times over."""
    vocabularies: tuple[int, ...]
    repeats: int
    step_vocabulary: int
    step_layers: int
    completion_tokens: int


FULL = Sizes(
    tokens=4096,
    timed_tokens=1024,
    vocabularies=(49_152, 151_936),
    repeats=3,
    step_vocabulary=49_152,
    step_layers=6,
    completion_tokens=48,
)
QUICK = Sizes(
    tokens=256,
    timed_tokens=256,
    vocabularies=(4096,),
    repeats=2,
    step_vocabulary=1024,
    step_layers=2,
    completion_tokens=16,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One case."""

    part: str
    case: str
    vocabulary: int
    min_s: float
    """Fastest repeat."""
    median_s: float
    peak_bytes: int
    """Above what was held before the pass."""
    backward_s: float | None = None
    """Gradients only: of the fastest repeat, the time in backward passes."""


def head_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it."""
    return torch.bfloat16 if has_native_bfloat16(device) else torch.float32


HeadValues = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(hidden [N, H], head [V, H], targets [N]) -> (logprobs [N], entropy [N])."""


def materialised(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """All logits at once; frees what it can before the entropy."""
    law = torch.log_softmax((hidden @ head.T).float(), dim=-1)  # [N, V]
    with torch.no_grad():
        entropy = -(law.exp() * law).sum(dim=-1)
    return law.gather(1, targets[:, None])[:, 0], entropy


def trl_materialised(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's function over logits [B, T, V]; in their own dtype, as TRL leaves them."""
    logits = (hidden @ head.T).view(ROWS, -1, len(head))
    logprobs, entropy = selective_log_softmax_and_entropy(logits, targets.view(ROWS, -1), entropy_requires_grad=False)
    return logprobs.flatten(), entropy.flatten()


def trl_chunked(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What GRPOTrainer's fused head calls: tiles of 4096 tokens by 32,768 of the vocabulary."""
    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, head, None, targets, 1.0, TRL_VOCABULARY_CHUNK, None, 1.0, ("entropy",)
    )
    return logprobs, entropy


HEADS: dict[str, HeadValues] = {
    "ours": token_logprobs,
    "materialised": materialised,
    "TRL, materialised": trl_materialised,
    "TRL, chunked": trl_chunked,
}
HEAD_CASES = [f"{name}, {kind} head" for kind in ("frozen", "trainable") for name in HEADS]


def head_pass(case: str, vocabulary: int, tokens: int) -> Callable[[], None]:
    """Forward and backward of one case, on inputs that exist already."""
    name, kind = case.rsplit(", ", 1)
    device = choose_device("auto")
    generator = torch.Generator(device).manual_seed(0)
    made = partial(torch.randn, generator=generator, device=device, dtype=head_dtype(device))
    hidden = made(tokens, HIDDEN)
    head = made(vocabulary, HIDDEN).mul_(0.1)  # logits of some 2.4 either way
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    upstream = torch.linspace(-1, 1, tokens, device=device)

    def run() -> None:
        states, weight = hidden.detach().requires_grad_(), head.detach().requires_grad_(kind == "trainable head")
        logprobs, _ = HEADS[name](states, weight, targets)
        logprobs.backward(upstream.to(logprobs.dtype))

    return run


class TimedWindow(GradientWindow):
    """Knows how long its backward passes took."""

    seconds = 0.0

    def add(self, loss: Tensor, *, objective: int | None = None, keep_graph: bool = False) -> None:
        """As the window does."""
        _synchronise()
        start = time.perf_counter()
        super().add(loss, objective=objective, keep_graph=keep_graph)
        _synchronise()
        self.seconds += time.perf_counter() - start


def step_pass(method: str, sizes: Sizes) -> Callable[[], TimedWindow]:
    """An optimizer step of a small Llama with LoRA under two objectives; returns the window with its time."""
    device = choose_device("auto")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.step_vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=sizes.step_layers,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    nn.Module.to(model, device=device, dtype=head_dtype(device))  # transformers wraps its own, and hides its types
    policy = Policy(model, LoraTrainable(rank=16, alpha=32), seed=0)
    updater = Updater(
        policy,
        {name: FixedBeta(value=0.02) for name in OBJECTIVES},
        observed=dict.fromkeys(OBJECTIVES, "k3"),
        params=SamplingParams(end_token_ids=(2,), max_new_tokens=sizes.completion_tokens),
        update=UpdateConfig(gradients=GradientsConfig.model_validate({"method": method})),
        optim=OptimConfig(learning_rate=1e-4),
    )
    batch = two_objectives(sizes)

    def run() -> TimedWindow:
        window = TimedWindow(policy.trainable_parameters())
        updater.gradients = window
        updater.step(batch)
        return window

    return run


def two_objectives(sizes: Sizes) -> TrainBatch:
    """4 groups of 8 completions of random tokens, in micro-batches of 2 groups, scored at random."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for number in range(4):
        prompt = Prompt(id=str(number), messages=(Message(role="user", content=""),), objectives=OBJECTIVES)

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(torch.randint(3, sizes.step_vocabulary, (count,), generator=generator).tolist())

        completions = tuple(
            Completion(
                token_ids=(*tokens(sizes.completion_tokens - 1), 2),
                text="",
                sampler_logprobs=(-1.0,) * sizes.completion_tokens,
                finish_reason="stop",
            )
            for _ in range(8)
        )
        scores = torch.rand(8, len(OBJECTIVES), generator=generator).tolist()
        verdicts = tuple(
            {name: Verdict(value=score, parts={}) for name, score in zip(OBJECTIVES, row, strict=True)}
            for row in scores
        )
        rollout = RolloutGroup(prompt=prompt, prompt_token_ids=tokens(16), completions=completions)
        groups.append(ScoredGroup(rollout=rollout, verdicts=verdicts))
    return build_batch(
        groups,
        dict.fromkeys(OBJECTIVES, 1.0),
        combine="decoupled",
        scale="group",
        micro_batch_tokens=2 * (16 + 8 * sizes.completion_tokens),
        max_new_tokens=sizes.completion_tokens,
    )


def peak_of(make: Callable[[], Callable[[], object]]) -> int:
    """Peak memory of a pass above what is held before it, in bytes, in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "trl.trainer.utils", "grpo.update.step"])  # imported once, not per case
    with ProcessPoolExecutor(1, mp_context=context) as alone:
        return alone.submit(_peak, make).result()


def _peak(make: Callable[[], Callable[[], object]]) -> int:
    run, device = make(), choose_device("auto")
    before = peak_memory_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    run()
    return peak_memory_bytes(device) - before


def times_of(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[tuple[float, object]]]:
    """Case -> (seconds, what it returned) of each repeat, all cases in turn; one round before is not counted."""
    taken: dict[str, list[tuple[float, object]]] = {case: [] for case in runs}
    for number in range(repeats + 1):
        for case, run in runs.items():
            _synchronise()
            start = time.perf_counter()
            returned = run()
            _synchronise()
            if number > 0:
                taken[case].append((time.perf_counter() - start, returned))
    return taken


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_head(sizes: Sizes, vocabulary: int, peaks: Mapping[str, int]) -> list[Result]:
    """Every head case at one size of vocabulary. Args: peaks: case -> bytes."""
    runs = {case: head_pass(case, vocabulary, sizes.timed_tokens) for case in HEAD_CASES}
    return [
        Result(
            part="head",
            case=case,
            vocabulary=vocabulary,
            min_s=min(s for s, _ in taken),
            median_s=statistics.median(s for s, _ in taken),
            peak_bytes=peaks[case],
        )
        for case, taken in times_of(runs, sizes.repeats).items()
    ]


def measure_gradients(sizes: Sizes, peaks: Mapping[str, int]) -> list[Result]:
    """A step under each method. Args: peaks: method -> bytes."""
    results = []
    for case, taken in times_of({method: step_pass(method, sizes) for method in peaks}, 3 * sizes.repeats).items():
        seconds, window = min(taken, key=lambda pair: pair[0])
        assert isinstance(window, TimedWindow)
        results.append(
            Result(
                part="gradients",
                case=case,
                vocabulary=sizes.step_vocabulary,
                min_s=seconds,
                median_s=statistics.median(s for s, _ in taken),
                peak_bytes=peaks[case],
                backward_s=window.seconds,
            )
        )
    return results


def head_table(results: Sequence[Result]) -> str:
    """Markdown: time and memory of each case, over those of materialised logits with the same kind of head."""
    lines = ["| vocabulary | case | time (min) | time (median) | peak memory |", "|---|---|---|---|---|"]
    for result in results:
        base = _of(results, f"materialised, {result.case.rsplit(', ', 1)[1]}", result.vocabulary)
        lines.append(
            f"| {result.vocabulary:,} | {result.case} | {result.min_s / base.min_s:.2f} "
            f"| {result.median_s / base.median_s:.2f} | {result.peak_bytes / base.peak_bytes:.3f} |"
        )
    return "\n".join(lines)


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


def _of(results: Sequence[Result], case: str, vocabulary: int) -> Result:
    return next(result for result in results if (result.case, result.vocabulary) == (case, vocabulary))


def misses(results: Sequence[Result]) -> list[str]:
    """Targets of the head that do not hold: an eighth of the memory; no slower frozen, 1.4 times trainable."""
    complaints = []
    for result in results:
        if not result.case.startswith("ours"):
            continue
        kind = result.case.rsplit(", ", 1)[1]
        base = _of(results, f"materialised, {kind}", result.vocabulary)
        memory, duration = result.peak_bytes / base.peak_bytes, result.median_s / base.median_s
        if memory > 1 / 8:
            complaints.append(f"{result.case}, V = {result.vocabulary}: {memory:.3f} of the memory, not 0.125")
        if duration > (limit := 1.0 if kind == "frozen head" else 1.4):
            complaints.append(f"{result.case}, V = {result.vocabulary}: {duration:.2f} times the time, not {limit}")
    return complaints


def main() -> None:
    """Parse, run, tabulate. Exits 1 where a target of the head is missed, but under --quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write figures, machine, versions and command here")
    parser.add_argument("--quick", action="store_true", help="small sizes: a check of the script")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    # memory first, while this process holds next to none itself
    head_peaks = {
        vocabulary: {case: peak_of(partial(head_pass, case, vocabulary, sizes.tokens)) for case in HEAD_CASES}
        for vocabulary in sizes.vocabularies
    }
    step_peaks = {method: peak_of(partial(step_pass, method, sizes)) for method in ("sum", "pcgrad")}
    gradients = measure_gradients(sizes, step_peaks)
    head = [result for vocabulary, peaks in head_peaks.items() for result in measure_head(sizes, vocabulary, peaks)]
    print(
        f"Time of {sizes.timed_tokens} tokens and peak memory of {sizes.tokens}, relative to materialised logits with"
    )
    print("the same kind of head:\n")
    print(head_table(head))
    print("\nStep of a small Llama with LoRA, two objectives, relative to sum:\n")
    print(gradients_table(gradients))
    if arguments.json is not None:
        device = choose_device("auto")
        document = {
            "command": " ".join(["python", *sys.argv]),
            "machine": {
                "platform": platform.platform(),
                "machine": platform.machine(),
                "cores": os.cpu_count(),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "dtype": str(head_dtype(device)),
            },
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("grpo-toolkit", "torch", "transformers", "trl", "peft")},
            "sizes": asdict(sizes) | {"hidden": HIDDEN},
            "results": [asdict(result) for result in (*head, *gradients)],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if not arguments.quick and (complaints := misses(head)):
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
