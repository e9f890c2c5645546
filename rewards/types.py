"""What a reward is given and what it answers. Knows no RL and no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardInput:
    """One completion to be scored, with what is known of its prompt."""

    prompt_id: str
    """Identifies the prompt; all inputs of one call share it (one call scores one group)."""
    prompt: str
    """The last user message, as plain text without chat markup."""
    completion: str
    """The sampled text, special tokens removed."""
    reference: str | None = None
    """The right answer, where the dataset has one."""
    num_tokens: int = 0
    """Tokens sampled, end token included."""
    finish_reason: Literal["stop", "length"] = "stop"
    """"length" means cut at max_new_tokens."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """The dataset's other columns, such as "kind" or "choices"."""
    messages: tuple[Mapping[str, str], ...] = ()
    """The whole chat, each turn a "role" and a "content"; empty where only `prompt` is known."""
    token_ids: tuple[int, ...] | None = None
    """[T] the sampled tokens, end token included; None where only the text is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A reward's answer for one completion. Missing is None, never 0."""

    value: float | None
    """The score, finite; None where no verdict could be had."""
    reason: str = ""
    """Why: shown in completions.jsonl; for a missing value, the cause."""
