"""Attention of decoding rows that share prompts: each prompt's keys and values are held and read once for its K rows.

A prompt's cache is never expanded to its rows, and a row's own keys and values grow in place; so a decode step reads
what differs between rows, and copies nothing. The arithmetic is plain attention's over prompt and own tokens together.
Plugs in where transformers lets one register an attention function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "grpo_rollout"
"""Under this name, its own, transformers knows the attention; prompts themselves go through torch's SDPA."""
GROWTH = 32
"""Own tokens that a row has room for at first; doubled when they are used up."""


class UnsupportedAttention(Exception):
    """The model asks of its attention what this one does not do."""


def _no_rows() -> Tensor:
    return torch.zeros(0, dtype=torch.long)


@dataclass(slots=True, kw_only=True)
class Places:
    """Where the rows of the next forward pass are, one for all layers, which do not know the cache they are part of: in
    a cycle, its memory would stay until Python looks for cycles."""

    samples: int
    """K"""
    dtype: torch.dtype
    place: Tensor = field(default_factory=_no_rows)
    """[R] a row's prompt * K + its sample."""
    steps: Tensor = field(default_factory=_no_rows)
    """[R] the own tokens that a row has had before this step."""
    row_numbers: Tensor = field(default_factory=_no_rows)
    """[R] 0, 1, ..."""
    prompt_width: int = 0
    """Prompt tokens of the longest of the G."""
    width: int = 0
    """Own tokens of the longest row, this step's included."""
    is_dense: bool = False
    """Whether place is 0, 1, ... G * K - 1: nothing has to be moved then."""


class SharedPrompts(Cache):
    """Keys and values of G prompts and of R rows, each row one of the K of its prompt.

    The loop that owns it admits prompts, says where the rows are before each forward pass, and drops what has left.
    """

    def __init__(self, *, num_layers: int, samples: int, dtype: torch.dtype) -> None:
        self.where = Places(samples=samples, dtype=dtype)
        super().__init__(layers=[_SharedLayer(self.where) for _ in range(num_layers)])

    def put_rows(self, place: Tensor, steps: Tensor, *, num_prompts: int, prompt_width: int) -> None:
        """Tell where the rows are, for the next forward pass."""
        where = self.where
        where.place, where.steps = place, steps
        where.row_numbers = torch.arange(len(place), device=place.device)
        where.prompt_width, where.width = prompt_width, int(steps.max()) + 1
        where.is_dense = len(place) == num_prompts * where.samples and bool((place == where.row_numbers).all())

    def admit(self, prompts: DynamicCache, slots: Sequence[int], *, num_slots: int, num_rows: int) -> None:
        """Take prompts' keys and values into `slots` of num_slots, and have room for num_rows rows."""
        for layer, computed in zip(self._own_layers(), prompts.layers, strict=True):
            assert isinstance(computed, DynamicLayer)
            assert computed.keys is not None
            assert computed.values is not None
            layer.admit(computed.keys, computed.values, list(slots), num_slots=num_slots, num_rows=num_rows)

    def keep(self, rows: Tensor | None, prompts: Tensor | None) -> None:
        """Only rows [R'] and prompts [G'] stay, in this order; None: all of them."""
        for layer in self._own_layers():
            layer.keep(rows, prompts)

    def _own_layers(self) -> list[_SharedLayer]:
        return [layer for layer in self.layers if isinstance(layer, _SharedLayer)]


class _SharedLayer(CacheLayerMixin):
    """One layer's part."""

    is_sliding = False

    def __init__(self, where: Places) -> None:
        super().__init__()
        self._where = where
        self.prompt_keys = self.prompt_values = torch.zeros(0)
        """[G, Hkv, T, D]"""
        self.own_keys = self.own_values = torch.zeros(0)
        """[R, Hkv, S, D]"""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: `admit` has made what there is."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write this step's [R, Hkv, 1, D]; return the own [R, Hkv, width, D]."""
        where = self._where
        if where.width > self.own_keys.shape[2]:
            self.own_keys, self.own_values = (_widened(t, 2 * t.shape[2]) for t in (self.own_keys, self.own_values))
        self.own_keys[where.row_numbers, :, where.steps] = key_states[:, :, 0].to(where.dtype)
        self.own_values[where.row_numbers, :, where.steps] = value_states[:, :, 0].to(where.dtype)
        return self.own_keys[:, :, : where.width], self.own_values[:, :, : where.width]

    def admit(self, keys: Tensor, values: Tensor, slots: list[int], *, num_slots: int, num_rows: int) -> None:
        """See `SharedPrompts.admit`."""
        self.prompt_keys = _written(self.prompt_keys, keys.to(self._where.dtype), slots, num_slots)
        self.prompt_values = _written(self.prompt_values, values.to(self._where.dtype), slots, num_slots)
        self.own_keys = _with_rows(self.own_keys, keys, num_rows, self._where.dtype)
        self.own_values = _with_rows(self.own_values, values, num_rows, self._where.dtype)

    def keep(self, rows: Tensor | None, prompts: Tensor | None) -> None:
        """See `SharedPrompts.keep`."""
        if prompts is not None:
            self.prompt_keys, self.prompt_values = self.prompt_keys[prompts], self.prompt_values[prompts]
        if rows is not None:
            self.own_keys, self.own_values = self.own_keys[rows], self.own_values[rows]

    def get_seq_length(self) -> int:
        """As of a cache that was expanded."""
        return self._where.prompt_width + self._where.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of a cache that was expanded."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def _widened(states: Tensor, width: int) -> Tensor:
    """Zeros behind, never what memory held: a masked NaN times a weight of 0 would be NaN."""
    return torch.nn.functional.pad(states, (0, 0, 0, width - states.shape[2]))


def _written(store: Tensor, states: Tensor, slots: list[int], num_slots: int) -> Tensor:
    """`store` [G, Hkv, T, D], grown to num_slots and to the states' length, with states [n, Hkv, t, D] in slots."""
    if store.dim() == 1:
        store = states.new_zeros(num_slots, states.shape[1], states.shape[2], states.shape[3])
    wider, more = max(states.shape[2] - store.shape[2], 0), max(num_slots - store.shape[0], 0)
    if wider or more:
        store = torch.nn.functional.pad(store, (0, 0, 0, wider, 0, 0, 0, more))
    store[slots, :, : states.shape[2]] = states
    return store


def _with_rows(store: Tensor, states: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    if store.dim() == 1:
        return states.new_zeros(num_rows, states.shape[1], GROWTH, states.shape[3], dtype=dtype)
    return torch.nn.functional.pad(store, (0, 0, 0, 0, 0, 0, 0, num_rows - store.shape[0]))


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    shared_prompts: SharedPrompts | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [R, Hq, 1, D], own keys and values -> [R, 1, Hq, D].

    Without `shared_prompts` (a prompt's own pass) it is torch's SDPA. With them, attention_mask is bool
    [R, 1, 1, prompt_width + width], prompt first.

    Raises:
        UnsupportedAttention: the model wants soft-capped scores, attention sinks, a position bias or a window.
    """
    if shared_prompts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    for name in ("softcap", "s_aux", "position_bias", "sliding_window"):
        if options.get(name) is not None:
            raise UnsupportedAttention(f"its attention uses {name}")
    assert attention_mask is not None
    layer, where = shared_prompts.layers[int(module.layer_idx)], shared_prompts.where  # pyright: ignore[reportArgumentType]
    assert isinstance(layer, _SharedLayer)
    prompt_keys = layer.prompt_keys[:, :, : where.prompt_width]  # [G, Hkv, T, D]
    prompt_values = layer.prompt_values[:, :, : where.prompt_width]
    rows, heads, _, size = query.shape
    kv_heads = prompt_keys.shape[1]
    scaled = query[:, :, 0].to(key.dtype) * (size**-0.5 if scaling is None else scaling)
    scaled = scaled.view(rows, kv_heads, heads // kv_heads, size)  # [R, Hkv, rep, D]
    scores = torch.cat(
        [
            _to_rows(_to_prompts(scaled, where, len(prompt_keys)) @ prompt_keys.mT, where),
            scaled @ key.mT,
        ],
        dim=-1,
    ).float()  # [R, Hkv, rep, T + S]
    weights = scores.masked_fill_(~attention_mask, -torch.inf).softmax(dim=-1).to(value.dtype)
    over_prompt, over_own = weights.split([prompt_keys.shape[2], key.shape[2]], dim=-1)
    mixed = _to_rows(_to_prompts(over_prompt, where, len(prompt_keys)) @ prompt_values, where)
    mixed = mixed + over_own @ value  # [R, Hkv, rep, D]
    return mixed.to(query.dtype).reshape(rows, 1, heads, -1), None


def _to_prompts(by_row: Tensor, where: Places, num_prompts: int) -> Tensor:
    """[R, Hkv, rep, N] -> [G, Hkv, K * rep, N], so that one product serves a prompt's K rows; 0 where no row is."""
    if not where.is_dense:
        empty = by_row.new_zeros(num_prompts * where.samples, *by_row.shape[1:])
        by_row = empty.index_copy_(0, where.place, by_row)
    return by_row.unflatten(0, (num_prompts, where.samples)).transpose(1, 2).flatten(2, 3)


def _to_rows(by_prompt: Tensor, where: Places) -> Tensor:
    """The way back: [G, Hkv, K * rep, N] -> [R, Hkv, rep, N]."""
    by_row = by_prompt.unflatten(2, (where.samples, -1)).transpose(1, 2).flatten(0, 1)
    return by_row if where.is_dense else by_row[where.place]


def use_shared_prompts(model: PreTrainedModel) -> str | None:
    """Have the model attend so; or say why it cannot."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if kinds != {DynamicLayer}:
        return "it keeps more than plain keys and values of every token"
    if not model._can_set_attn_implementation():
        return "its attention cannot be chosen"
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    return None
