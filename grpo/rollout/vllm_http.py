"""One vLLM server over HTTP: a request in, JSON out; every failure is an `EngineError` that names server and cause.

The one home of httpx in `grpo`. Knows nothing of sampling or weights.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import ssl
from collections.abc import Mapping
from typing import Any

import httpx
from pydantic import SecretStr

from grpo.config import VllmServerConfig
from grpo.errors import ConfigError, EngineError
from grpo.rollout.vllm_facts import is_loopback
from judges.clients.redaction import Redactor

MAX_REPLY_BYTES = 1 << 26
"""Of one answer: about 300 bytes a token, so 200,000 tokens."""
MAX_QUOTED_CHARS = 600
"""Of what a server said, in an error."""
CONNECT_TIMEOUT_S = 10.0
CONTROL_TIMEOUT_S = 60.0
"""For a question about the server itself."""
IDLE_CONNECTION_S = 2.0
"""A connection idle for longer is not used again: vLLM closes it after 5 s, maybe while a request is on its way."""


class NoAnswer(EngineError):
    """The server could not be reached, or broke the connection: another one may answer."""


class Refused(EngineError):
    """The server answered with an error."""

    def __init__(self, message: str, status: int = 0) -> None:
        """Args: status: HTTP's; the default is for pickle, which sets it afterwards."""
        super().__init__(message)
        self.status = status


class ServerClient:
    """The connections of an engine to its servers, with their key. `await client.aclose()` at the end."""

    def __init__(self, config: VllmServerConfig, *, max_reply_bytes: int = MAX_REPLY_BYTES) -> None:
        """Connects to nothing yet.

        Raises:
            ConfigError: the key's variable is not set.
        """
        key = _api_key(config)
        self.redactor = Redactor(SecretStr(key) if key else None)
        self.redactor.attach()
        self._max_reply_bytes = max_reply_bytes
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._http = httpx.AsyncClient(
            headers=headers,
            trust_env=False,
            follow_redirects=False,
            verify=_certificates(),
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=IDLE_CONNECTION_S),
        )

    async def aclose(self) -> None:
        """Close the connections. May be called twice."""
        self.redactor.detach()
        await self._http.aclose()

    async def ask(self, method: str, url: str, body: Any) -> tuple[int, bytes]:
        """Status and content of one answer.

        Raises:
            NoAnswer: the connection could not be made, or broke.
            EngineError: the answer is too long.
        """
        try:
            async with self._http.stream(method, url, json=body) as response:
                content = bytearray()
                async for part in response.aiter_raw():
                    content += part
                    if len(content) > self._max_reply_bytes:
                        raise EngineError(f"{url} answered more than {self._max_reply_bytes} bytes.")
                return response.status_code, bytes(content)
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            raise _NotReached(
                f"{url} cannot be reached: {self.redactor.redacted(str(exc)) or 'no connection'}"
            ) from exc
        except httpx.TransportError as exc:
            said = self.redactor.redacted(str(exc))[:MAX_QUOTED_CHARS]
            # from None: the cause may quote what the server sent
            raise NoAnswer(f"{url} broke the connection: {said or type(exc).__name__}") from None


class _NotReached(NoAnswer):
    """Nobody listens there: asking again at once is no use."""


class Server:
    """One server: its address, and what this engine knows and wants of it."""

    def __init__(self, url: str, client: ServerClient, *, max_connections: int) -> None:
        """Args: url: without a slash or /v1 at its end. max_connections: for whoever takes `slots`."""
        self.url, self._client = url, client
        self.slots = asyncio.Semaphore(max_connections)
        self.outstanding = 0
        """Rows that were given to it and have not ended."""
        self.is_lost = False
        """It did not answer: left out until it takes a sync again."""
        self.has_adapter = False
        """It knows the adapter by its name."""

    async def exchange(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        limit_s: float | None = CONTROL_TIMEOUT_S,
        is_json: bool = True,
    ) -> Any:
        """One request, one answer. A connection that breaks is made once more: no request here does harm twice.

        Args:
            limit_s: for both together; None where the caller has one of its own.
            is_json: the answer is JSON; else it is given as text.
        Raises:
            NoAnswer: the server cannot be reached.
            Refused: its status is not 200.
            EngineError: it took too long, or what it says is too long or no JSON.
        """
        try:
            async with asyncio.timeout(limit_s):
                status, content = await self._ask(method, path, body)
        except TimeoutError as exc:
            raise EngineError(f"{self.url}{path} did not answer within {limit_s:g} s.") from exc
        if status != 200:
            said = self.quoted(content.decode(errors="replace"))
            raise Refused(f"{self.url}{path} answered {status}: {said}", status=status)
        if not is_json:
            return content.decode(errors="replace")
        try:
            return json.loads(content)
        except ValueError:  # its text may quote what was read
            raise EngineError(
                f"{self.url}{path} answered no JSON: {self.quoted(content.decode(errors='replace'))}"
            ) from None

    async def rpc(
        self, method: str, arguments: Mapping[str, Any] | None = None, *, limit_s: float | None = CONTROL_TIMEOUT_S
    ) -> list[Any]:
        """The answers of the server's workers, at least one; numbers come as text. Raises as `exchange` does."""
        body = {"method": method, "kwargs": dict(arguments or {})}
        reply = await self.exchange("POST", "/collective_rpc", body, limit_s=limit_s)
        results = reply.get("results") if isinstance(reply, dict) else None
        if not isinstance(results, list) or not results:
            raise EngineError(
                f"{self.url}/collective_rpc answered {self.quoted(reply)}, and no results of its workers."
            )
        return results

    def quoted(self, said: Any) -> str:
        """What the server said, short and without our key."""
        text = self._client.redactor.redacted(said if isinstance(said, str) else repr(said))
        return text if len(text) <= MAX_QUOTED_CHARS else text[:MAX_QUOTED_CHARS] + " ..."

    async def _ask(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        try:
            return await self._client.ask(method, self.url + path, body)
        except _NotReached:
            raise
        except NoAnswer:
            return await self._client.ask(method, self.url + path, body)


@functools.cache  # reading them takes 20 ms
def _certificates() -> ssl.SSLContext:
    """Those that the system trusts, a cluster's own among them."""
    return ssl.create_default_context()


def _api_key(config: VllmServerConfig) -> str | None:
    if config.api_key is None:
        return None
    name = config.api_key.removeprefix("env:")
    key = os.environ.get(name, "")
    if not key:
        raise ConfigError(f"rollout.engine.api_key names the environment variable {name}, which is not set.")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(f"the key in the environment variable {name} has characters that no key has, such as spaces.")
    return key


def check_address(url: str) -> None:
    """Raises ConfigError where prompts, weights' names and a key would go over a network in the clear."""
    if url.startswith("http://") and not is_loopback(url):
        raise ConfigError(
            f"rollout.engine.urls has {url}, which is another machine, and no https. Start that server with "
            "--ssl-certfile and --ssl-keyfile and name it with https, or go through a tunnel "
            "(ssh -L 8000:127.0.0.1:8000 HOST) to an address on this machine."
        )
