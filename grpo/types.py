"""The records that cross from one stage to the next. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question to be answered K times."""

    id: str
    """Unique within the dataset, stable over runs."""
    messages: tuple[Message, ...]
    """The chat so far; the last turn is the user's. "<image>" stands in it for each of the images, if there are any."""
    objectives: tuple[str, ...]
    """Names of the objectives that score this prompt's completions."""
    reference: str | None = None
    """The right answer, where the dataset has one."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """The dataset's other columns, such as "kind" or "choices"."""
    images: tuple[str, ...] = ()
    """Absolute paths of image files, in the order in which the messages show them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer to one prompt."""

    token_ids: tuple[int, ...]
    """[T] sampled tokens, the first end token included, prompt excluded."""
    text: str
    """The tokens decoded, special tokens removed."""
    sampler_logprobs: tuple[float, ...]
    """[T] natural-log probabilities under the sampling law, as the engine computed them."""
    finish_reason: Literal["stop", "length"]
    """"stop": ended by an end token; "length": cut at max_new_tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """One prompt and its K completions."""

    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    """[T_prompt] the rendered chat, as it was given to the model."""
    completions: tuple[Completion, ...]
    """[K]"""
    image_digest: str | None = None
    """Of the prompt's image files as the model read them; None without images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one objective said about one completion."""

    value: float | None
    """The objective's score: the weighted sum of its rewards; None where one of them is missing."""
    parts: Mapping[str, float | None]
    """Each reward's own value, by its name."""
    reason: str = ""
    """Why; for a missing value, the cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group with its verdicts."""

    rollout: RolloutGroup
    verdicts: tuple[Mapping[str, Verdict], ...]
    """[K] objective name -> verdict; only the objectives that apply to the prompt."""
