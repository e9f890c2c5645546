"""Logits -> one token per row and its log-probability, under temperature, top-k, top-p and min-p.

The kept set is `replay.kept_tokens`' own, found among the likeliest few instead of by sorting the vocabulary. Where
top-p cuts through tokens that tie exactly, those with the higher ids stay, there as here. Knows tensors;
knows no model and no transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.rollout.base import SamplingParams
from grpo.rollout.replay import kept_tokens

CANDIDATES = (128, 2048, 8192)
"""Likeliest tokens that are looked at first, then for the rows whose kept set is larger; after these, all."""
CUT_MARGIN = 2e-6
"""Mass next to top_p within which rounding, and not the law, would say what is kept: the whole sort says it there."""
CACHED_ROWS = 16
"""Rows that a CPU draws for at a time: 3 MB of 49,152 logits."""
DRAW_BLOCK = 256
"""Tokens that are added up first, so that the long sums in float64 are over V / 256 numbers."""


def draw_tokens(logits: Tensor, draws: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token per row by the inverse distribution function, tokens in the vocabulary's order.

    Args:
        logits: [B, V] of any precision, processors applied, temperature not.
        draws: [B] float64 in [0, 1), a row's own random number.
    Returns:
        tokens [B] int64, log-probabilities [B] float32 under the whole law. At temperature 0 the likeliest token, and
        its log-probability at temperature 1.
    """
    # passes over logits cost what they move: a few rows at a time stay in a CPU's cache
    size = CACHED_ROWS if logits.device.type == "cpu" else len(logits)
    drawn = [_draw_block(*block, params) for block in zip(logits.split(size), draws.split(size), strict=True)]
    tokens, logprobs = zip(*drawn, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw_block(logits: Tensor, draws: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    if params.temperature == 0:
        tokens = logits.argmax(dim=-1)
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
    scaled = logits if params.temperature == 1 else logits / params.temperature
    if params.top_p < 1 or params.top_k > 0 or params.min_p > 0:
        return _draw_filtered(scaled, draws, params)
    probabilities = scaled.softmax(dim=-1)  # [B, V]
    tokens = inverse_distribution(probabilities, draws)
    return tokens, probabilities.gather(1, tokens[:, None])[:, 0].log()


def _draw_filtered(scaled: Tensor, draws: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(len(scaled), dtype=torch.long, device=scaled.device)  # [B]
    logprobs = torch.zeros(len(scaled), device=scaled.device)  # [B]
    rows = torch.arange(len(scaled), device=scaled.device)  # those still to be drawn
    total = scaled.logsumexp(dim=-1)  # [B]
    for count in CANDIDATES:
        if count >= scaled.shape[1] or not len(rows):
            break
        if params.top_k >= count:
            continue
        left = scaled if len(rows) == len(scaled) else scaled[rows]
        ids, values, is_kept, is_settled = _kept_candidates(left, total[rows], params, count)
        done = rows[is_settled]
        if len(done):
            drawn = _draw_kept(ids[is_settled], values[is_settled], is_kept[is_settled], draws[done])
            tokens[done], logprobs[done] = drawn
        rows = rows[~is_settled]
    if len(rows):
        law = scaled[rows].masked_fill(~kept_tokens(scaled[rows], params), -torch.inf).log_softmax(dim=-1)
        drawn = inverse_distribution(law.exp(), draws[rows])
        tokens[rows], logprobs[rows] = drawn, law.gather(1, drawn[:, None])[:, 0]
    return tokens, logprobs


def _kept_candidates(
    scaled: Tensor, total: Tensor, params: SamplingParams, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kept set among the likeliest `count` tokens.

    Args:
        scaled: [N, V]; total: [N] its log-sum-exp; count: above top_k and below V.
    Returns:
        ids [N, C], their values [N, C] descending, kept [N, C], and whether that is the row's whole kept set [N]: all
        tokens as likely as the last one kept are candidates, and no rounding decides at top_p.
    """
    values, ids = scaled.topk(count, dim=-1)  # [N, C]
    # bfloat16 logits tie everywhere, and topk's order of a tie may depend on the batch: the higher ids stay
    ids, order = ids.sort(dim=-1, descending=True)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    is_kept = torch.ones_like(values, dtype=torch.bool)
    if params.top_k > 0:
        is_kept &= values >= values[:, params.top_k - 1 : params.top_k]
        total = values.masked_fill(~is_kept, -torch.inf).logsumexp(dim=-1)  # top-p is of what top-k left
    is_close = torch.zeros_like(is_kept)
    if params.top_p < 1:
        mass = (values.double() - total.double()[:, None]).exp().masked_fill(~is_kept, 0.0)  # [N, C]
        above = mass.cumsum(dim=-1) - mass
        is_close = ((above - params.top_p).abs() < CUT_MARGIN) & is_kept
        is_kept &= above < params.top_p
    if params.min_p > 0:
        relative = (values - values[:, :1]).exp()  # over the likeliest
        is_kept &= relative >= params.min_p
    num_kept = is_kept.sum(dim=-1, keepdim=True)  # [N, 1]; a prefix, since values descend
    last = values.gather(1, num_kept - 1)
    is_settled = ((num_kept < count) & (values[:, -1:] < last))[:, 0]  # all that tie with the last are candidates
    is_settled &= ~is_close.any(dim=-1)
    if params.top_k > 0:  # a tie over the edge of top-k is more than k tokens
        edge = values[:, params.top_k - 1 : params.top_k]
        is_settled &= values[:, -1] < edge[:, 0]
    return ids, values, is_kept, is_settled


def _draw_kept(ids: Tensor, values: Tensor, is_kept: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """tokens [N], log-probabilities [N]: by the inverse distribution function over the kept candidates."""
    width = int(is_kept.sum(dim=-1).max())
    ids, values = ids[:, :width], values[:, :width].masked_fill(~is_kept[:, :width], -torch.inf)
    ids, order = ids.sort(dim=-1)  # the vocabulary's order: near-ties in likelihood must not swap places
    law = values.gather(1, order).log_softmax(dim=-1)  # [N, W]
    place, _ = _first_above(law.double().exp(), draws[:, None])
    return ids.gather(1, place)[:, 0], law.gather(1, place)[:, 0]


def inverse_distribution(probabilities: Tensor, draws: Tensor) -> Tensor:
    """[B] the first token up to which the mass exceeds draws [B] of the whole [B, V]; never one of probability 0."""
    missing = -probabilities.shape[1] % DRAW_BLOCK
    blocks = torch.nn.functional.pad(probabilities, (0, missing)) if missing else probabilities  # 0 would copy all
    blocks = blocks.unflatten(1, (-1, DRAW_BLOCK))  # [B, V / 256, 256]
    mass = blocks.sum(dim=-1).double()  # [B, V / 256]
    block, left = _first_above(mass, draws[:, None] * mass.sum(dim=-1, keepdim=True))
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, DRAW_BLOCK))[:, 0].double()  # [B, 256]
    return (block * DRAW_BLOCK + _first_above(inside, left)[0])[:, 0]


def _first_above(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1] the first place where cumulative mass [B, N] exceeds target [B, 1]; what of it the places before leave."""
    cumulative = mass.cumsum(dim=-1)
    place = torch.searchsorted(cumulative, target, right=True)  # [B, 1]
    # where rounding put the target at or above the sum: the last place that holds any mass
    last = mass.shape[1] - 1 - (mass.flip(1) > 0).int().argmax(dim=1, keepdim=True)
    place = torch.minimum(place, last)
    before = cumulative.gather(1, place) - mass.gather(1, place)
    return place, (target - before).clamp(min=0.0)
