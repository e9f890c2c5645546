"""Whether an engine samples from the policy's weights: asked once, with weights that were disturbed on purpose.

A sync that does nothing (stale or base weights, a prefix cache of the old ones, an adapter that was not taken) looks
like training that does not learn. Here it is found before the first step.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator

import torch

from grpo.errors import EngineError
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import RolloutEngine, SamplingParams
from grpo.runtime.policy import Policy
from grpo.types import Completion, RolloutGroup

NUM_SAMPLES = 8
NUM_TOKENS = 4
MIN_CHANGE = 1e-3
"""Nats by which the disturbed weights must at least move a token's log-probability."""
MAX_RESIDUE = 1 / 3
"""Share of that change that may be left with the true weights: bfloat16 servers compute a request in other batches."""


Together = Callable[[Callable[[], RolloutGroup]], RolloutGroup]


def check_engine_follows(
    engine: RolloutEngine,
    policy: Policy,
    prompt: EncodedPrompt,
    params: SamplingParams,
    *,
    together: Together = lambda do: do(),
) -> None:
    """Sync, sync disturbed weights, sync the true ones again: the log-probabilities must change and come back.

    The policy is afterwards what it was, to the bit, on an exception too.

    Args:
        prompt: any; a few tokens are sampled after it.
        params: of the run; only its end tokens are used.
        together: has every rank do it, and raises on each what one of them meets; see `Ranks.together`. A rank that
            stopped alone would leave the others waiting for it at the next sync.
    Raises:
        EngineError: the disturbed weights did not reach the engine, or stayed in it.
    """
    plain = SamplingParams(max_new_tokens=NUM_TOKENS, end_token_ids=params.end_token_ids)

    def sampled() -> RolloutGroup:
        engine.load_weights(policy)
        (group,) = engine.sample([prompt], NUM_SAMPLES, params=plain, seed=0)
        return group

    before = together(sampled)
    with _disturbed(policy):
        disturbed = together(sampled)
    after = together(sampled)
    change, residue = _difference(before, disturbed), _difference(before, after)
    name = type(engine).__name__
    if change < MIN_CHANGE:
        raise EngineError(
            f"{name} does not follow the policy: with disturbed weights synced, its tokens' log-probabilities moved by "
            f"{change:.1e} nats only. It would sample from the same old weights for the whole run. Look at "
            "rollout.engine.sync, and that the engine serves the recipe's model."
        )
    if residue > MAX_RESIDUE * change:
        raise EngineError(
            f"{name} does not come back to the policy's weights: disturbed weights moved its tokens' log-probabilities "
            f"by {change:.1e} nats, and with the true ones synced again they are still off by {residue:.1e}. Something "
            "of the old weights stays in it: a prefix cache, a tied head, an adapter."
        )


def _difference(one: RolloutGroup, other: RolloutGroup) -> float:
    """Nats, the median over samples: one draw at the edge between two tokens must not decide."""
    return statistics.median(_largest(*pair) for pair in zip(one.completions, other.completions, strict=True))


def _largest(one: Completion, other: Completion) -> float:
    """Largest difference up to and with the first token that differs, which counts as 1 nat at least."""
    largest = 0.0
    tokens = zip(one.token_ids, other.token_ids, one.sampler_logprobs, other.sampler_logprobs, strict=False)
    for token, other_token, logprob, other_logprob in tokens:
        largest = max(largest, abs(logprob - other_logprob))
        if token != other_token:
            return max(largest, 1.0)
    return largest


@contextlib.contextmanager
def _disturbed(policy: Policy) -> Iterator[None]:
    """Noise on every trainable parameter, small beside a weight and large beside a training step."""
    generator = torch.Generator().manual_seed(0)
    parameters = policy.trainable_parameters()
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for parameter in parameters.values():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                scale = float(parameter.std()) if parameter.numel() > 1 else 0.0
                parameter += noise * (0.1 * scale or 0.05)  # LoRA's B is all zeros before the first step
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
