"""ChatRequest -> POST /messages -> ChatReply, in Anthropic's dialect. The endpoint's URL ends in /v1."""

from __future__ import annotations

from typing import Any

from judges.clients.http import Answer, JsonEndpoint
from judges.clients.reply import make_reply, whole_number
from judges.clients.retry_hints import remaining_requests, remaining_tokens
from judges.clients.transport import Resolve, resolve_host
from judges.config import EndpointConfig
from judges.errors import InvalidVerdict, JudgeRefused
from judges.types import ChatReply, ChatRequest, Message, Usage

VERSION = "2023-06-01"
PROMPT_COUNTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


class AnthropicMessagesClient:
    """Owns the HTTP connections to one endpoint. Opened at the first call, inside the running loop; `aclose()` ends it.

    The URL and the key are read from the environment at the first call, so that building a client needs no secret.
    """

    def __init__(self, endpoint: EndpointConfig, *, timeout_s: float = 30.0, resolve: Resolve = resolve_host) -> None:
        self._config = endpoint
        self._endpoint = JsonEndpoint(
            endpoint,
            timeout_s=timeout_s,
            key_headers=lambda key: {"x-api-key": key},
            headers={"anthropic-version": VERSION},
            resolve=resolve,
        )

    async def complete(self, request: ChatRequest) -> ChatReply:
        """Ask once; see `JudgeClient.complete` for what it raises. A seed is not sent: the API has none."""
        body = _request_body(self._config, request)
        return self._reply(await self._endpoint.post("/messages", body, max_tokens=request.max_tokens))

    async def check(self) -> None:
        """Make sure that a judge answers; see `JsonEndpoint.check`."""
        await self._endpoint.check(
            lambda: self.complete(ChatRequest(messages=(Message(role="user", content="ping"),), max_tokens=1))
        )

    async def aclose(self) -> None:
        """Close the connections; the next call would open new ones."""
        await self._endpoint.aclose()

    def _reply(self, answer: Answer) -> ChatReply:
        content = answer.content
        usage = _usage(content)
        try:
            blocks, stop_reason = content["content"], content.get("stop_reason")
            texts = [block["text"] for block in blocks if block["type"] == "text"]
            text = "".join(texts)  # thinking alone is no answer
        except (KeyError, TypeError, AttributeError) as exc:
            raise InvalidVerdict(f"the reply is not a message ({type(exc).__name__})", usage=usage) from None
        if stop_reason == "refusal":
            raise JudgeRefused("the judge refused to judge this text", usage=usage)
        return make_reply(
            text=text,
            finish_reason=stop_reason,
            usage=usage,
            remaining_requests=remaining_requests(answer.headers),
            remaining_tokens=remaining_tokens(answer.headers),
            redacted=self._endpoint.redacted,
        )


def _request_body(config: EndpointConfig, request: ChatRequest) -> dict[str, Any]:
    system = "\n\n".join(message.content for message in request.messages if message.role == "system")
    body: dict[str, Any] = {
        "model": config.model,
        "max_tokens": request.max_tokens,
        "messages": [
            {"role": message.role, "content": message.content}
            for message in request.messages
            if message.role != "system"
        ],
    }
    if system:
        body["system"] = system
    if request.temperature is not None:  # newer models refuse any
        body["temperature"] = request.temperature
    if request.json_schema is not None:
        body["output_config"] = {"format": {"type": "json_schema", "schema": dict(request.json_schema)}}
    return body


def _usage(content: Any) -> Usage | None:
    usage = content.get("usage") if isinstance(content, dict) else None
    if not isinstance(usage, dict):
        return None
    counts = [whole_number(usage.get(key) or 0) for key in PROMPT_COUNTS]
    completion_tokens = whole_number(usage.get("output_tokens"))
    if usage.get("input_tokens") is None or completion_tokens is None or None in counts:
        return None
    return Usage(prompt_tokens=sum(count or 0 for count in counts), completion_tokens=completion_tokens)
