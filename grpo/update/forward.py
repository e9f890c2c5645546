"""A micro-batch through the policy and its reference: log-probabilities of the sampled tokens, as [B, T]."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor

from grpo.batching import MicroBatch
from grpo.rollout.base import SamplingParams
from grpo.rollout.replay import Replay, ReplayedPrompts
from grpo.rollout.transformers_engine import PROBE_TOLERANCE, ROUNDED_TOLERANCE
from grpo.runtime.policy import Policy, language_model_head
from grpo.update.head import Process
from grpo.update.logprobs import logprobs_under_both_laws, plain_logprobs
from grpo.update.shared_prefix import can_share_prompts, predicting_states

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


def replay_of(batch: MicroBatch, params: SamplingParams, *, remembers: bool = False) -> Replay:
    """The sampling law over a micro-batch's loss tokens; `remembers`: keeps the filters' sets for further passes."""
    rows, offsets = batch.completion_mask.nonzero(as_tuple=True)  # [N], [N]
    prompts = ReplayedPrompts(
        token_ids=batch.prompt_ids, lengths=batch.prompt_mask.sum(dim=-1), of_row=batch.prompt_of_row
    )
    return Replay(params, batch.completion_ids, rows, offsets, prompts=prompts, remembers=remembers)


@torch.no_grad()
def try_prompt_sharing(policy: Policy, batch: MicroBatch) -> str | None:
    """Decide, once a run, whether prompts are computed once for their completions; returns why not.

    A model may keep plain keys and values and yet not look at them as its own pass over the whole row would. So a few
    completions of the first batch go both ways, and their log-probabilities (at temperature 1) have to agree. Where
    they are too few or too short to tell, it stays undecided: then the two ways are one.
    """
    if not can_share_prompts(policy.causal_lm):
        policy.shares_prompts = False
        return "it keeps more than plain keys and values of every token, or not of every token"
    policy.shares_prompts = True
    if batch.images is not None:  # the engine has tried them, and there is no other way
        return None
    few = batch.rows(_telling_rows(batch))
    if len(few.prompt_ids) == 1 and int((few.completion_mask.sum(dim=1) > 1).sum()) < 2:
        policy.shares_prompts = None
        return None
    found: list[Tensor] = []
    with _arithmetic(policy):
        for shares in (True, False):
            states = predicting_states(policy.causal_lm, few, shares=shares)
            found.append(_read_out(policy.causal_lm, states, few, temperature=1.0).logprobs[few.completion_mask])
    difference = float((found[0] - found[1]).abs().mean())
    if not math.isfinite(difference):
        policy.shares_prompts = None  # what is not finite has a report of its own; the next step tries again
        return None
    if difference <= PROBE_TOLERANCE.get(policy.compute_dtype, ROUNDED_TOLERANCE):
        return None
    policy.shares_prompts = False
    return f"with shared prompts its log-probabilities differ by {difference:.2g} nats"


def _telling_rows(batch: MicroBatch) -> Tensor:
    """Rows in which one completion could be taken for another's: the two longest, and the longest of another prompt."""
    order = batch.completion_mask.sum(dim=1).argsort(descending=True, stable=True)
    prompts = batch.prompt_of_row[order]
    return torch.cat([order[:2], order[prompts != prompts[0]][:1]]).unique()


def policy_pass(
    policy: Policy,
    batch: MicroBatch,
    params: SamplingParams,
    *,
    replay: Replay | None = None,
    entropy_has_gradient: bool = False,
) -> Forward:
    """The policy's log-probabilities, with gradient where it is enabled. Args: replay: made anew where None."""
    replay = replay or replay_of(batch, params)
    with _arithmetic(policy):
        states = predicting_states(policy.causal_lm, batch, shares=policy.shares_prompts)  # [B, T, H]
    return _read_out(
        policy.causal_lm,
        states,
        batch,
        temperature=params.temperature,
        process=replay.process if replay.changes_logits else None,
        entropy_has_gradient=entropy_has_gradient,
    )


def reference_logprobs(policy: Policy, batch: MicroBatch, params: SamplingParams) -> Tensor:
    """[B, T] the frozen reference's log-probabilities under logits / temperature."""
    with policy.reference() as reference:
        with _arithmetic(policy):
            states = predicting_states(reference, batch, shares=policy.shares_prompts)  # [B, T, H]
        rows, offsets = batch.completion_mask.nonzero(as_tuple=True)  # [N], [N]
        head = language_model_head(reference)
        found = plain_logprobs(
            states[rows, offsets],
            head.weight,
            batch.completion_ids[rows, offsets],
            temperature=params.temperature,
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
        )
        return found.new_zeros(batch.completion_mask.shape).index_put((rows, offsets), found)


@contextlib.contextmanager
def _arithmetic(policy: Policy) -> Iterator[None]:
    """Float32 weights that learn multiply in the compute dtype, as the frozen ones do.

    peft would turn the input of every adapter into float32 and the sum back, which takes longer than the products.
    """
    is_mixed = policy.compute_dtype != torch.float32
    with contextlib.ExitStack() as stack:
        if is_mixed and isinstance(policy.model, PeftModel):
            stack.enter_context(disable_input_dtype_casting(policy.model))
        stack.enter_context(torch.autocast(policy.device.type, policy.compute_dtype, enabled=is_mixed))
        yield


def _read_out(
    model: PreTrainedModel,
    states: Tensor,
    batch: MicroBatch,
    *,
    temperature: float,
    process: Process | None = None,
    entropy_has_gradient: bool = False,
) -> Forward:
    rows, offsets = batch.completion_mask.nonzero(as_tuple=True)  # [N], [N]
    head = language_model_head(model)
    logprobs, entropy, plain = logprobs_under_both_laws(
        states[rows, offsets],  # [N, H] only completion positions reach the head
        head.weight,
        batch.completion_ids[rows, offsets],
        temperature=temperature,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        process=process,
        entropy_has_gradient=entropy_has_gradient,
    )

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(batch.completion_mask.shape).index_put((rows, offsets), values)  # [B, T]

    return Forward(logprobs=spread(logprobs), plain_logprobs=spread(plain), entropy=spread(entropy))
