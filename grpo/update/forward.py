"""A micro-batch through the policy and its reference: log-probabilities of the sampled tokens, as [B, T]."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo.batching import MicroBatch
from grpo.rollout.base import SamplingParams
from grpo.rollout.replay import Replay
from grpo.runtime.policy import Policy, language_model_head
from grpo.update.logprobs import logprobs_under_both_laws
from grpo.update.shared_prefix import predicting_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """What the loss needs of one pass. Entries outside the completion mask are 0."""

    logprobs: Tensor
    """[B, T] under the sampling law: penalties, temperature, filters."""
    plain_logprobs: Tensor
    """[B, T] under logits / temperature alone; what the KL compares."""
    entropy: Tensor
    """[B, T] of the sampling law, in nats."""
    num_forced: int
    """Sampled tokens that the replayed filter would have dropped."""


def policy_pass(policy: Policy, batch: MicroBatch, params: SamplingParams) -> Forward:
    """The policy's log-probabilities, with gradient where it is enabled."""
    return _pass(policy.causal_lm, batch, params, autocast=_autocast(policy))


def reference_logprobs(policy: Policy, batch: MicroBatch, params: SamplingParams) -> Tensor:
    """[B, T] the frozen reference's log-probabilities under logits / temperature."""
    with policy.reference() as reference:
        return _pass(reference, batch, params, autocast=_autocast(policy), is_replayed=False).plain_logprobs


def _autocast(policy: Policy) -> torch.autocast:
    """Float32 weights of a full training multiply in the compute dtype; adapters beside frozen weights need no cast."""
    is_needed = policy.trains_all_weights and policy.compute_dtype != torch.float32
    return torch.autocast(policy.device.type, policy.compute_dtype, enabled=is_needed)


def _pass(
    model: PreTrainedModel,
    batch: MicroBatch,
    params: SamplingParams,
    *,
    autocast: contextlib.AbstractContextManager[object],
    is_replayed: bool = True,
) -> Forward:
    rows, offsets = batch.completion_mask.nonzero(as_tuple=True)  # [N], [N]
    targets = batch.completion_ids[rows, offsets]  # [N]
    replay = Replay(params, batch.completion_ids, rows, offsets)
    head = language_model_head(model)
    with autocast:
        states = predicting_states(model, batch)  # [B, T, H]
    logprobs, entropy, plain = logprobs_under_both_laws(
        states[rows, offsets],  # [N, H] only completion positions reach the head
        head.weight,
        targets,
        temperature=params.temperature,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        process=replay.process if is_replayed and replay.changes_logits else None,
    )

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(batch.completion_mask.shape).index_put((rows, offsets), values)  # [B, T]

    return Forward(
        logprobs=spread(logprobs),
        plain_logprobs=spread(plain),
        entropy=spread(entropy),
        num_forced=replay.num_forced,
    )
