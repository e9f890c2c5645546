"""The sampling law again, for teacher forcing: all positions of all rows at once (FORMULAS 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.rollout.base import SamplingParams
from grpo.rollout.processors import Prefix, build_processors


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedPrompts:
    """The prompts of the replayed completions, each once."""

    token_ids: Tensor
    """[G, Lp] right-padded with token ids."""
    lengths: Tensor
    """[G]"""
    of_row: Tensor
    """[B] which of the G prompts a completion answers."""


class Replay:
    """Turns raw logits at N completion positions into those that the engine sampled from, up to the temperature.

    `process(logits [C, V], positions [C])` fits `grpo.update.logprobs.token_logprobs`. The set that a filter keeps
    carries no gradient and always contains the sampled token; how often that had to be forced is counted.
    """

    def __init__(
        self,
        params: SamplingParams,
        token_ids: Tensor,
        rows: Tensor,
        offsets: Tensor,
        *,
        prompts: ReplayedPrompts | None = None,
        remembers: bool = False,
    ) -> None:
        """Place the law over completions.

        Args:
            token_ids: [B, T] completions, right-padded with token ids.
            rows, offsets: [N] position n is token offsets[n] of row rows[n].
            prompts: what the completions answer; None only for a law whose logits depend on no text.
            remembers: the kept sets of the first pass hold in all later ones, under other weights too; costs V / 8
                bytes a position.
        Raises:
            ValueError: the law looks at the text, and there are no prompts.
        """
        self._params = params
        self._token_ids, self._rows, self._offsets = token_ids, rows, offsets
        self._processors = build_processors(params)
        if self._processors and prompts is None:
            raise ValueError("a law with penalties, bans or processors of one's own is replayed with its prompts")
        self._prompts = prompts
        self._remembers = remembers
        self._remembered: Tensor | None = None
        """[N, V / 8] uint8, the kept sets of the positions that `_is_known`, 8 tokens a byte; None before the first."""
        self._is_known = torch.zeros(len(rows), dtype=torch.bool, device=token_ids.device)  # [N]
        self._missed = torch.zeros(token_ids.shape, dtype=torch.bool, device=token_ids.device)  # [B, T]

    @property
    def changes_logits(self) -> bool:
        """Whether the law differs from logits / temperature at all."""
        return bool(self._processors) or self._has_filters

    @property
    def num_forced(self) -> int:
        """Positions so far whose sampled token the filter would have dropped (a rounding difference of the engine)."""
        return int(self._missed.sum())

    def take_over(self, other: Replay, positions: Tensor) -> None:
        """Remember what another one does of its positions [N], which are this one's."""
        if other._remembered is not None:
            self._remembered, self._is_known = other._remembered[positions], other._is_known[positions]

    @property
    def _has_filters(self) -> bool:
        return self._params.top_p < 1 or self._params.top_k > 0 or self._params.min_p > 0

    def process(self, logits: Tensor, positions: Tensor) -> Tensor:
        """[C, V] raw logits at `positions` [C] of the N -> [C, V], dropped tokens at -inf."""
        rows, offsets = self._rows[positions], self._offsets[positions]  # [C]
        if self._prompts is not None and self._processors:
            logits = self._processed(logits, self._prompts, rows, offsets)
        if not self._has_filters:
            return logits
        return logits.masked_fill(~self._kept(logits.detach(), positions), -torch.inf)

    def _processed(self, logits: Tensor, prompts: ReplayedPrompts, rows: Tensor, offsets: Tensor) -> Tensor:
        """[C, V] after the processors. Each position has its row's whole text, C * (Lp + T) token ids: little beside
        its C * V logits, and so nothing is kept from chunk to chunk."""
        of_row = prompts.of_row[rows]  # [C]
        prefix = Prefix(
            prompt_ids=prompts.token_ids[of_row],
            prompt_lengths=prompts.lengths[of_row],
            token_ids=self._token_ids[rows],
            lengths=offsets,
        )
        for processor in self._processors:
            logits = processor(logits, prefix)
        return logits

    def _kept(self, logits: Tensor, positions: Tensor) -> Tensor:
        """[C, V] bool: what the filters keep, and the sampled token."""
        if self._remembered is not None and bool(self._is_known[positions].all()):
            return _unpacked(self._remembered[positions], logits.shape[1])
        rows, offsets = self._rows[positions], self._offsets[positions]  # [C]
        sampled = self._token_ids[rows, offsets][:, None]  # [C, 1]
        kept = kept_tokens(logits / self._params.temperature, self._params)  # [C, V]
        # a checkpointed chunk runs again in the backward pass: marking a place twice counts it once
        self._missed[rows, offsets] |= ~kept.gather(1, sampled)[:, 0]
        kept = kept.scatter(1, sampled, True)
        if self._remembers:
            packed = _packed(kept)
            if self._remembered is None:
                self._remembered = packed.new_zeros(len(self._rows), packed.shape[1])
            self._remembered[positions] = packed
            self._is_known[positions] = True
        return kept


_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def _packed(flags: Tensor) -> Tensor:
    """[C, V] bool -> [C, V / 8] uint8."""
    whole = torch.nn.functional.pad(flags, (0, -flags.shape[1] % 8)).unflatten(1, (-1, 8))  # [C, V / 8, 8]
    return (whole * torch.tensor(_BITS, dtype=torch.uint8, device=flags.device)).sum(dim=-1, dtype=torch.uint8)


def _unpacked(packed: Tensor, width: int) -> Tensor:
    """[C, V / 8] uint8 -> [C, V] bool."""
    bits = torch.tensor(_BITS, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] & bits) != 0).flatten(1)[:, :width]


def kept_tokens(scaled: Tensor, params: SamplingParams) -> Tensor:
    """[C, V] bool: what top-k, then top-p, then min-p keep of logits that the temperature has divided already.

    The order is transformers': a token stays while the mass of the more likely ones, renormalised over what top-k
    left, is below top_p. Where top-p cuts through tokens that tie, those with the higher ids stay, as in the engine's
    own drawing. min-p compares with the likeliest token, so what the other two dropped does not matter to it.
    """
    kept = torch.ones_like(scaled, dtype=torch.bool)
    if params.top_k > 0:
        k = min(params.top_k, scaled.shape[-1])
        kept = scaled >= scaled.topk(k, dim=-1).values[:, -1:]
    if params.top_p < 1:
        left = scaled.masked_fill(~kept, -torch.inf)
        ascending, order = left.sort(dim=-1, stable=True)
        cumulative = ascending.softmax(dim=-1).cumsum(dim=-1)
        drop = cumulative <= 1 - params.top_p
        drop[:, -1:] = False
        kept = kept & ~drop.scatter(1, order, drop)
    if params.min_p > 0:
        probabilities = scaled.masked_fill(~kept, -torch.inf).softmax(dim=-1)
        kept = kept & (probabilities >= params.min_p * probabilities.amax(dim=-1, keepdim=True))
    return kept
