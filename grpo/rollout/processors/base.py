"""What a logits processor is, and the text it looks at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from grpo.config.rollout import PenaltyScope


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """The text before each of N positions: a prompt, and what had been sampled after it. Right-padded.

    What lies behind a length counts nowhere. So a decode loop may hand over one buffer that it fills step by step, and
    replay whole completions, future tokens included.
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

    def recent(self, back: int) -> Tensor:
        """[N, 1] the token `back` >= 1 places before the position; any number where there is none."""
        if self.token_ids.shape[1] == 0:
            return self.lengths.new_full((len(self.lengths), 1), -1)
        return self.token_ids.gather(1, (self.lengths - back).clamp(min=0)[:, None])


class Processor(Protocol):
    """Changes raw logits before the temperature divides them.

    One's own is a class whose constructor takes the parameters of `rollout.processors` as keyword arguments. It must
    be a pure function of logits and prefix, row by row, keep no state between calls, and stay importable where the
    engine's workers run.
    """

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        """[N, V] float32 logits -> [N, V]; a new tensor, differentiable in the logits."""
        ...


def chosen(token_ids: Tensor, counts: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """rows [M] and tokens [M] of the entries of token_ids [N, L] that count [N, L] bool, repetitions included.

    Ids that the head has no logit of are left out: an embedding may be larger than the head. Changing logits at these
    places alone is one pass over [N, V]; masks and counts over the vocabulary would be one each.
    """
    rows, places = (counts & (token_ids < vocab_size)).nonzero(as_tuple=True)
    return rows, token_ids[rows, places]


def right_padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids [N, L] padded with 0, and lengths [N]."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
    width = max((len(sequence) for sequence in sequences), default=0)
    rows = [[*sequence, *[0] * (width - len(sequence))] for sequence in sequences]
    return torch.tensor(rows, dtype=torch.int64).view(len(sequences), width), lengths


def _within(token_ids: Tensor, lengths: Tensor) -> Tensor:
    """[N, L] bool: the first `lengths` [N] of each row."""
    return torch.arange(token_ids.shape[1], device=token_ids.device) < lengths[:, None]
