"""Attention of a packed row with its scores held whole, in tiles without a score between strangers.

A tile's queries see keys from the same prompt on: some of a prompt's tokens those up to the last of them, a completion
its prompt and itself. What a tile multiplies is gathered once, in the layout of its products, and the backward pass is
written out, so that only the shares are kept: on a CPU, what is moved counts for more here than what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PROMPT_TILE = 160
"""Tokens of a prompt in a tile: with more, more scores of later tokens are made in vain; with fewer, products are
small."""


SHORT_ROW = 256
"""Scores of a query, below which they are turned into shares in float32."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rows:
    """Rows of [N * heads, D] that a tile takes, by head of the keys, sequence, head of the queries and token."""

    rows: Tensor
    """[M]; in place of what pads, the first token of the same prompt."""
    is_padding: Tensor
    """[M, 1]"""
    pads: bool

    @classmethod
    def of(cls, places: Tensor, is_there: Tensor, *, heads: int, kv_heads: int) -> _Rows:
        """Args: places, is_there: [sequences, tokens] in the row."""
        head = torch.arange(heads, device=places.device).view(kv_heads, 1, -1, 1)
        rows = places[:, None] * heads + head  # [hk, sequences, h / hk, tokens]
        return cls(
            rows=rows.flatten(),
            is_padding=~is_there[:, None].expand(rows.shape).reshape(-1, 1),
            pads=not bool(is_there.all()),
        )

    def of_values(self, values: Tensor, batches: int) -> Tensor:
        """[N * heads, D] -> [batches, M / batches, D]"""
        return values.index_select(0, self.rows).view(batches, -1, values.shape[-1])

    def of_gradient(self, gradient: Tensor, batches: int) -> Tensor:
        """The same, 0 where a row pads: nothing comes of what it gave."""
        found = gradient.index_select(0, self.rows)
        if self.pads:
            found.masked_fill_(self.is_padding, 0)
        return found.view(batches, -1, gradient.shape[-1])


def _places_in(parts: Sequence[_Rows], size: int) -> Tensor:
    """[size] where each row lies among all the parts', one part after another."""
    rows, is_padding = (torch.cat([getattr(part, name).flatten() for part in parts]) for name in ("rows", "is_padding"))
    kept = (~is_padding).nonzero()[:, 0]
    return rows.new_zeros(size).index_copy_(0, rows[kept], kept)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tiles:
    """Where the tiles of a packed row of N tokens find their queries and keys, under so many heads.

    G prompts of at most P tokens, R slots for each one's completions, T tokens of each in the row at most.
    """

    sizes: tuple[int, int, int, int]
    """G, P, R, T"""
    heads: tuple[int, int]
    """h of queries, hk of keys and values."""
    prompts: tuple[tuple[int, int, _Rows], ...]
    """First token, last token + 1 and queries of each tile of the prompts."""
    completions: _Rows
    """Queries of the tile of the completions."""
    prompt_keys: _Rows
    keys: Tensor
    """[hk * G * R * (P + T)] rows of [N * hk, D]: each completion's, its prompt's first."""
    hidden: Tensor | None
    """[G, 1, 1, 1, P] what pads prompts; None: nothing."""
    outputs: Tensor
    """[N * h] of a row's queries, the places of what they gave among all tiles'."""
    key_gradients: Tensor
    """[N * hk] the same of its keys, among those of all prompts and then of all completions."""

    @classmethod
    def of(cls, places: Tensor, prompt_mask: Tensor, *, slots: int, columns: int, heads: int, kv_heads: int) -> Tiles:
        """Args: places, prompt_mask, slots, columns: see `packed_row.PackedRow`."""
        groups, width = prompt_mask.shape
        size = groups * (width + slots * columns)
        in_row = places.new_zeros(size)
        in_row[places] = torch.arange(len(places), device=places.device)
        is_there = torch.zeros_like(in_row, dtype=torch.bool).index_fill_(0, places, True)
        shapes = (groups, width), (groups * slots, columns)
        sections = [groups * width, size - groups * width]
        (of_prompts, of_own), (prompt_there, own_there) = (
            [part.view(shape) for part, shape in zip(values.split(sections), shapes, strict=True)]
            for values in (in_row, is_there)
        )
        first = of_prompts[:, :1]  # of the same prompt: what pads never reads a stranger's numbers
        of_prompts = torch.where(prompt_there, of_prompts, first)
        of_own = torch.where(own_there, of_own, first.repeat_interleave(slots, dim=0))
        starts = range(0, width, PROMPT_TILE)
        prompts = tuple(
            (
                start,
                min(start + PROMPT_TILE, width),
                _Rows.of(
                    of_prompts[:, start : start + PROMPT_TILE],
                    prompt_there[:, start : start + PROMPT_TILE],
                    heads=heads,
                    kv_heads=kv_heads,
                ),
            )
            for start in starts
        )
        completions = _Rows.of(of_own, own_there, heads=heads, kv_heads=kv_heads)
        prompt_keys = _Rows.of(of_prompts, prompt_there, heads=kv_heads, kv_heads=kv_heads)
        own_keys = _Rows.of(of_own, own_there, heads=kv_heads, kv_heads=kv_heads)
        joined = torch.cat([of_prompts.repeat_interleave(slots, dim=0), of_own], dim=1)  # [G R, P + T]
        return cls(
            sizes=(groups, width, slots, columns),
            heads=(heads, kv_heads),
            prompts=prompts,
            completions=completions,
            prompt_keys=prompt_keys,
            keys=_Rows.of(joined, torch.ones_like(joined, dtype=torch.bool), heads=kv_heads, kv_heads=kv_heads).rows,
            hidden=None if bool(prompt_mask.all()) else ~prompt_mask[:, None, None, None],
            outputs=_places_in([*(queries for _, _, queries in prompts), completions], len(places) * heads),
            key_gradients=_places_in([prompt_keys, own_keys], len(places) * kv_heads),
        )


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, *, scaling: float, softcap: float | None
) -> Tensor:
    """Args: query: [N, h, D]; key, value: [N, hk, D]. Returns: [N, h, D]. Sums of bfloat16 products are in float32, and
    so is the softmax; scores and shares are rounded."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    return _Tiled.apply(query.to(dtype), key.to(dtype), value.to(dtype), tiles, scaling, softcap)  # pyright: ignore[reportReturnType]


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, scaling: float, softcap: float | None
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            work = _Work(query, key, value, tiles, scaling, softcap)
            shares, outputs = [], []
            for number in range(len(tiles.prompts)):
                shares.append(work.prompt_shares(number))
                outputs.append(shares[-1] @ work.prompt_values[:, : tiles.prompts[number][1]])
            if tiles.sizes[3]:
                shares.append(work.own_shares())
                outputs.append(shares[-1] @ work.own_keys_of(work.value))
        ctx.save_for_backward(query, key, value, *shares)
        ctx.rest = tiles, scaling, softcap
        return _put_together(outputs, tiles.outputs).view(query.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, *shares = ctx.saved_tensors
        tiles, scaling, softcap = ctx.rest
        work = _Work(query, key, value, tiles, scaling, softcap)
        _, width, slots, columns = tiles.sizes
        batches, size = work.batches, query.shape[-1]
        gradient = gradient.reshape(-1, size)  # [N h, D]
        of_queries: list[Tensor] = []
        own_keys = own_values = key.new_zeros(0, size)
        # a prompt's keys are read by all of its completions: their gradients are added up in full precision
        wide = torch.promote_types(key.dtype, torch.float32)
        of_prompt_keys = key.new_zeros(batches, width, size, dtype=wide)
        of_prompt_values = torch.zeros_like(of_prompt_keys)
        for number, (_, end, rows) in enumerate(tiles.prompts):
            tile = rows.of_gradient(gradient, batches)
            keys, values = work.prompt_keys[:, :end], work.prompt_values[:, :end]
            slope = work.slope_of_scores(tile @ values.mT, shares[number], lambda n=number: work.prompt_scores(n))
            of_prompt_values[:, :end] += shares[number].mT @ tile
            of_prompt_keys[:, :end] += slope.mT @ work.queries(rows, batches)
            of_queries.append(slope @ keys)
        if columns:
            tile = tiles.completions.of_gradient(gradient, batches * slots)
            slope = work.slope_of_scores(tile @ work.own_keys_of(work.value).mT, shares[-1], work.own_scores)
            of_values = (shares[-1].mT @ tile).view(batches, slots, width + columns, size)
            of_keys = (slope.mT @ work.queries(tiles.completions, batches * slots)).view(of_values.shape)
            of_prompt_values += of_values[:, :, :width].sum(dim=1, dtype=wide)
            of_prompt_keys += of_keys[:, :, :width].sum(dim=1, dtype=wide)
            own_keys, own_values = (part[:, :, width:].reshape(-1, size) for part in (of_keys, of_values))
            of_queries.append(slope @ work.own_keys_of(work.key))
        return (
            _put_together(of_queries, tiles.outputs).mul_(scaling).view(query.shape),
            _put_together([of_prompt_keys.to(key.dtype), own_keys], tiles.key_gradients).view(key.shape),
            _put_together([of_prompt_values.to(value.dtype), own_values], tiles.key_gradients).view(value.shape),
            None,
            None,
            None,
        )


def _put_together(parts: Sequence[Tensor], places: Tensor) -> Tensor:
    """[..., D] of all tiles, one after another -> [places, D]"""
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).index_select(0, places)


class _Work:
    """What both passes need of one layer's queries, keys and values."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, scaling: float, softcap: float | None
    ) -> None:
        self.tiles, self.softcap = tiles, softcap
        self.batches = tiles.heads[1] * tiles.sizes[0]
        """hk * G"""
        size = query.shape[-1]
        self.scaled = (query * scaling).view(-1, size)
        """[N h, D]"""
        self.key, self.value = (part.reshape(-1, size) for part in (key, value))
        """[N hk, D]"""
        self.prompt_keys, self.prompt_values = (
            tiles.prompt_keys.of_values(part, self.batches) for part in (self.key, self.value)
        )
        """[hk G, P, D]"""

    def queries(self, rows: _Rows, batches: int) -> Tensor:
        """[batches, L, D] scaled."""
        return rows.of_values(self.scaled, batches)

    def own_keys_of(self, values: Tensor) -> Tensor:
        """[hk G R, P + T, D] each completion's keys, or values, behind its prompt's."""
        return values.index_select(0, self.tiles.keys).view(self.batches * self.tiles.sizes[2], -1, values.shape[-1])

    def prompt_scores(self, number: int) -> Tensor:
        """[hk G, h / hk * L, end] of a tile of prompts, nothing hidden."""
        _, end, rows = self.tiles.prompts[number]
        return self._capped(self.queries(rows, self.batches) @ self.prompt_keys[:, :end].mT)

    def own_scores(self) -> Tensor:
        """[hk G R, h / hk * T, P + T] of the completions, nothing hidden."""
        batches = self.batches * self.tiles.sizes[2]
        return self._capped(self.queries(self.tiles.completions, batches) @ self.own_keys_of(self.key).mT)

    def prompt_shares(self, number: int) -> Tensor:
        """The same after the softmax."""
        scores = self.prompt_scores(number)
        start, end, _ = self.tiles.prompts[number]
        _hide_later(scores.view(self.batches, -1, end - start, end)[..., start:])
        return _softmax(scores)

    def own_shares(self) -> Tensor:
        """The same after the softmax."""
        scores = self.own_scores()
        groups, width, slots, columns = self.tiles.sizes
        by_row = scores.view(-1, groups, slots, scores.shape[1] // columns, columns, width + columns)
        if self.tiles.hidden is not None:
            by_row[..., :width].masked_fill_(self.tiles.hidden, -torch.inf)
        _hide_later(by_row[..., width:])
        return _softmax(scores)

    def slope_of_scores(self, slope: Tensor, shares: Tensor, scores: Any) -> Tensor:
        """Derivative by the shares -> by the scores before their cap. Args: scores: makes them again, capped."""
        slope = torch.ops.aten._softmax_backward_data(slope, shares, -1, shares.dtype)  # one pass; written out, four
        if self.softcap is not None:
            slope *= 1 - (scores() / self.softcap).square_()
        return slope

    def _capped(self, scores: Tensor) -> Tensor:
        return scores if self.softcap is None else scores.div_(self.softcap).tanh_().mul_(self.softcap)


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, summed in full precision. In half precision torch's kernel takes half as long where rows
    are long, and twice as long where they are short."""
    if scores.shape[-1] >= SHORT_ROW:
        return scores.softmax(dim=-1)
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def _hide_later(scores: Tensor) -> None:
    """[..., L, L], in place."""
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    scores.masked_fill_(later, -torch.inf)
