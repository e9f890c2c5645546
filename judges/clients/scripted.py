"""The test double that we ship: a judge that says what a function says."""

from __future__ import annotations

import json
from collections.abc import Callable

from judges.prompts import read_fences
from judges.types import ChatReply, ChatRequest


class ScriptedClient:
    """Answers from a function, and remembers what it was asked.

    Use: `JudgePool(client=ScriptedClient(lambda request: verdict_for(request, 1.0)), config=config)`. The function
    may raise, to play a judge that fails.
    """

    def __init__(self, script: Callable[[ChatRequest], str]) -> None:
        self._script = script
        self.requests: list[ChatRequest] = []
        """Every request so far, in the order of the calls."""

    async def complete(self, request: ChatRequest) -> ChatReply:
        self.requests.append(request)
        return ChatReply(text=self._script(request), finish_reason="stop")

    async def aclose(self) -> None:
        return


def verdict_for(request: ChatRequest, score: float) -> str:
    """A well-formed verdict on a prompt that our templates made."""
    nonce, _ = read_fences(request.messages[-1].content)
    return json.dumps({"nonce": nonce, "score": score})
