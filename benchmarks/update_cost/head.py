"""The head alone: log-probabilities and entropy from hidden states, forward and backward."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import selective_log_softmax_and_entropy
from update_cost.measuring import Result, peak_of, times_of

from grpo.runtime.devices import choose_device, choose_dtype
from grpo.update.logprobs import token_logprobs

HIDDEN = 576
TRL_VOCABULARY_CHUNK = 32_768  # TRL 1.16's own
ROWS = 8
"""TRL's functions take [B, T]: the tokens are laid out as so many completions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSizes:
    """How large the passes are, and how often they run."""

    tokens: int = 4096
    """Of the passes whose memory is taken."""
    timed_tokens: int = 1024
    """Of those that are timed, many times over."""
    vocabularies: tuple[int, ...] = (49_152, 151_936)
    repeats: int = 3


QUICK = HeadSizes(tokens=256, timed_tokens=256, vocabularies=(4096,), repeats=2)

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
    made = partial(torch.randn, generator=generator, device=device, dtype=choose_dtype("auto", device))
    hidden = made(tokens, HIDDEN)
    head = made(vocabulary, HIDDEN).mul_(0.1)  # logits of some 2.4 either way
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    upstream = torch.linspace(-1, 1, tokens, device=device)

    def run() -> None:
        states, weight = hidden.detach().requires_grad_(), head.detach().requires_grad_(kind == "trainable head")
        logprobs, _ = HEADS[name](states, weight, targets)
        logprobs.backward(upstream.to(logprobs.dtype))

    return run


def measure_head(sizes: HeadSizes) -> list[Result]:
    """Every case at every size of vocabulary; memory first, while this process holds next to none itself."""
    peaks = {
        vocabulary: {case: peak_of(partial(head_pass, case, vocabulary, sizes.tokens)) for case in HEAD_CASES}
        for vocabulary in sizes.vocabularies
    }
    return [result for vocabulary in sizes.vocabularies for result in _timed(sizes, vocabulary, peaks[vocabulary])]


def _timed(sizes: HeadSizes, vocabulary: int, peaks: Mapping[str, int]) -> list[Result]:
    """Args: peaks: case -> bytes."""
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
