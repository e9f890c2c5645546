"""ChatRequest -> POST /chat/completions -> ChatReply, for any server that speaks OpenAI's dialect, a local vLLM too.

The one module of `judges` that imports httpx. Foreign errors are mapped here, once. Never retries; never shows the key.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydantic import SecretStr

from judges.config import EndpointConfig
from judges.errors import InvalidVerdict, JudgeError, JudgeRefused, JudgeRejected, JudgeTimeout, JudgeUnavailable
from judges.types import ChatReply, ChatRequest, Message, Usage

MAX_REPLY_BYTES = 1 << 20
EXCERPT_CHARS = 200
RETRYABLE_STATUS = frozenset({408, 409, 425, 429})


class OpenAIChatClient:
    """Owns the HTTP connections to one endpoint. Opened at the first call, inside the running loop; `aclose()` ends it.

    The URL and the key are read from the environment at the first call, so that building a client needs no secret.
    """

    def __init__(self, endpoint: EndpointConfig, *, timeout_s: float = 30.0) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._http: httpx.AsyncClient | None = None
        self._url = ""
        self._key: SecretStr | None = None

    async def complete(self, request: ChatRequest) -> ChatReply:
        """Ask once; see `JudgeClient.complete` for what it raises."""
        self._open()
        body = await self._call("POST", "/chat/completions", _request_body(self._endpoint.model, request))
        return self._reply(body)

    async def check(self) -> None:
        """Make sure that a judge answers, before anything depends on it.

        Raises:
            JudgeConfigError: a secret or the URL is missing.
            JudgeUnavailable: nobody answers, or not in time.
            JudgeRejected: somebody answers, but does not take our key or is no such API.
        """
        self._open()
        try:
            try:
                await self._call("GET", "/models", None)
            except JudgeRejected as exc:
                if exc.status not in (404, 405):
                    raise
                # not every server lists its models: the least question there is tells as much
                await self.complete(ChatRequest(messages=(Message(role="user", content="ping"),), max_tokens=1))
        except (InvalidVerdict, JudgeRefused):
            return  # an answer, if an odd one: somebody is there
        except JudgeUnavailable as exc:
            raise JudgeUnavailable(
                f"no judge answers at {self._url}: {exc}. Start the judge's server, or correct endpoint.url "
                f"({self._endpoint.url}). To try without one: python -m judges.demo_server --port 8008"
            ) from exc
        except JudgeRejected as exc:
            key = self._endpoint.api_key or "none is configured"
            raise JudgeRejected(
                f"{self._url} answers, but not as a judge: {exc}. Check endpoint.url (usually ends in /v1), "
                f"endpoint.model ({self._endpoint.model}) and endpoint.api_key ({key}).",
                status=exc.status,
            ) from exc

    async def aclose(self) -> None:
        """Close the connections; the next call would open new ones."""
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()

    def _open(self) -> None:
        if self._http is not None:
            return
        self._url, self._key = self._endpoint.resolve_url(), self._endpoint.resolve_api_key()
        self._http = httpx.AsyncClient(
            trust_env=False,  # no proxy and no .netrc behind the recipe's back
            follow_redirects=False,  # a redirect would carry the key and the text elsewhere
            timeout=httpx.Timeout(self._timeout_s, connect=min(5.0, self._timeout_s)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),  # the pool bounds concurrency
            headers={"Accept-Encoding": "identity", "Accept": "application/json", "User-Agent": "grpo-toolkit"},
        )

    async def _call(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        """One exchange, whole or not at all: httpx's own timeouts begin anew with every byte."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._exchange(method, path, body)
        except (TimeoutError, httpx.TimeoutException) as exc:
            raise JudgeTimeout(f"no whole answer within {self._timeout_s:g} s ({type(exc).__name__})") from None
        except (httpx.TransportError, httpx.StreamError, OSError) as exc:
            raise JudgeUnavailable(self._redacted(f"{type(exc).__name__}: {exc}")) from None
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise JudgeRejected(self._redacted(f"{type(exc).__name__}: {exc}")) from None

    async def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        assert self._http is not None
        headers = {"Authorization": f"Bearer {self._key.get_secret_value()}"} if self._key else {}
        async with self._http.stream(method, self._url + path, json=body, headers=headers) as response:
            if 300 <= response.status_code < 400:
                host = urlsplit(response.headers.get("location", "")).hostname or "an unnamed host"
                raise JudgeRejected(f"redirects are not followed (to {host})", status=response.status_code)
            encoding = response.headers.get("content-encoding", "identity").strip().lower()
            if encoding not in ("", "identity"):
                raise JudgeRejected(f"the reply is encoded ({encoding[:20]}), though none was asked for")
            content = await _read_capped(response)
            if response.status_code != 200:
                raise self._error_of(response, content)
            return content

    def _error_of(self, response: httpx.Response, content: bytes) -> JudgeError:
        status = response.status_code
        excerpt = " ".join(self._redacted(content.decode("utf-8", "replace")).split())[:EXCERPT_CHARS]
        message = f"HTTP {status}: {excerpt or response.reason_phrase}"
        is_unpaid = status == 429 and b"insufficient_quota" in content  # waiting does not help
        if (status in RETRYABLE_STATUS or status >= 500) and not is_unpaid:
            return JudgeUnavailable(message, retry_after_s=retry_after_s(response.headers.get("retry-after")))
        return JudgeRejected(message, status=status)

    def _reply(self, body: bytes) -> ChatReply:
        try:
            content = json.loads(body)
            choice = content["choices"][0]
            text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
            finish_reason = choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as exc:
            raise InvalidVerdict(f"the reply is not a chat completion ({type(exc).__name__})") from None
        if refusal or finish_reason == "content_filter":
            raise JudgeRefused("the judge refused to judge this text")
        if not isinstance(text, str) or not text.strip():
            raise InvalidVerdict("the reply holds no text")
        return ChatReply(
            text=self._redacted(text),
            finish_reason=finish_reason if isinstance(finish_reason, str) else "",
            usage=_usage(content.get("usage")),
        )

    def _redacted(self, text: str) -> str:
        """A server may echo the key back. One under 8 characters ("EMPTY") guards nothing and would maul the text."""
        key = self._key.get_secret_value() if self._key else ""
        return text.replace(key, "[key]") if len(key) >= 8 else text


def retry_after_s(header: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, in seconds or as a date; None where it is absent or nonsense."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _request_body(model: str, request: ChatRequest) -> dict[str, Any]:
    optional = {"temperature": request.temperature, "seed": request.seed}
    return {
        "model": model,
        "messages": [{"role": message.role, "content": message.content} for message in request.messages],
        "max_tokens": request.max_tokens,
        **{name: value for name, value in optional.items() if value is not None},
    }


async def _read_capped(response: httpx.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > MAX_REPLY_BYTES:
            raise JudgeRejected(f"the reply is longer than {MAX_REPLY_BYTES} bytes")
    return bytes(content)


def _usage(usage: object) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    prompt_tokens, completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt_tokens, int) or not isinstance(completion_tokens, int):
        return None
    return Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
