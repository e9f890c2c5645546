"""Processors that make tokens less likely, or likelier, for having occurred."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.config.rollout import PenaltyScope
from grpo.rollout.processors.base import Prefix, marked, occurrences


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
        parts = [occurrences(token_ids, counts, logits.shape[1]) for token_ids, counts in prefix.parts(self.over)]
        times = (parts[0] if len(parts) == 1 else parts[0] + parts[1]).to(logits.dtype)  # [N, V]
        return logits - self.frequency * times - self.presence * (times > 0)
