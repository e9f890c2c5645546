"""The sampling law of a completion's first token, written out; and whether counts of samples follow a law."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from grpo.rollout.base import SamplingParams
from grpo.runtime.policy import Policy


def exact_law(policy: Policy, prompt_ids: Sequence[int], params: SamplingParams) -> Tensor:
    """[V] float64 probabilities of the first token, every part of the law written out for this one position.

    Of what is banned only single tokens matter, for no completion has begun; a processor of one's own may be
    `vllm_bias.Bias`.
    """
    with torch.no_grad():
        logits = policy.causal_lm(torch.tensor([list(prompt_ids)]), use_cache=False).logits[0, -1].double()
    for token in set(prompt_ids):
        if params.repetition_penalty != 1 and params.repetition_over != "completion":
            value = float(logits[token])
            logits[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        if params.penalties_over != "completion":
            logits[token] -= params.presence_penalty + params.frequency_penalty * list(prompt_ids).count(token)
    for sequence in params.banned:
        if len(sequence) == 1:
            logits[sequence[0]] = -torch.inf
    for path, arguments in params.custom:
        assert path == "vllm_bias:Bias"
        logits[json.loads(arguments)["token"]] += json.loads(arguments)["by"]
    if params.min_new_tokens > 0:
        logits[list(params.end_token_ids)] = -torch.inf
    descending, order = (logits / params.temperature).sort(descending=True)
    if params.top_k > 0:
        descending[params.top_k :] = -torch.inf
    law = descending.softmax(dim=-1)
    law[law.cumsum(dim=-1) - law >= params.top_p] = 0.0  # the mass before a token has reached top_p
    law[law < params.min_p * law[0]] = 0.0
    return torch.zeros_like(law).scatter(0, order, law / law.sum())


def p_value(seen: Tensor, law: Tensor) -> float:
    """Of a chi-square test; cells are pooled, rarest first, until each expects 5.

    Args:
        seen: [V] counts; law: [V] probabilities.
    """
    order = law.argsort()
    expected, counts = (law * seen.sum())[order], seen[order].double()
    chi, cells, pooled_expected, pooled_seen = 0.0, 0, 0.0, 0.0
    for one_expected, one_seen in zip(expected.tolist(), counts.tolist(), strict=True):
        pooled_expected, pooled_seen = pooled_expected + one_expected, pooled_seen + one_seen
        if pooled_expected >= 5:
            chi += (pooled_seen - pooled_expected) ** 2 / pooled_expected
            cells, pooled_expected, pooled_seen = cells + 1, 0.0, 0.0
    degrees = torch.tensor((cells - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(chi / 2, dtype=torch.float64)))
