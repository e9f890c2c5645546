"""Last hidden states as in `shared_prefix`, for prompts that show images.

They go through the model first, in a pass of their own, and leave their keys and values, with gradient, in a cache; the
completions then read them from there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from grpo.batching import MicroBatch
from grpo.runtime.image_inputs import prompt_inputs


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


def cached_prompt_states(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """[B, T, H] the hidden state before each completion token; arbitrary where the completion mask is 0."""
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
