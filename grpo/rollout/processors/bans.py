"""Processors that rule tokens out: their logits become -inf."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.rollout.processors.base import Prefix, chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class MinNewTokens:
    """No end token among the first `count` tokens."""

    count: int
    end_token_ids: tuple[int, ...]

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        """See the class."""
        is_early = (prefix.lengths < self.count)[:, None].expand(-1, len(self.end_token_ids))  # [N, E]
        ends = torch.tensor(self.end_token_ids, device=logits.device).expand_as(is_early)
        return _ruled_out(logits, ends, is_early)


@dataclass(frozen=True, slots=True, kw_only=True)
class BannedSequences:
    """No completion holds one of these token sequences: its last token is ruled out where the others came before it.

    As in vLLM, all of a sequence must lie in the completion; transformers' `bad_words_ids` also counts a beginning
    that lies at the end of the prompt.
    """

    sequences: tuple[tuple[int, ...], ...]
    """One at least, each of at least one token."""

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        """See the class."""
        lasts: list[Tensor] = []
        are_met: list[Tensor] = []
        for length in sorted({len(sequence) for sequence in self.sequences}):
            same = [sequence for sequence in self.sequences if len(sequence) == length]
            table = torch.tensor(same, device=logits.device)  # [S, length]
            is_met = (prefix.lengths >= length - 1)[:, None].expand(-1, len(same))  # [N, S]
            for back in range(1, length):
                is_met = is_met & (prefix.recent(back) == table[:, -1 - back])
            lasts.append(table[:, -1].expand_as(is_met))
            are_met.append(is_met)
        return _ruled_out(logits, torch.cat(lasts, dim=1), torch.cat(are_met, dim=1))


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
            is_repeat = is_repeat & (prefix.token_ids[:, start : start + num_windows] == prefix.recent(back))
        return _ruled_out(logits, prefix.token_ids[:, self.size - 1 :], is_repeat)


def _ruled_out(logits: Tensor, token_ids: Tensor, where: Tensor) -> Tensor:
    """[N, V] logits, -inf at those of token_ids [N, M] whose entry of where [N, M] is true."""
    return logits.index_put(chosen(token_ids, where, logits.shape[1]), logits.new_tensor(-torch.inf))
