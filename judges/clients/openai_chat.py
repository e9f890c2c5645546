"""ChatRequest -> POST /chat/completions -> ChatReply, for any server that speaks OpenAI's dialect, a local vLLM too."""

from __future__ import annotations

from typing import Any

from judges.clients.http import Answer, JsonEndpoint
from judges.clients.reply import make_reply, whole_number
from judges.clients.retry_hints import remaining_requests, remaining_tokens
from judges.clients.transport import Resolve, resolve_host
from judges.config import EndpointConfig
from judges.errors import InvalidVerdict, JudgeRefused
from judges.types import ChatReply, ChatRequest, Message, Usage


class OpenAIChatClient:
    """Owns the HTTP connections to one endpoint. Opened at the first call, inside the running loop; `aclose()` ends it.

    The URL and the key are read from the environment at the first call, so that building a client needs no secret.
    """

    def __init__(self, endpoint: EndpointConfig, *, timeout_s: float = 30.0, resolve: Resolve = resolve_host) -> None:
        self._config = endpoint
        self._endpoint = JsonEndpoint(
            endpoint,
            timeout_s=timeout_s,
            key_headers=lambda key: {"Authorization": f"Bearer {key}"},
            resolve=resolve,
        )

    async def complete(self, request: ChatRequest) -> ChatReply:
        """Ask once; see `JudgeClient.complete` for what it raises."""
        body = _request_body(self._config, request)
        return self._reply(await self._endpoint.post("/chat/completions", body, max_tokens=request.max_tokens))

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
            choices = content["choices"]
            if choices == []:
                raise InvalidVerdict("the reply holds no choice", kind="empty", usage=usage)
            message, finish_reason = choices[0]["message"], choices[0].get("finish_reason")
            text, refusal = message.get("content"), message.get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError) as exc:
            raise InvalidVerdict(f"the reply is not a chat completion ({type(exc).__name__})", usage=usage) from None
        if refusal or finish_reason == "content_filter":
            raise JudgeRefused("the judge refused to judge this text", usage=usage)
        return make_reply(
            text=text,
            finish_reason=finish_reason,
            usage=usage,
            remaining_requests=remaining_requests(answer.headers),
            remaining_tokens=remaining_tokens(answer.headers),
            redacted=self._endpoint.redacted,
        )


def _request_body(config: EndpointConfig, request: ChatRequest) -> dict[str, Any]:
    optional: dict[str, Any] = {"temperature": request.temperature, "seed": request.seed}
    if request.json_schema is not None:
        schema = {"name": "verdict", "strict": True, "schema": dict(request.json_schema)}
        optional["response_format"] = {"type": "json_schema", "json_schema": schema}
    return {
        "model": config.model,
        "messages": [{"role": message.role, "content": message.content} for message in request.messages],
        config.token_limit: request.max_tokens,
        **{name: value for name, value in optional.items() if value is not None},
    }


def _usage(content: Any) -> Usage | None:
    usage = content.get("usage") if isinstance(content, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt_tokens, completion_tokens = (whole_number(usage.get(key)) for key in ("prompt_tokens", "completion_tokens"))
    if prompt_tokens is None or completion_tokens is None:
        return None
    return Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
