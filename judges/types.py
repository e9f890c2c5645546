"""What is asked of a judge and what it answers. Knows no HTTP, no RL and no torch.

A `Judgement` is either `Scored` or `Failed`; a number cannot be had from `Failed`, and nothing has a default score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

FailureKind: TypeAlias = Literal[
    "deadline",  # the batch's time was up
    "timeout",  # no try was answered within its own time
    "unavailable",  # unreachable or overloaded on every try
    "rejected",  # the endpoint does not take such a request
    "refused",  # the judge will not judge this text
    "invalid_verdict",  # answers came, but none held a usable verdict
    "client_error",  # the judge client itself is broken
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of the chat with a judge."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str
    """What is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One call to a chat model, in no vendor's dialect."""

    messages: tuple[Message, ...]
    """The chat so far; the last turn is the user's."""
    max_tokens: int
    """Most tokens the reply may have."""
    temperature: float | None = None
    """None is not sent: some models take no sampling parameters."""
    seed: int | None = None
    """None is not sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens that an endpoint says it has counted."""

    prompt_tokens: int
    """Tokens read."""
    completion_tokens: int
    """Tokens written."""

    def plus(self, other: Usage) -> Usage:
        """Both together."""
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReply:
    """A chat model's answer."""

    text: str
    """The reply's text."""
    finish_reason: str
    """As the endpoint names it: "stop", "length", ...; "" where it names none."""
    usage: Usage | None = None
    """None where the endpoint counts nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeRequest:
    """One completion to be judged by one criterion."""

    id: str
    """Names the request in the audit."""
    question: str
    """What the completion answers."""
    completion: str
    """The text to be judged; untrusted."""
    reference: str | None = None
    """The right answer, where there is one."""
    criterion: str
    """What is judged, such as the rubric's name; one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A verdict was had."""

    value: float
    """Finite, within the judge's scale."""
    raw: str
    """The judge's whole reply."""
    usage: Usage | None
    """Tokens of all tries that answered; None where the endpoint counts nothing."""
    attempts: int
    """Calls made, the successful one included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """No verdict could be had. There is no number in here, and none may be made up."""

    kind: FailureKind
    """What went wrong, for counting."""
    attempts: int
    """Calls made; 0 where the time was up before the first."""
    fault: Literal["judge", "completion"]
    """"completion": this text makes a healthy judge fail, so that masking it could be exploited."""
    detail: str
    """The last cause, for people."""


Judgement: TypeAlias = Scored | Failed
