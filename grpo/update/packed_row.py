"""A micro-batch as one row of tokens, and where each of them lies among the padded ones. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.batching import MicroBatch
from grpo.runtime.filling import filler
from grpo.update.tiled_attention import Tiles

Kernel = Literal["plain", "fused", "varlen"]
"""How it is attended to: see `packed_attention`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sequences:
    """A packed row as S sequences of queries, each with the keys that it may see up to its own: every prompt with
    itself, every completion with its prompt and itself."""

    query_starts: Tensor
    """[S + 1] int32, of tokens in the row."""
    key_starts: Tensor
    """[S + 1] int32, of `key_places`."""
    key_places: Tensor
    """[M] places in the row."""
    longest: tuple[int, int]
    """Queries and keys of a sequence, at most."""

    @classmethod
    def of(cls, prompt_tokens: Tensor, own_tokens: Tensor) -> Sequences:
        """Args: prompt_tokens: [G]; own_tokens: [G R] of the completions in the row, 0 in a slot without one."""
        starts = torch.cat([prompt_tokens, own_tokens]).cumsum(0) - torch.cat([prompt_tokens, own_tokens])
        prompt_starts, own_starts = starts.split([len(prompt_tokens), len(own_tokens)])
        is_there = own_tokens > 0
        prompt_of_slot = is_there.view(len(prompt_tokens), -1).nonzero()[:, 0]
        own, own_starts = own_tokens[is_there], own_starts[is_there]
        queries = torch.cat([prompt_tokens, own])
        keys = torch.cat([prompt_tokens, prompt_tokens[prompt_of_slot] + own])
        # a completion's keys are two runs of places: its prompt's and its own
        run_starts = torch.cat(
            [prompt_starts, torch.stack([prompt_starts[prompt_of_slot], own_starts], dim=1).flatten()]
        )
        runs = torch.cat([prompt_tokens, torch.stack([prompt_tokens[prompt_of_slot], own], dim=1).flatten()])
        offsets = (run_starts - (runs.cumsum(0) - runs)).repeat_interleave(runs)
        return cls(
            query_starts=F.pad(queries.cumsum(0), (1, 0)).int(),
            key_starts=F.pad(keys.cumsum(0), (1, 0)).int(),
            key_places=offsets + torch.arange(len(offsets), device=offsets.device),
            longest=(int(queries.max()), int(keys.max())),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedRow:
    """G prompts and B completions as one row of N tokens, and where each lies among the padded ones.

    The padded places are those of the prompts, [G, P], and after them those of the completions, [G, R, T], with R slots
    for each prompt's completions. A completion's last token predicts nothing and is not in the row.
    """

    token_ids: Tensor
    """[1, N'], the N tokens and, on a CPU, what fills up (`runtime.filling`): attends to nothing, predicts nothing."""
    position_ids: Tensor
    """[1, N']"""
    places: Tensor
    """[N] the padded place of each token, ascending."""
    predicting: Tensor
    """[B, T + 1] the place in the row of the token before each completion token; 0 where there is none."""
    prompt_mask: Tensor
    """[G, P] bool."""
    slots: int
    """R"""
    columns: int
    """T"""
    kernel: Kernel
    sequences: Sequences | None
    """For the varlen kernel alone."""
    _tiles: dict[tuple[int, int], Tiles] = field(default_factory=dict)
    """By heads of queries and keys: layers that have the same share one."""

    @classmethod
    def of(cls, batch: MicroBatch, kernel: Kernel) -> PackedRow:
        """A micro-batch without images."""
        is_prompt = batch.prompt_mask.bool()  # [G, P]
        is_read = batch.completion_mask[:, 1:]  # [B, T] a token is read if there is one after it
        (groups, width), columns, device = is_prompt.shape, is_read.shape[1], is_read.device
        counts = torch.bincount(batch.prompt_of_row, minlength=groups)
        slots = int(counts.max())
        order = batch.prompt_of_row.argsort(stable=True)  # [B] rows by their prompts
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=device) - (counts.cumsum(0) - counts)[batch.prompt_of_row[order]]
        slot = batch.prompt_of_row * slots + rank  # [B]

        def in_slots(values: Tensor) -> Tensor:
            """[B, T] -> [G R, T]"""
            return values.new_zeros(groups * slots, columns).index_copy(0, slot, values)

        is_token = in_slots(is_read)
        places = torch.cat([is_prompt.flatten(), is_token.flatten()]).nonzero()[:, 0]  # [N]
        in_row = places.new_zeros(groups * (width + slots * columns))
        in_row[places] = torch.arange(len(places), device=device)
        last = in_row[torch.arange(groups, device=device) * width + is_prompt.sum(dim=1) - 1]  # [G]
        own = in_row[groups * width :].view(groups * slots, columns)[slot]  # [B, T]
        prompt_positions = torch.arange(width, device=device).expand(groups, -1)
        positions = is_prompt.sum(dim=1)[batch.prompt_of_row][:, None] + torch.arange(columns, device=device)  # [B, T]
        token_ids = torch.cat([batch.prompt_ids[is_prompt], in_slots(batch.completion_ids[:, :-1])[is_token]])
        position_ids = torch.cat([prompt_positions[is_prompt], in_slots(positions)[is_token]])
        if device.type == "cpu" and (behind := filler(len(places))):
            token_ids = torch.cat([token_ids, token_ids[:1].expand(behind)])
            position_ids = F.pad(position_ids, (0, behind))
        return cls(
            token_ids=token_ids[None],
            position_ids=position_ids[None],
            places=places,
            predicting=torch.cat([last[batch.prompt_of_row][:, None], own], dim=1),
            prompt_mask=is_prompt,
            slots=slots,
            columns=columns,
            kernel=kernel,
            sequences=Sequences.of(is_prompt.sum(dim=1), is_token.sum(dim=1)) if kernel == "varlen" else None,
        )

    def tiles(self, *, heads: int, kv_heads: int) -> Tiles:
        """For the plain kernel, of a layer with so many heads."""
        if (heads, kv_heads) not in self._tiles:
            self._tiles[heads, kv_heads] = Tiles.of(
                self.places,
                self.prompt_mask,
                slots=self.slots,
                columns=self.columns,
                heads=heads,
                kv_heads=kv_heads,
            )
        return self._tiles[heads, kv_heads]

    def padded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[N, h, D] -> of the prompts [G, P, h, D], of the completions [G, R, T, h, D]; 0 where there is no token."""
        groups, width = self.prompt_mask.shape
        size = groups * (width + self.slots * self.columns)
        if size != len(values):
            values = _Spread.apply(values, self.places, size)  # pyright: ignore[reportAssignmentType]
        prompts, completions = values.split([groups * width, size - groups * width])
        return prompts.unflatten(0, (groups, width)), completions.unflatten(0, (groups, self.slots, self.columns))

    def packed(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """The way back. Args: prompts: [G, P, ...]; completions: [G, R, T, ...]. Returns: [N, ...]."""
        values = torch.cat([prompts.flatten(0, 1), completions.flatten(0, 2)])
        if len(values) == len(self.places):
            return values
        return _Gather.apply(values, self.places)  # pyright: ignore[reportReturnType]


class _Spread(torch.autograd.Function):
    """values [N, ...] -> [size, ...] with them at their places and 0 elsewhere. No two have one place, so the way back
    only reads, where that of plain indexing adds up one token after another."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return values.new_zeros(size, *values.shape[1:]).index_copy_(0, places, values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


class _Gather(torch.autograd.Function):
    """The way back: values [size, ...] -> those at the places, [N, ...]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(values)
        return values.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.size, *gradient.shape[1:]).index_copy_(0, places, gradient), None
