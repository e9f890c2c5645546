"""The test doubles that we ship: a judge that says what a function says, and one that needs no model at all."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable

from judges.errors import JudgeUnavailable
from judges.prompts import read_fences
from judges.types import ChatReply, ChatRequest
from judges.verdicts import TIE

ScriptedReply = str | ChatReply | Exception
"""What a script may say: a text, a whole reply, or the failure to play."""


class ScriptedClient:
    """Answers from a function, and remembers what it was asked.

    Use: `JudgePool(client=ScriptedClient(lambda request: verdict_for(request, 1.0)), config=config)`. The function
    may raise, or return an exception, to play a judge that fails.
    """

    def __init__(
        self, script: Callable[[ChatRequest], ScriptedReply], *, latency_s: Callable[[ChatRequest], float] | None = None
    ) -> None:
        """
        Args:
            script: what to answer.
            latency_s: seconds before each answer; None answers at once.
        """
        self._script = script
        self._latency_s = latency_s
        self.requests: list[ChatRequest] = []
        """Every request so far, in the order of the calls."""

    async def complete(self, request: ChatRequest) -> ChatReply:
        """Say what the script says."""
        self.requests.append(request)
        if self._latency_s is not None:
            await asyncio.sleep(self._latency_s(request))
        answer = self._script(request)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, ChatReply) else ChatReply(text=answer, finish_reason="stop")

    async def check(self) -> None:
        """It is always there."""

    async def aclose(self) -> None:
        """Nothing is held."""


def in_turn(*answers: ScriptedReply) -> Callable[[ChatRequest], ScriptedReply]:
    """A script that goes through the answers, one a call; the last repeats."""
    left = list(answers)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


def stub_client(
    *,
    seed: int = 0,
    low: float = 0.0,
    high: float = 1.0,
    failure_rate: float = 0.0,
    latency_s: Callable[[ChatRequest], float] | None = None,
) -> ScriptedClient:
    """A judge without a model: each text gets a score drawn by its hash, the same in every mode, process and year.

    Args:
        seed: draws other scores.
        low: the scale's worst score.
        high: the scale's best score.
        failure_rate: share of tries that find it unavailable, drawn by a hash of the prompt, nonce included.
        latency_s: seconds before each answer.
    """

    def script(request: ChatRequest) -> ScriptedReply:
        if _draw(seed, "failure", request.messages[-1].content) < failure_rate:
            return JudgeUnavailable("the stub judge fails on purpose")
        return verdict_by(request, lambda text: low + (high - low) * _draw(seed, "score", text))

    return ScriptedClient(script, latency_s=latency_s)


def verdict_for(request: ChatRequest, score: float) -> str:
    """A well-formed verdict of this score on a prompt about one text that our templates made."""
    nonce, _ = read_fences(request.messages[-1].content)
    return json.dumps({"nonce": nonce, "reason": "", "score": score})


def verdict_by(request: ChatRequest, score_of: Callable[[str], float]) -> str:
    """A well-formed verdict on a prompt that our templates made, in the mode that it asks for.

    Args:
        request: what a judge is asked.
        score_of: a completion's text -> its score; of a pair the higher wins, equals are a tie.
    """
    prompt = request.messages[-1].content
    nonce, fences = read_fences(prompt)
    scores = {name: score_of(text) for name, text in fences.items() if name.startswith("completion")}
    if list(scores) == ["completion"]:
        return json.dumps({"nonce": nonce, "reason": "", "score": scores["completion"]})
    by_id = {name.removeprefix("completion "): score for name, score in scores.items()}
    if '"winner"' in prompt.rpartition(">>>")[2]:
        best = max(by_id.values())
        winners = [one for one, score in by_id.items() if score == best]
        return json.dumps({"nonce": nonce, "reason": "", "winner": winners[0] if len(winners) == 1 else TIE})
    verdicts = [{"id": one, "reason": "", "score": score} for one, score in by_id.items()]
    return json.dumps({"nonce": nonce, "verdicts": verdicts})


def _draw(seed: int, what: str, content: str) -> float:
    """A number in [0, 1), the same for the same content."""
    digest = hashlib.sha256(f"{seed}\n{what}\n{content}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / (1 << 48)
