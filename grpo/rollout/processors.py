"""Logits processors: pure, vectorised functions of the completion's prefix.

The same code shapes sampling (one position per row) and replay (every position of a row at once), so that the trainer
differentiates the law that was sampled from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from grpo.rollout.base import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """What had been sampled before each of N positions."""

    token_ids: Tensor
    """[N, L] completion tokens; only the first `lengths` of a row belong to its prefix."""
    lengths: Tensor
    """[N] tokens sampled before the position."""

    def mask(self) -> Tensor:
        """[N, L] bool: which entries belong to the prefix."""
        return torch.arange(self.token_ids.shape[1], device=self.token_ids.device) < self.lengths[:, None]


class Processor(Protocol):
    """Changes raw logits before the temperature divides them."""

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        """[N, V] float32 logits -> [N, V]; a new tensor, differentiable in the logits."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionPenalties:
    """Presence and frequency penalty over the completion's own tokens, as OpenAI and vLLM define them.

    A token that occurred c > 0 times loses `presence + c * frequency`.
    """

    presence: float
    frequency: float

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        """See the class."""
        counts = torch.zeros_like(logits)  # [N, V]
        counts.scatter_add_(1, prefix.token_ids, prefix.mask().to(counts))
        return logits - self.frequency * counts - self.presence * (counts > 0)


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


def build_processors(params: SamplingParams) -> list[Processor]:
    """The processors that the sampling law asks for, in their one stated order: bans, then penalties."""
    processors: list[Processor] = []
    if params.min_new_tokens > 0:
        processors.append(MinNewTokens(count=params.min_new_tokens, end_token_ids=params.end_token_ids))
    if params.presence_penalty or params.frequency_penalty:
        processors.append(RepetitionPenalties(presence=params.presence_penalty, frequency=params.frequency_penalty))
    return processors
