"""One HTTP exchange with one endpoint, whole or not at all: JSON out, JSON in. Knows no dialect.

Every failure leaves as a `JudgeFailure`, mapped here once. What httpx and its core leave to us is here or beside it:
a total time limit (theirs begins anew with every byte), byte caps, no encodings (a bomb of 48 KB unpacks to 50 MB),
strict JSON, checked addresses (`transport`), no environment, no redirect. Never retries; never shows the key.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from judges.clients.addresses import scope_of
from judges.clients.http_errors import failure_of
from judges.clients.redaction import Redactor
from judges.clients.transport import CheckedTransport, Resolve, resolve_host
from judges.config import EndpointConfig
from judges.errors import (
    InvalidVerdict,
    JudgeConfigError,
    JudgeDenied,
    JudgeFailure,
    JudgeRefused,
    JudgeRejected,
    JudgeTimeout,
    JudgeUnavailable,
)
from judges.strict_json import strict_loads

MAX_REPLY_BYTES = 1 << 20
MAX_CONNECT_S = 5.0
TRANSIENT_TLS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
"""The connection broke during the handshake; all other TLS errors say that the endpoint is not who it should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back with status 200."""

    content: Any
    """The body, as strict JSON."""
    headers: Mapping[str, str]
    """By name, whatever its case."""


class JsonEndpoint:
    """Owns the HTTP connections to one endpoint. Opened at the first call, inside the running loop; `aclose()` ends it.

    The URL and the key are read from the environment at the first call, so that building a client needs no secret.
    """

    def __init__(
        self,
        config: EndpointConfig,
        *,
        timeout_s: float,
        key_headers: Callable[[str], Mapping[str, str]],
        headers: Mapping[str, str] | None = None,
        resolve: Resolve = resolve_host,
    ) -> None:
        """
        Args:
            config: where to call.
            timeout_s: seconds for one exchange, from connecting to the last byte.
            key_headers: the headers that carry a key.
            headers: further headers of every request.
            resolve: the resolver of names; another one only to test what a hostile one can do.
        """
        self._config = config
        self._timeout_s = timeout_s
        self._key_headers = key_headers
        self._headers = dict(headers or {})
        self._resolve = resolve
        self._http: httpx.AsyncClient | None = None
        self._redactor = Redactor(None)
        self._url = ""

    async def post(self, path: str, body: Mapping[str, Any], *, max_tokens: int) -> Answer:
        """Send JSON, get JSON.

        Args:
            path: behind the endpoint's URL, with a slash.
            body: the request; what is not JSON is an error of ours.
            max_tokens: what the body allows the reply; tells settings that fit no text from a text that does not fit.
        Raises:
            JudgeFailure: as `judges.errors` sorts them.
            JudgeConfigError: a secret or the URL is missing, or ca_file cannot be read.
        """
        # escaped: half of a surrogate pair in a text could not be sent otherwise
        return await self._call("POST", path, json.dumps(body, allow_nan=False).encode(), max_tokens)

    async def get(self, path: str) -> Answer:
        """Get JSON; raises as `post` does."""
        return await self._call("GET", path, None, None)

    def redacted(self, text: str) -> str:
        """The text without our key, which a server may echo."""
        return self._redactor.redacted(text)

    async def check(self, ask: Callable[[], Awaitable[object]]) -> None:
        """Make sure that a judge answers, before anything depends on it.

        Args:
            ask: puts the least question there is; used where the list of models does not settle it.
        Raises:
            JudgeConfigError: a secret or the URL is missing.
            JudgeUnavailable: nobody answers, or not in time.
            JudgeRejected: somebody answers, but is no such API, or has no such model.
            JudgeDenied: somebody answers, but does not take our key.
        """
        try:
            await self._check(ask)
        except (InvalidVerdict, JudgeRefused):
            return  # an answer, if an odd one: somebody is there
        except JudgeUnavailable as exc:
            raise JudgeUnavailable(
                f"no judge answers at {self._url}: {exc}. Start the judge's server, or correct endpoint.url "
                f"({self._config.url}). To try without one: python -m judges.demo_server --port 8008",
                kind=exc.kind,
                status=exc.status,
            ) from exc
        except (JudgeRejected, JudgeDenied) as exc:
            key = self._config.api_key or "none is configured"
            raise type(exc)(
                f"{self._url} answers, but not as a judge: {exc}. Check endpoint.url (usually ends in /v1), "
                f"endpoint.model ({self._config.model}) and endpoint.api_key ({key}).",
                kind=exc.kind,
                status=exc.status,
            ) from exc

    async def _check(self, ask: Callable[[], Awaitable[object]]) -> None:
        try:
            models = (await self.get("/models")).content
        except JudgeRejected as exc:
            if exc.status not in (404, 405):
                raise
            await ask()  # not every server lists its models
            return
        if self._config.model in _model_ids(models):
            return
        try:
            await ask()  # an alias need not be listed
        except JudgeRejected as exc:
            if exc.status == 404:
                raise

    async def aclose(self) -> None:
        """Close the connections; the next call would open new ones."""
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()
            self._redactor.detach()

    def _open(self) -> httpx.AsyncClient:
        if self._http is not None:
            return self._http
        self._url, key = self._config.resolve_url(), self._config.resolve_api_key()
        parts = urlsplit(self._url)
        transport = CheckedTransport(
            scope=scope_of(parts.hostname or "", is_private=self._config.private_network),
            ssl_context=_ssl_context(self._config.ca_file) if parts.scheme == "https" else None,
            resolve=self._resolve,
        )
        self._redactor = Redactor(key)
        self._redactor.attach()
        self._http = httpx.AsyncClient(
            transport=transport,
            trust_env=False,  # no proxy and no .netrc behind the recipe's back
            follow_redirects=False,  # a redirect would carry the key and the text elsewhere
            timeout=httpx.Timeout(self._timeout_s, connect=min(MAX_CONNECT_S, self._timeout_s)),
            headers={
                "Accept-Encoding": "identity",
                "Accept": "application/json",
                "Content-Type": "application/json",
                "User-Agent": "grpo-toolkit",
                **self._headers,
                **(self._key_headers(key.get_secret_value()) if key else {}),
            },
        )
        return self._http

    async def _call(self, method: str, path: str, body: bytes | None, max_tokens: int | None) -> Answer:
        http = self._open()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._exchange(http, method, path, body, max_tokens)
        except (TimeoutError, httpx.TimeoutException) as exc:
            raise JudgeTimeout(f"no whole answer within {self._timeout_s:g} s ({type(exc).__name__})") from None
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError) as exc:
            raise self._failure_of(exc) from None

    async def _exchange(
        self, http: httpx.AsyncClient, method: str, path: str, body: bytes | None, max_tokens: int | None
    ) -> Answer:
        async with http.stream(method, self._url + path, content=body) as response:
            status, headers = response.status_code, response.headers
            if 300 <= status < 400:
                host = self.redacted(_host_of(headers.get("location", "")))
                raise JudgeRejected(f"redirects are not followed (to {host})", kind="redirect", status=status)
            encoding = headers.get("content-encoding", "identity").strip().lower()
            if encoding not in ("", "identity"):
                raise JudgeRejected(f"the reply is encoded ({encoding[:20]}), though none was asked for")
            content = await _read_capped(response)
        if status != 200:
            raise failure_of(
                status=status,
                headers=headers,
                body=self.redacted(content.decode("utf-8", "replace")),
                reason=self.redacted(response.reason_phrase),
                max_tokens=max_tokens,
            )
        if not content.strip():
            raise InvalidVerdict("the reply is empty", kind="empty")
        try:
            return Answer(content=strict_loads(content), headers=headers)
        except ValueError as exc:
            raise InvalidVerdict(f"the reply is not strict JSON: {exc}") from None

    def _failure_of(self, exc: Exception) -> JudgeFailure:
        message = self.redacted(f"{type(exc).__name__}: {str(exc) or 'the connection ended'}")
        cause: BaseException | None = exc
        while cause is not None:
            if isinstance(cause, ssl.SSLError) and not isinstance(cause, TRANSIENT_TLS):
                return JudgeRejected(f"the endpoint cannot prove who it is: {message}", kind="tls")
            cause = cause.__cause__ or cause.__context__  # httpcore's pool raises "from None"
        if isinstance(exc, httpx.LocalProtocolError | httpx.UnsupportedProtocol | httpx.InvalidURL):
            return JudgeRejected(message)
        return JudgeUnavailable(message)


def _ssl_context(ca_file: str | None) -> ssl.SSLContext:
    """Certificates and host names are always verified; there is no setting against it."""
    if ca_file is None:
        return httpx.create_ssl_context(trust_env=False)
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as exc:
        raise JudgeConfigError(
            f"endpoint.ca_file {ca_file} cannot be used ({type(exc).__name__}). Expected a PEM file with certificates."
        ) from None


def _host_of(location: str) -> str:
    try:
        return urlsplit(location).hostname or "an unnamed host"
    except ValueError:
        return "an unnamed host"


def _model_ids(models: Any) -> set[str]:
    data = models.get("data") if isinstance(models, dict) else None
    entries = data if isinstance(data, list) else []
    return {name for one in entries if isinstance(one, dict) and isinstance(name := one.get("id"), str)}


async def _read_capped(response: httpx.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > MAX_REPLY_BYTES:
            raise JudgeRejected(f"the reply is longer than {MAX_REPLY_BYTES} bytes", kind="reply_too_large")
    return bytes(content)
