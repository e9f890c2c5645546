"""Last hidden states that predict each completion token, with every prompt computed once for its K completions.

A micro-batch goes through the model as one row without padding, `[prompt 1 | prompt 2 | ... | completion 1 | ...]`,
whose positions restart after the prompt; a completion attends to its own prompt and to itself. Everything but the
attention takes the row as it is; the attention is registered with transformers, so that models stay untouched. It knows
where the parts lie, so it makes no scores between strangers, as one mask over the whole row would: those grow with the
square of a micro-batch. The arithmetic is that of rows apart, and so is the gradient.

A model whose attention looks at more or less than all keys before it is given whole rows instead; prompts that show
images leave their keys and values in a cache (`prompt_cache`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from grpo.batching import MicroBatch
from grpo.update.activations import attention_of
from grpo.update.packed_attention import ATTENTION
from grpo.update.packed_row import Kernel, PackedRow
from grpo.update.prompt_cache import cached_prompt_states

PLAIN_ATTENTION_SCORES = 32 * 2**20
"""Attention scores of one layer that may be held whole on a CPU: 128 MiB in float32, kept for the backward pass."""


def predicting_states(model: PreTrainedModel, batch: MicroBatch, *, shares: bool | None = None) -> Tensor:
    """[B, T, H] the hidden state before each completion token; arbitrary where the completion mask is 0.

    Args:
        shares: compute a prompt once for its completions; None: where the model's attention allows it.
    """
    shares = can_share_prompts(model) if shares is None else shares
    if shares and batch.images is None:
        return _packed_states(model, batch)
    with _fastest_attention(model, batch):
        return cached_prompt_states(model, batch) if shares else whole_row_states(model, batch)


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether the model keeps plain keys and values for every layer, no sliding window and no recurrent state, and lets
    another attention be put in."""
    return model._can_set_attn_implementation() and all(
        type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers
    )


def kernel_for(model: PreTrainedModel, batch: MicroBatch) -> Kernel:
    """How the micro-batch's packed row is attended to."""
    (prompts, width), (rows, columns) = batch.prompt_ids.shape, batch.completion_ids.shape
    if _may_hold(model, batch, prompts * width**2 + rows * columns * (width + columns)):
        return "plain"
    return "varlen" if model.config._attn_implementation == "flash_attention_2" else "fused"


def _may_hold(model: PreTrainedModel, batch: MicroBatch, pairs: int) -> bool:
    """Whether a layer's scores of so many pairs of query and key may be held whole: on a CPU, where the fused kernel's
    backward pass is several times slower, if they are few."""
    heads = getattr(model.config.get_text_config(), "num_attention_heads", 1)
    return batch.completion_ids.device.type == "cpu" and heads * pairs <= PLAIN_ATTENTION_SCORES


@contextlib.contextmanager
def _fastest_attention(model: PreTrainedModel, batch: MicroBatch) -> Iterator[None]:
    rows, columns = batch.completion_ids.shape
    is_plain = (
        batch.images is None
        and model.config._attn_implementation == "sdpa"
        and _may_hold(model, batch, rows * (batch.prompt_ids.shape[1] + columns) ** 2)
    )
    with attention_of(model, "eager" if is_plain else None):
        yield


def _packed_states(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    row = PackedRow.of(batch, kernel_for(model, batch))
    with attention_of(model, ATTENTION):
        states = model.base_model(
            input_ids=row.token_ids,
            attention_mask=torch.ones_like(row.token_ids),  # the attention knows what only fills up
            position_ids=row.position_ids,
            use_cache=False,
            packed_row=row,
        ).last_hidden_state  # [1, N', H]
    return states[0][row.predicting]


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
