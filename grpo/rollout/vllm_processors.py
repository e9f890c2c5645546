"""Our logits processors inside vLLM, as one V1 custom logits processor: vLLM's batch -> `Prefix` -> the same code.

Loaded by vLLM, in the trainer's process or in a server's: `--logits-processors` with `vllm_law.PROCESSOR`. Each
request carries its own law in its extra arguments; one without a law is left alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from vllm.config import VllmConfig  # pyright: ignore[reportMissingImports]
from vllm.sampling_params import (  # pyright: ignore[reportMissingImports]
    SamplingParams as VllmSamplingParams,
)
from vllm.v1.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
    BatchUpdate,
    LogitsProcessor,
    process_dict_updates,
)

from grpo.errors import ConfigError
from grpo.rollout.base import SamplingParams
from grpo.rollout.processors import Prefix, Processor, build_processors, right_padded
from grpo.rollout.replay import kept_tokens
from grpo.rollout.vllm_law import LAW_KEY, PROCESSORS_VARIABLE, law_of, needs_own_filters

_allowed = {path for path in os.environ.get(PROCESSORS_VARIABLE, "").split(",") if path}


def allow_custom(paths: Iterable[str]) -> None:
    """Let requests of this process name these processors (package.module:name)."""
    _allowed.update(paths)


class LawProcessor(LogitsProcessor):
    """Applies each row's law before vLLM's temperature; rows of one law at once."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        """As vLLM calls it."""
        self._device = device
        self._rows: dict[int, _Row] = {}
        self._groups: list[_Group] | None = None

    @classmethod
    def validate_params(cls, sampling_params: VllmSamplingParams) -> None:
        """Raises ValueError (over HTTP a 400) for a request whose law cannot be read or built."""
        text = _law_text(sampling_params)
        if text is not None:
            try:
                _law(text)
            except ConfigError as exc:
                raise ValueError(str(exc)) from exc

    def is_argmax_invariant(self) -> bool:
        """Penalties and bans change the likeliest token, so they hold for greedy rows too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow rows that came, left or moved."""
        if batch_update is not None:
            process_dict_updates(self._rows, batch_update, self._new_row)
            self._groups = None

    def apply(self, logits: Tensor) -> Tensor:
        """[B, V] float32 -> [B, V], in place."""
        if self._groups is None:
            self._groups = _grouped(self._rows, self._device)
        for group in self._groups:
            token_ids, lengths = right_padded(group.completions)
            prefix = Prefix(
                prompt_ids=group.prompt_ids,
                prompt_lengths=group.prompt_lengths,
                token_ids=token_ids.to(self._device),
                lengths=lengths.to(self._device),
            )
            # with asynchronous scheduling vLLM writes -1 for a token that it does not know yet
            assert all(not ids or ids[-1] >= 0 for ids in group.completions), "vLLM hides sampled tokens from the law"
            changed = logits[group.indices]  # [N, V]
            for processor in group.processors:
                changed = processor(changed, prefix)
            logits[group.indices] = changed
        return logits

    def _new_row(self, params: VllmSamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> _Row | None:
        text = _law_text(params)
        if text is None:
            return None
        prompt = torch.tensor(prompt_ids or [], dtype=torch.int64, device=self._device)
        return _Row(law=text, prompt_ids=prompt, output_ids=output_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One request of the batch."""

    law: str
    prompt_ids: Tensor
    """[Lp]"""
    output_ids: list[int]
    """vLLM's own list, which grows with every token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """The rows of one law."""

    processors: Sequence[Processor]
    indices: Tensor
    """[N] their places in the batch."""
    prompt_ids: Tensor
    """[N, Lp]"""
    prompt_lengths: Tensor
    """[N]"""
    completions: list[list[int]]
    """[N] vLLM's own lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filters:
    """The replay's kept set, for laws whose filters vLLM would apply in another order."""

    params: SamplingParams

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        return logits.masked_fill(~kept_tokens(logits / self.params.temperature, self.params), -torch.inf)


def _grouped(rows: dict[int, _Row], device: torch.device) -> list[_Group]:
    by_law: dict[str, list[int]] = {}
    for index, row in sorted(rows.items()):
        by_law.setdefault(row.law, []).append(index)
    return [
        _Group(
            processors=_law(text),
            indices=torch.tensor(indices, device=device),
            prompt_ids=pad_sequence([rows[index].prompt_ids for index in indices], batch_first=True),
            prompt_lengths=torch.tensor([len(rows[index].prompt_ids) for index in indices], device=device),
            completions=[rows[index].output_ids for index in indices],
        )
        for text, indices in by_law.items()
    ]


def _law_text(params: VllmSamplingParams) -> str | None:
    return (params.extra_args or {}).get(LAW_KEY)


@functools.lru_cache(maxsize=64)  # asked for every request
def _law(text: str) -> tuple[Processor, ...]:
    params = law_of(text)
    refused = [path for path, _ in params.custom if path not in _allowed]
    if refused:
        raise ConfigError(
            f"the processor {refused[0]!r} is not among those that requests may name here. Name it in the server's "
            f"environment: {PROCESSORS_VARIABLE}={refused[0]}"
        )
    own_filters = [_Filters(params=params)] if needs_own_filters(params) else []
    return (*build_processors(params), *own_filters)
