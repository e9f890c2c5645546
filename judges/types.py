"""What is asked of a judge and what it answers. Knows no HTTP, no RL and no torch.

A `Judgement` is either `Scored` or `Failed`; a number cannot be had from `Failed`, and nothing has a default score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

FailureKind: TypeAlias = Literal[
    "deadline",  # the batch's time was up
    "timeout",  # no try was answered within its own time
    "unavailable",  # unreachable, cut off or erring on every try
    "overloaded",  # the last try, too, was answered with 429
    "breaker_open",  # every endpoint was resting after too many failures, until the time was up
    "auth",  # the endpoint does not take our key (401, 403)
    "quota",  # the account's money is used up
    "budget",  # the recipe's cap on money is reached
    "rejected",  # the endpoint does not take such a request
    "too_long",  # the text does not fit the judge
    "redirect",  # the endpoint points elsewhere, and nobody follows
    "tls",  # the endpoint cannot prove who it is
    "address",  # the endpoint's name leads where no judge may be
    "blank",  # the completion holds no text: no judge is asked
    "refused",  # the judge will not judge this text
    "invalid_verdict",  # answers came, but none held a usable verdict
    "empty",  # answers came, but held no text
    "truncated",  # answers came, but were cut off by their token limit
    "reply_too_large",  # the answer went on beyond the byte cap
    "quorum",  # too few of an ensemble's judges gave a verdict
    "disagreement",  # an ensemble's judges are too far apart
    "client_error",  # the judge client itself is broken
    "not_recorded",  # the audit that is replayed holds no such judgement
]

TRUNCATED_REASONS = frozenset({"length", "max_tokens", "model_context_window_exceeded"})
"""Finish reasons that say a token limit cut the reply off, in OpenAI's dialect and Anthropic's."""

RETRYABLE_KINDS: frozenset[FailureKind] = frozenset(
    {"deadline", "timeout", "unavailable", "overloaded", "breaker_open"}
)
"""What time may heal: the same request, asked again later, may be judged."""

Fault: TypeAlias = Literal["judge", "completion"]

Origin: TypeAlias = Literal["asked", "shared", "cached", "replayed"]


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
    json_schema: Mapping[str, Any] | None = None
    """JSON schema that the server holds the reply to; None leaves the form to the text."""


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
    """None where the endpoint counts nothing, or counts nonsense."""
    remaining_requests: int | None = None
    """Requests that the endpoint's rate limit still allows in its window; None where it does not say."""
    remaining_tokens: int | None = None
    """Tokens that it still allows; None where it does not say."""

    @property
    def is_truncated(self) -> bool:
        """Whether a token limit cut it off."""
        return self.finish_reason in TRUNCATED_REASONS


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
    sample_index: int = 0
    """Equal requests are asked once; another index asks for another, independent verdict on the same text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One try at one endpoint."""

    endpoint: str
    """The endpoint's name."""
    outcome: Literal["answered", "cancelled"] | FailureKind
    """"answered" with a usable verdict; "cancelled" where a twin was faster or nobody waited any more."""
    latency_s: float
    """From sending to the outcome."""
    waited_s: float = 0.0
    """Before sending: for a slot, a rate limit, a breaker or a retry's turn."""
    is_hedge: bool = False
    """A second, simultaneous try of a slow call."""
    status: int | None = None
    """The HTTP status of a failure; None where it has none."""
    cost: float | None = None
    """Money, in the price's currency; None where it is unknown (no price, or cancelled: it may be billed)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one valid reply says of the texts it was asked about. What a cache keeps."""

    scores: tuple[float | None, ...]
    """[N], one per text, in the order of the question; None where the reply says nothing usable of a text."""
    raws: tuple[str, ...]
    """[N], what the reply says of each text, word for word."""
    endpoint: str
    """The name of the endpoint that answered."""
    usage: Usage | None
    """Tokens of this one reply; None where the endpoint counts nothing."""
    cost: float | None
    """Money for this one reply; None where it is unknown."""

    @property
    def is_complete(self) -> bool:
        """Whether every text has its score; only such a verdict is kept."""
        return None not in self.scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A verdict was had."""

    value: float
    """Finite, within the judge's scale."""
    raw: str
    """The judge's words that hold the verdict; several replies (permutations, pairs, judges), one a line."""
    usage: Usage | None
    """Tokens of all tries that answered, shared among the texts of one call; None where nothing was counted."""
    attempts: int
    """Calls made, the successful one included; 0 for a cached verdict."""
    cost: float | None = None
    """Money for this verdict alone: a call's cost is shared among its texts. None where it is unknown."""
    endpoint: str = ""
    """Who answered; several names joined by "+"."""
    origin: Origin = "asked"
    """"shared": an equal request in flight was waited for; "cached" and "replayed": nobody was asked."""
    disagreement: float | None = None
    """Standard deviation among an ensemble's judges; None without an ensemble."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """No verdict could be had. There is no number in here, and none may be made up."""

    kind: FailureKind
    """What went wrong, for counting."""
    attempts: int
    """Calls made; 0 where the time was up before the first."""
    fault: Fault
    """"completion": this text makes a healthy judge fail, so that masking it could be exploited."""
    detail: str
    """The last cause, for people."""
    usage: Usage | None = None
    """Tokens that were counted all the same."""
    cost: float | None = None
    """Money that was spent all the same; None where it is unknown, or nothing was asked."""

    @property
    def is_retryable(self) -> bool:
        """Whether the same request may be judged if it is asked again later."""
        return self.kind in RETRYABLE_KINDS


Judgement: TypeAlias = Scored | Failed
