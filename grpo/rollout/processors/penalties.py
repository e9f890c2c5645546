"""Processors that make tokens less likely, or likelier, for having occurred."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.config.rollout import PenaltyScope
from grpo.rollout.processors.base import Prefix, chosen


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
        rows, tokens, _ = _occurred(prefix, self.over, logits.shape[1])
        values = logits[rows, tokens]  # [M]
        penalised = torch.where(values > 0, values / self.penalty, values * self.penalty)
        return logits.index_put((rows, tokens), penalised)


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
        rows, tokens, times = _occurred(prefix, self.over, logits.shape[1])
        penalised = logits[rows, tokens] - self.frequency * times.to(logits.dtype) - self.presence  # [M]
        return logits.index_put((rows, tokens), penalised)


def _occurred(prefix: Prefix, over: PenaltyScope, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """rows [M], tokens [M], times [M]: every token that occurred, once a row, and how often it did."""
    found = [chosen(token_ids, counts, vocab_size) for token_ids, counts in prefix.parts(over)]
    every = torch.cat([rows * vocab_size + tokens for rows, tokens in found])  # [E] places in [N, V] laid flat
    # each token once: twice in the list, it would get its gradient twice
    places, times = torch.unique(every, return_counts=True)
    return places // vocab_size, places % vocab_size, times
