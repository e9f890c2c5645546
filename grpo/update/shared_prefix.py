"""Last hidden states that predict each completion token, with every prompt computed once for its K completions.

The prompts go through the model first and leave their keys and values, with gradient, in a cache; the completions then
read them from there. The arithmetic is that of whole rows, and so is the gradient; a model whose cache is not plain
keys and values is given whole rows instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from grpo.batching import MicroBatch
from grpo.runtime.image_inputs import prompt_inputs
from grpo.update.activations import attention_of

PLAIN_ATTENTION_SCORES = 32 * 2**20
"""Attention scores of one layer that may be held whole on a CPU: 128 MiB in float32, kept for the backward pass."""


def predicting_states(model: PreTrainedModel, batch: MicroBatch, *, shares: bool | None = None) -> Tensor:
    """[B, T, H] the hidden state before each completion token; arbitrary where the completion mask is 0.

    Args:
        shares: compute a prompt once for its completions; None: where the model's cache allows it.
    """
    shares = can_share_prompts(model) if shares is None else shares
    with _fastest_attention(model, batch):
        return _shared(model, batch) if shares else whole_row_states(model, batch)


@contextlib.contextmanager
def _fastest_attention(model: PreTrainedModel, batch: MicroBatch) -> Iterator[None]:
    """On a CPU, short rows take plain attention: the fused kernel's backward pass is several times slower there."""
    rows, columns = batch.completion_ids.shape[0], batch.completion_ids.shape[1]
    heads = getattr(model.config.get_text_config(), "num_attention_heads", 1)
    scores = rows * heads * columns * (batch.prompt_ids.shape[1] + columns)
    is_short = batch.completion_ids.device.type == "cpu" and scores <= PLAIN_ATTENTION_SCORES and batch.images is None
    with attention_of(model, "eager" if is_short and model.config._attn_implementation == "sdpa" else None):
        yield


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether the model keeps plain keys and values for every layer: no sliding window, no recurrent state."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


class PromptLayer(DynamicLayer):
    """One layer's keys and values of G prompts, kept from their own pass.

    A block may be computed a second time, for its gradient; what is kept stays that of the first.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What the prompts attend to: themselves. Args: key_states, value_states: [G, heads, T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        return key_states, value_states


class RowsLayer(DynamicLayer):
    """The same layer for B rows that follow the prompts. Reading it changes nothing, however often a block is computed;
    each layer's prompts are written out for their rows when it is read, not all layers' at once."""

    def __init__(self, prompts: PromptLayer, prompt_of_row: Tensor) -> None:
        """Args: prompts: after their pass; prompt_of_row: [B]."""
        super().__init__()
        assert prompts.keys is not None
        self.keys, self.values, self.is_initialized = prompts.keys, prompts.values, True
        self._prompt_of_row = prompt_of_row

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What the rows attend to. Args: key_states, value_states: [B, heads, T, D] of their own tokens."""
        assert self.keys is not None
        assert self.values is not None
        keys = torch.cat([self.keys[self._prompt_of_row], key_states], dim=-2)
        return keys, torch.cat([self.values[self._prompt_of_row], value_states], dim=-2)


def _shared(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    given = prompt_inputs(model, batch.prompt_ids, batch.prompt_mask, batch.images)
    prompts = [PromptLayer() for _ in DynamicCache(config=model.config).layers]
    prompt_states = model.base_model(
        input_ids=batch.prompt_ids,
        attention_mask=batch.prompt_mask,
        position_ids=given.position_ids,
        **given.images,
        past_key_values=Cache(layers=[*prompts]),
        use_cache=True,
    ).last_hidden_state  # [G, T_prompt, H]
    lengths = batch.prompt_mask.sum(dim=1)  # [G]
    groups = torch.arange(len(lengths), device=lengths.device)
    first = prompt_states[groups, lengths - 1][batch.prompt_of_row][:, None]  # [B, 1, H] predicts the first token
    if batch.completion_ids.shape[1] == 1:
        return first
    read = batch.completion_mask[:, :-1].long()  # the last token predicts nothing
    rest = model.base_model(
        input_ids=batch.completion_ids[:, :-1],
        attention_mask=torch.cat([batch.prompt_mask[batch.prompt_of_row], read], dim=1),
        position_ids=given.next_position[batch.prompt_of_row][:, None]
        + torch.arange(read.shape[1], device=read.device),
        past_key_values=Cache(layers=[RowsLayer(layer, batch.prompt_of_row) for layer in prompts]),
        use_cache=True,
    ).last_hidden_state  # [B, T - 1, H]
    return torch.cat([first, rest], dim=1)


def whole_row_states(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """The same from rows that hold prompt and completion: slower, for any causal model that reads text alone."""
    assert batch.images is None, "a model that cannot share prompts is refused where they may show images"
    prompt_mask = batch.prompt_mask[batch.prompt_of_row]  # [B, T_prompt]
    mask = torch.cat([prompt_mask, batch.completion_mask.long()], dim=1)  # [B, L]
    # padding at the end alone: between prompt and completion, a window or a carried state would take it for text
    order = mask.argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(dim=1).max())]  # [B, L']
    ids = torch.cat([batch.prompt_ids[batch.prompt_of_row], batch.completion_ids], dim=1).gather(1, order)
    mask = mask.gather(1, order)
    states = model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=_positions(mask), use_cache=False
    ).last_hidden_state  # [B, L', H]
    rows, offsets = (torch.arange(size, device=mask.device) for size in batch.completion_mask.shape)
    before = prompt_mask.sum(dim=1)[:, None] - 1 + offsets  # [B, T] places that predict each completion token
    return states[rows[:, None], before.clamp(max=mask.shape[1] - 1)]


def _positions(mask: Tensor) -> Tensor:
    """[B, T] places in the text, padding not counted."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
