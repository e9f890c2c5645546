"""Logits processors: pure, vectorised functions of the text before a position.

The same code shapes sampling (one position per row), replay (many positions of many rows at once) and vLLM (one row a
request), so that the trainer differentiates the law that was sampled from. Knows no engine and no model.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from grpo.config.rollout import PenaltyScope
from grpo.errors import ConfigError
from grpo.rollout.base import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """The text before each of N positions: a prompt, and what had been sampled after it. Right-padded.

    What lies behind a length is never looked at, but must be token ids. So a decode loop may hand over one buffer that
    it fills step by step, and replay whole completions, future tokens included.
    """

    prompt_ids: Tensor
    """[N, Lp] int64 prompt tokens; only the first `prompt_lengths` of a row are its prompt."""
    prompt_lengths: Tensor
    """[N] int64 tokens of the prompt."""
    token_ids: Tensor
    """[N, L] int64 completion tokens; only the first `lengths` of a row belong to its prefix."""
    lengths: Tensor
    """[N] int64 tokens sampled before the position."""

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        device: torch.device | str = "cpu",
    ) -> Prefix:
        """From N prompts and the tokens sampled after each. Raises ValueError where their numbers differ."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions")
        prompt_ids, prompt_lengths = right_padded(prompts)
        token_ids, lengths = right_padded(completions)
        return cls(
            prompt_ids=prompt_ids.to(device),
            prompt_lengths=prompt_lengths.to(device),
            token_ids=token_ids.to(device),
            lengths=lengths.to(device),
        )

    def parts(self, over: PenaltyScope) -> Iterator[tuple[Tensor, Tensor]]:
        """(token ids [N, L], which of them count [N, L] bool) of the completion, the prompt or both in turn."""
        if over != "completion":
            yield self.prompt_ids, _within(self.prompt_ids, self.prompt_lengths)
        if over != "prompt":
            yield self.token_ids, _within(self.token_ids, self.lengths)


class Processor(Protocol):
    """Changes raw logits before the temperature divides them.

    One's own is a class whose constructor takes the parameters of `rollout.processors` as keyword arguments. It must
    be a pure function of logits and prefix, row by row, keep no state between calls, and stay importable where the
    engine's workers run.
    """

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        """[N, V] float32 logits -> [N, V]; a new tensor, differentiable in the logits."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MinNewTokens:
    """No end token among the first `count` tokens."""

    count: int
    end_token_ids: tuple[int, ...]

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        """See the class."""
        is_end = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)  # [V]
        is_end[list(self.end_token_ids)] = True
        return logits.masked_fill((prefix.lengths < self.count)[:, None] & is_end, -torch.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class BannedSequences:
    """No completion holds one of these token sequences: its last token is ruled out where the others came before it.

    As in vLLM, all of a sequence must lie in the completion; transformers' `bad_words_ids` also counts a beginning
    that lies at the end of the prompt.
    """

    sequences: tuple[tuple[int, ...], ...]
    """Each of at least one token."""

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        """See the class."""
        banned = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)  # [N, V]
        for length in sorted({len(sequence) for sequence in self.sequences}):
            same = [sequence for sequence in self.sequences if len(sequence) == length]
            table = torch.tensor(same, device=logits.device)  # [S, length]
            is_met = (prefix.lengths >= length - 1)[:, None].expand(-1, len(same))  # [N, S]
            for back in range(1, length):
                is_met = is_met & (_recent(prefix, back) == table[:, -1 - back])
            banned = banned | marked(table[:, -1].expand_as(is_met), is_met, logits.shape[1])
        return logits.masked_fill(banned, -torch.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoRepeatNgram:
    """No `size` tokens in a row twice in a completion.

    The prompt does not count, other than in transformers' `no_repeat_ngram_size`: an answer may quote its question.
    """

    size: int

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        """See the class."""
        num_windows = prefix.token_ids.shape[1] - self.size + 1
        if num_windows <= 0:
            return logits.clone()
        ends = torch.arange(self.size, self.size + num_windows, device=logits.device)  # [W]
        is_repeat = ends <= prefix.lengths[:, None]  # [N, W] the n-gram lies in the prefix, its last token too
        for back in range(1, self.size):  # its tokens before the last are those before the position
            start = self.size - 1 - back
            is_repeat = is_repeat & (prefix.token_ids[:, start : start + num_windows] == _recent(prefix, back))
        return logits.masked_fill(marked(prefix.token_ids[:, self.size - 1 :], is_repeat, logits.shape[1]), -torch.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionPenalty:
    """The logit of a token that occurred is divided by `penalty` where positive, else multiplied by it.

    Source: Keskar et al. 2019, "CTRL" (arXiv:1909.05858), section 4.1, with the case of negative logits that
    transformers and vLLM added: dividing them would make the token likelier.
    """

    penalty: float
    over: PenaltyScope

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        """See the class."""
        has_occurred = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)  # [N, V]
        for token_ids, counts in prefix.parts(self.over):
            has_occurred = has_occurred | marked(token_ids, counts, logits.shape[1])
        # dense: gathering and scattering the tokens would count the gradient of one that occurred twice double
        penalised = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return torch.where(has_occurred, penalised, logits)


@dataclass(frozen=True, slots=True, kw_only=True)
class OccurrencePenalties:
    """Presence and frequency penalty, as OpenAI and vLLM define them (both over the completion).

    A token that occurred c > 0 times loses `presence + c * frequency`.
    """

    presence: float
    frequency: float
    over: PenaltyScope

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        """See the class."""
        times = torch.zeros_like(logits, requires_grad=False)  # [N, V]
        for token_ids, counts in prefix.parts(self.over):
            times.scatter_add_(1, token_ids, counts.to(times))
        return logits - self.frequency * times - self.presence * (times > 0)


def build_processors(params: SamplingParams) -> list[Processor]:
    """The processors that the sampling law asks for, in their one stated order.

    Bans (minimum of new tokens, banned sequences, n-grams), the repetition penalty, presence and frequency (the order
    of vLLM and, for the first two kinds, transformers), then one's own in the order of the recipe. After them come
    temperature, top-k, top-p and min-p, which are the engine's own.

    Raises:
        ConfigError: one's own cannot be loaded; see `load_processor`.
    """
    processors: list[Processor] = []
    if params.min_new_tokens > 0:
        processors.append(MinNewTokens(count=params.min_new_tokens, end_token_ids=params.end_token_ids))
    if params.banned:
        processors.append(BannedSequences(sequences=params.banned))
    if params.no_repeat_ngram > 0:
        processors.append(NoRepeatNgram(size=params.no_repeat_ngram))
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenalty(penalty=params.repetition_penalty, over=params.repetition_over))
    if params.presence_penalty or params.frequency_penalty:
        processors.append(
            OccurrencePenalties(
                presence=params.presence_penalty, frequency=params.frequency_penalty, over=params.penalties_over
            )
        )
    return [*processors, *(load_processor(path, parameters) for path, parameters in params.custom)]


@functools.lru_cache(maxsize=64)  # the updater asks for every micro-batch
def load_processor(path: str, parameters: str = "{}") -> Processor:
    """A processor of one's own, built once a process.

    Args:
        path: package.module:name of a class, or of a function that returns a processor.
        parameters: its keyword arguments, a JSON object.
    Raises:
        ConfigError: the path has another form, its module cannot be imported or holds no such name, the parameters
            are no JSON object or do not fit, or what is built cannot be called.
    """
    build = _named(path)
    arguments = _json_object(path, parameters)
    try:
        inspect.signature(build).bind(**arguments)
    except TypeError as exc:
        raise ConfigError(f"the parameters of processor {path!r} do not fit it: {exc}. Got {arguments}.") from exc
    except ValueError:  # some C callables have no signature
        pass
    try:
        processor = build(**arguments)
    except Exception as exc:  # whatever a constructor of the user's does
        raise ConfigError(f"processor {path!r} cannot be built from {arguments}: {type(exc).__name__}: {exc}") from exc
    if not callable(processor):
        raise ConfigError(
            f"processor {path!r} builds a {type(processor).__name__}, which cannot be called. Expected an object "
            "with __call__(logits [N, V], prefix) -> [N, V]."
        )
    return cast(Processor, processor)


def _named(path: str) -> Any:
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *name.split(".")]):
        raise ConfigError(f"the processor {path!r} is not of the form package.module:name.")
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as exc:  # whatever a module of the user's does when it is run
        raise ConfigError(
            f"the processor {path!r} cannot be loaded, for importing its module ends in {type(exc).__name__}: {exc}. "
            "Put the module beside the recipe, or install it."
        ) from exc
    for part in name.split("."):
        if not hasattr(target, part):
            raise ConfigError(f"the processor {path!r} cannot be loaded: {module_name} holds nothing named {name}.")
        target = getattr(target, part)
    if not callable(target):
        raise ConfigError(
            f"the processor {path!r} is a {type(target).__name__}; expected a class, or a function that returns a "
            "processor."
        )
    return target


def _json_object(path: str, text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except ValueError as exc:
        raise ConfigError(f"the parameters of processor {path!r} are no JSON: {exc}. Got {text!r}.") from exc
    if not isinstance(arguments, dict):
        raise ConfigError(f"the parameters of processor {path!r} must be a JSON object, got {text!r}.")
    return arguments


def marked(token_ids: Tensor, counts: Tensor, vocab_size: int) -> Tensor:
    """[N, V] bool: the tokens among token_ids [N, L] whose entry counts [N, L] bool."""
    # what does not count goes to a column that is cut off: no entry is written with two values, whatever the order
    flags = torch.zeros(len(token_ids), vocab_size + 1, dtype=torch.bool, device=token_ids.device)
    return flags.scatter_(1, token_ids.where(counts, vocab_size), True)[:, :vocab_size]


def right_padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids [N, L] padded with 0, and lengths [N]."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
    width = max((len(sequence) for sequence in sequences), default=0)
    rows = [[*sequence, *[0] * (width - len(sequence))] for sequence in sequences]
    return torch.tensor(rows, dtype=torch.int64).view(len(sequences), width), lengths


def _within(token_ids: Tensor, lengths: Tensor) -> Tensor:
    """[N, L] bool: the first `lengths` [N] of each row."""
    return torch.arange(token_ids.shape[1], device=token_ids.device) < lengths[:, None]


def _recent(prefix: Prefix, back: int) -> Tensor:
    """[N, 1] the token `back` places before the position; a token id without meaning where there is none, -1 where
    no row has any."""
    if prefix.token_ids.shape[1] == 0:
        return prefix.lengths.new_full((len(prefix.lengths), 1), -1)
    return prefix.token_ids.gather(1, (prefix.lengths - back).clamp(min=0)[:, None])
