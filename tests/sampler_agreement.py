"""Whether the trainer gives every sampled token the sampler's log-probability, and which tokens are excused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from builders import make_batch
from torch import Tensor

from grpo.rollout.base import SamplingParams
from grpo.rollout.processors import Prefix, build_processors
from grpo.rollout.replay import Replay, ReplayedPrompts
from grpo.runtime.policy import Policy
from grpo.types import RolloutGroup, ScoredGroup, Verdict
from grpo.update.forward import policy_pass

TOLERANCE = 1e-4
"""Nats."""
EDGE = 1e-4
"""Of top-p: an engine and the trainer, each with its own rounding, may cut differently this close to it."""
MAX_EXCUSED_FRAC = 0.005
"""Of the tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What was found of N tokens."""

    num_tokens: int
    num_excused: int
    """At the edge of top-p: their log-probabilities differ, or the trainer alone would have dropped them."""
    worst_gap: float
    """Nats, of the others."""


def check_agreement(
    policy: Policy,
    groups: Sequence[RolloutGroup],
    params: SamplingParams,
    *,
    replayed: SamplingParams | None = None,
    max_excused_frac: float = MAX_EXCUSED_FRAC,
) -> Agreement:
    """Raises AssertionError where a token is neither given the sampler's log-probability nor excused, and where too
    many are excused.

    Args:
        params: the law that the trainer is told.
        replayed: the part of it that its replay is told; all of it where None.
        max_excused_frac: 1 for a caller that counts them over several laws.
    """
    sampler, trainer, num_forced = compared(policy, groups, params, replayed=replayed)
    gaps = (trainer - sampler).abs()  # [N]
    differs = ~(gaps <= TOLERANCE)  # NaN differs too
    if num_forced or bool(differs.any()):
        at_edge, edge_mass = edges(policy, groups, params)
        assert num_forced <= int(at_edge.sum()), "a token that the trainer's filters drop is not at the edge of top-p"
        explained = TOLERANCE + 2 * edge_mass  # a cut moved by these tokens: log(1 + mass / top_p), top_p above 1/2
        unexplained = gaps[differs & ~(gaps <= explained)]
        assert not len(unexplained), f"{len(unexplained)} tokens differ, by up to {float(unexplained.max()):.2g} nats"
    num_excused = int(differs.sum()) + num_forced
    assert num_excused <= max_excused_frac * len(gaps), f"{num_excused} of {len(gaps)} tokens are excused"
    return Agreement(num_tokens=len(gaps), num_excused=num_excused, worst_gap=float(gaps[~differs].max()))


def compared(
    policy: Policy, groups: Sequence[RolloutGroup], params: SamplingParams, *, replayed: SamplingParams | None = None
) -> tuple[Tensor, Tensor, int]:
    """sampler [N], trainer [N] log-probabilities of every token, group by group, and how many the trainer's filters
    would have dropped."""
    scored = [
        ScoredGroup(
            rollout=group,
            verdicts=tuple({"a": Verdict(value=float(k), parts={})} for k in range(len(group.completions))),
        )
        for group in groups
    ]
    (micro,) = make_batch(scored, budget=1_000_000).micro_batches
    mask = micro.completion_mask
    rows, offsets = mask.nonzero(as_tuple=True)
    lengths = micro.prompt_mask.sum(dim=1)
    prompts = ReplayedPrompts(token_ids=micro.prompt_ids, lengths=lengths, of_row=micro.prompt_of_row)
    replay = Replay(replayed or params, micro.completion_ids, rows, offsets, prompts=prompts)
    with torch.no_grad():
        logprobs = policy_pass(policy, micro, params, replay=replay).logprobs
    found: dict[tuple[int, ...], Tensor] = {}
    for row, prompt in enumerate(micro.prompt_of_row.tolist()):
        before = micro.prompt_ids[prompt, : int(lengths[prompt])].tolist()
        found[(*before, *micro.completion_ids[row][mask[row]].tolist())] = logprobs[row][mask[row]]
    completions = [(group.prompt_token_ids, one) for group in groups for one in group.completions]
    sampler = torch.tensor([logprob for _, one in completions for logprob in one.sampler_logprobs])
    trainer = torch.cat([found[(*prompt, *one.token_ids)] for prompt, one in completions])
    return sampler, trainer, replay.num_forced


@torch.no_grad()
def edges(policy: Policy, groups: Sequence[RolloutGroup], params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Of every token, group by group: whether it lies at the edge of top-p [N], and the probability of all the tokens
    that do so in its place [N].

    At the edge: the mass of the likelier tokens is within `EDGE` of top-p. In float64, a completion at a time, from a
    plain pass over its text.
    """
    at_edge: list[Tensor] = []
    masses: list[Tensor] = []
    for group in groups:
        for completion in group.completions:
            prompt, tokens = list(group.prompt_token_ids), list(completion.token_ids)
            text = torch.tensor([[*prompt, *tokens]])
            logits = policy.causal_lm(text, use_cache=False).logits[0, len(prompt) - 1 : -1].float()  # [T, V]
            prefix = Prefix.of([prompt] * len(tokens), [tokens[:place] for place in range(len(tokens))])
            for processor in build_processors(params):
                logits = processor(logits, prefix)
            scaled = logits.double() / params.temperature
            if params.top_k > 0:
                scaled = scaled.masked_fill(scaled < scaled.topk(params.top_k, dim=-1).values[:, -1:], -torch.inf)
            law, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True)  # [T, V]
            is_close = ((law.cumsum(dim=-1) - law - params.top_p).abs() <= EDGE) & (law > 0) & (params.top_p < 1)
            sampled = order == torch.tensor(tokens)[:, None]
            at_edge.append((is_close & sampled).any(dim=-1))
            masses.append((law * is_close).sum(dim=-1))
    return torch.cat(at_edge), torch.cat(masses).float()
