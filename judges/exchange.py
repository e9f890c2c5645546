"""What a question looks like to an endpoint, and what its reply says. Knows no network, no retries and no clock."""

from __future__ import annotations

from dataclasses import dataclass

from judges.cache import request_key
from judges.config import EndpointConfig, JudgeConfig
from judges.errors import InvalidVerdict
from judges.modes.base import Question
from judges.prompts import RenderedPrompt, Rubric, render_comparison, render_prompt
from judges.types import ChatReply, ChatRequest, Message, Verdict
from judges.verdicts import parse_group_verdict, parse_pair_verdict, parse_verdict, verdict_schema


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Turns questions into requests and replies into verdicts, by one judge's settings."""

    config: JudgeConfig
    rubric: Rubric

    def prompt(self, question: Question) -> RenderedPrompt:
        """The question in words, with a nonce of its own."""
        requests = question.as_requests()
        scale, max_chars = self.config.scale, self.config.max_input_chars
        if question.mode == "pointwise":
            return render_prompt(self.rubric, requests[0], low=scale.low, high=scale.high, max_input_chars=max_chars)
        return render_comparison(
            self.rubric, requests, mode=question.mode, low=scale.low, high=scale.high, max_input_chars=max_chars
        )

    def chat(self, endpoint: EndpointConfig, question: Question, text: str, *, is_structured: bool) -> ChatRequest:
        """What is sent. Args: is_structured: with the schema that the server is to hold the reply to."""
        scale = self.config.scale
        return ChatRequest(
            messages=(Message(role="user", content=text),),
            max_tokens=self.config.max_tokens * len(question.completions),
            temperature=endpoint.temperature,
            seed=endpoint.seed,
            json_schema=verdict_schema(question.mode, low=scale.low, high=scale.high) if is_structured else None,
        )

    def key(self, endpoint: EndpointConfig, question: Question, prompt: RenderedPrompt, chat: ChatRequest) -> str:
        """Under which a cache keeps the verdict."""
        return request_key(
            endpoint,
            prompt_sha256=prompt.sha256,
            chat=chat,
            scale=self.config.scale,
            sample_index=question.sample_index,
        )

    def verdict(
        self, endpoint: EndpointConfig, question: Question, prompt: RenderedPrompt, reply: ChatReply
    ) -> Verdict:
        """What the reply says.

        Raises:
            InvalidVerdict: nothing usable.
        """
        if not reply.text.strip():
            raise InvalidVerdict("the reply holds no text", kind="empty")
        try:
            scores, raws = self._scores(question, prompt, reply.text)
        except InvalidVerdict as exc:
            if not reply.is_truncated:
                raise
            raise InvalidVerdict(f"the reply was cut off by its token limit; {exc}", kind="truncated") from None
        price, usage = endpoint.price, reply.usage
        cost = (
            price.cost(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)
            if price and usage
            else None
        )
        return Verdict(scores=scores, raws=raws, endpoint=endpoint.label, usage=usage, cost=cost)

    def _scores(
        self, question: Question, prompt: RenderedPrompt, text: str
    ) -> tuple[tuple[float | None, ...], tuple[str, ...]]:
        scale = self.config.scale
        if question.mode == "pointwise":
            return (parse_verdict(text, nonce=prompt.nonce, low=scale.low, high=scale.high),), (text,)
        if question.mode == "pairwise":
            winner = parse_pair_verdict(text, nonce=prompt.nonce, ids=prompt.ids)
            first_won = 0.5 if winner is None else float(winner == prompt.ids[0])
            return (first_won, 1.0 - first_won), (text, text)
        found = parse_group_verdict(text, nonce=prompt.nonce, ids=prompt.ids, low=scale.low, high=scale.high)
        rows = [found.get(one_id) for one_id in prompt.ids]
        return tuple(row.score if row else None for row in rows), tuple(row.raw if row else "" for row in rows)
