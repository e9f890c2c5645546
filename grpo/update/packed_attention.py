"""Attention of a packed row, under a name of its own in transformers, by one of three kernels that agree.

`plain` holds the scores whole (`tiled_attention`): on a CPU the fused kernel's backward pass is several times slower.
`fused` is torch's `scaled_dot_product_attention`, for which a prompt's keys are written out before each completion's.
`varlen` is flash-attn's kernel for sequences of any length, for models that came with flash-attn.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from grpo.update.packed_row import PackedRow
from grpo.update.tiled_attention import tiled_attention

ATTENTION = "grpo_packed_row"
"""The name under which transformers knows it."""


def packed_row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_row: PackedRow,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row, as transformers calls it.

    Args:
        query: [1, heads, N', D]
        key, value: [1, key-value heads, N', D]
        attention_mask: none is made for an attention of our own.
    Returns:
        [1, N', heads, D], 0 for what only fills up the row, and no weights.
    """
    attend = {"plain": _plain, "fused": _fused, "varlen": _varlen}[packed_row.kernel]
    tokens, filled = len(packed_row.places), query.shape[2]
    query, key, value = (states[0].transpose(0, 1)[:tokens] for states in (query, key, value))  # [N, heads, D]
    found = attend(packed_row, query, key, value, scaling, softcap)
    if tokens < filled:
        found = F.pad(found, (0, 0, 0, 0, 0, filled - tokens))
    return found[None], None


def _plain(row: PackedRow, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Scores held whole. Returns [N, heads, D]."""
    tiles = row.tiles(heads=query.shape[1], kv_heads=key.shape[1])
    return tiled_attention(query, key, value, tiles, scaling=scaling, softcap=softcap)


def _fused(row: PackedRow, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """torch's fused kernels, for which each completion gets its prompt's keys before its own. Returns [N, heads, D]."""
    if softcap is not None:
        return _plain(row, query, key, value, scaling, softcap)
    (prompt_query, own_query), *keys_and_values = map(row.padded, (query, key, value))
    groups, repeats = len(row.prompt_mask), query.shape[1] // key.shape[1]

    def attended(query: Tensor, keys_and_values: list[Tensor], mask: Tensor | None) -> Tensor:
        keys, values = (states.transpose(1, 2) for states in keys_and_values)  # [..., heads, L, D]
        if mask is not None and query.is_cuda:  # the kernels there that take a mask want as many keys as queries
            keys, values = (states.repeat_interleave(repeats, dim=1) for states in (keys, values))
        found = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        return found.transpose(1, 2)

    of_prompts = attended(prompt_query, [prompts for prompts, _ in keys_and_values], None)
    if row.columns == 0:
        return row.packed(of_prompts, own_query)
    joined = [
        torch.cat([prompts[:, None].expand(-1, row.slots, -1, -1, -1), own], dim=2).flatten(0, 1)
        for prompts, own in keys_and_values
    ]  # [G R, P + T, hk, D]
    sees_own = torch.ones(row.columns, row.columns, dtype=torch.bool, device=query.device).tril()
    mask = torch.cat(
        [row.prompt_mask[:, None].expand(-1, row.columns, -1), sees_own.expand(groups, -1, -1)], dim=2
    ).repeat_interleave(row.slots, dim=0)  # [G R, T, P + T]
    of_rows = attended(own_query.flatten(0, 1), joined, mask[:, None])
    return row.packed(of_prompts, of_rows.unflatten(0, (groups, row.slots)))


def _varlen(row: PackedRow, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """flash-attn over sequences of any length, without padding or a mask. Returns [N, heads, D]."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    sequences = row.sequences
    assert sequences is not None
    return flash_attn_varlen_func(
        query,
        key[sequences.key_places],
        value[sequences.key_places],
        cu_seqlens_q=sequences.query_starts,
        cu_seqlens_k=sequences.key_starts,
        max_seqlen_q=sequences.longest[0],
        max_seqlen_k=sequences.longest[1],
        softmax_scale=scaling,
        causal=True,  # the last query sees the last key: a completion's first token sees all of its prompt
        softcap=softcap or 0.0,
    )


AttentionInterface.register(ATTENTION, packed_row_attention)
