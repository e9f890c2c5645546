"""What a judge client is: one async method. Yours needs no base class."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from judges.types import ChatReply, ChatRequest


@runtime_checkable
class JudgeClient(Protocol):
    """Sends one request to one model. Never retries and never sleeps: the pool does."""

    async def complete(self, request: ChatRequest) -> ChatReply:
        """Ask once.

        Raises:
            JudgeUnavailable: worth another try; its kinds are JudgeTimeout and JudgeOverloaded.
            JudgeRejected: this request is not worth another try here.
            JudgeDenied: nothing is worth another try here.
            JudgeRefused: the model will not judge this text.
            InvalidVerdict: an answer came that holds no text.
            JudgeConfigError: a setting is wrong or a secret is missing.
        """
        ...

    async def aclose(self) -> None:
        """Let go of what is held. May be called twice."""
        ...
