"""What every rollout engine takes and gives. Token ids in, token ids out: nothing is re-tokenised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from grpo.prompts import EncodedPrompt
from grpo.runtime.policy import Policy
from grpo.types import RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The sampling law: penalties, then temperature, then top-k, top-p and min-p."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy, for evaluation only."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    """Drops tokens less likely than this share of the likeliest; 0 drops none."""
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    """No end token among the first so many."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalties_over: Literal["completion", "prompt", "both"] = "completion"
    """Where presence and frequency are counted."""
    repetition_penalty: float = 1.0
    repetition_over: Literal["completion", "prompt", "both"] = "both"
    """Where the tokens of the repetition penalty are looked for."""
    banned: tuple[tuple[int, ...], ...] = ()
    """Token sequences that no completion may hold."""
    no_repeat_ngram: int = 0
    """No sequence of so many tokens twice in a completion; 0 allows all."""
    custom: tuple[tuple[str, str], ...] = ()
    """Processors of one's own: (package.module:name, parameters as JSON), in their order."""
    end_token_ids: tuple[int, ...]
    """A completion ends at the first of these, which belongs to it."""


class RolloutEngine(Protocol):
    """Samples completions from the policy's current weights."""

    def sample(
        self, prompts: Sequence[EncodedPrompt], num_samples: int, *, params: SamplingParams, seed: int
    ) -> Iterator[RolloutGroup]:
        """Yield each prompt's group of num_samples completions as soon as it is complete, in any order.

        A completion depends on (seed, prompt id, index) and the weights, not on what it is batched with.
        """
        ...

    def load_weights(self, policy: Policy) -> None:
        """Take the policy's current weights. Call after every optimizer step, before sampling."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
