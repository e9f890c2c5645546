"""An httpx transport that connects only to checked addresses and reads only so much. Knows no judges and no JSON.

httpx's own transport takes no network backend, so this one puts connections of httpcore, httpx's own core, behind
httpx's interface. The address is checked where the socket is opened, on what the resolver has said for that very
connection: a name that resolves to something else a moment later gains nothing.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import httpcore
import httpx

from judges.clients.addresses import Scope, address_problem
from judges.errors import JudgeRejected

MAX_WIRE_BYTES = (1 << 20) + (1 << 18)
"""Bytes that one answer may have on the wire: its body's cap, and 256 KiB for headers and framing."""
KEEPALIVE_S = 5.0
"""An idle connection is closed after so long: servers and what lies between them close theirs without a word."""

Resolve: TypeAlias = Callable[[str, int], Awaitable[list[str]]]
"""(host, port) -> IP addresses, the preferred one first."""


async def resolve_host(host: str, port: int) -> list[str]:
    """The system's resolver, off the event loop."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


class CheckedTransport(httpx.AsyncBaseTransport):
    """Owns HTTP/1.1 connections to one origin, at addresses within `scope`. No proxy, no redirect, no retry of its own.

    httpcore's own pool looks at every connection, in a loop over every connection, at each call: with 64 in flight that
    costs milliseconds a call. With one origin, and the judge pool to bound them, a stack of idle ones is enough.
    """

    def __init__(self, *, scope: Scope, ssl_context: ssl.SSLContext | None, resolve: Resolve) -> None:
        self._ssl_context = ssl_context
        self._backend = _CheckedBackend(scope=scope, resolve=resolve)
        self._idle: deque[httpcore.AsyncHTTPConnection] = deque()  # the one that was used last is taken first
        self._in_use: set[httpcore.AsyncHTTPConnection] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        url = request.url
        sent = httpcore.Request(
            method=request.method,
            url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        connection = await self._connection(sent.url.origin)
        try:
            with _as_httpx_errors():
                response = await connection.handle_async_request(sent)
        except BaseException:
            await self._put_back(connection)
            raise
        return httpx.Response(
            status_code=response.status,
            headers=response.headers,
            stream=_Body(response, on_end=lambda: self._put_back(connection)),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        connections = [*self._idle, *self._in_use]
        self._idle.clear()
        self._in_use.clear()
        for connection in connections:
            await connection.aclose()

    async def _connection(self, origin: httpcore.Origin) -> httpcore.AsyncHTTPConnection:
        while self._idle:
            connection = self._idle.pop()
            if connection.can_handle_request(origin) and not connection.has_expired():
                break
            await connection.aclose()
        else:
            connection = httpcore.AsyncHTTPConnection(
                origin=origin,
                ssl_context=self._ssl_context,
                keepalive_expiry=KEEPALIVE_S,
                network_backend=self._backend,
            )
        self._in_use.add(connection)
        return connection

    async def _put_back(self, connection: httpcore.AsyncHTTPConnection) -> None:
        """A call has ended: its connection waits for the next one, or is closed where it broke or left half read."""
        if connection not in self._in_use:
            return  # closed with the transport
        self._in_use.discard(connection)
        if connection.is_idle() and not connection.is_closed():
            self._idle.append(connection)
        else:
            await connection.aclose()
        while self._idle and self._idle[0].has_expired():
            await self._idle.popleft().aclose()


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: httpcore.Response, *, on_end: Callable[[], Awaitable[None]]) -> None:
        self._response = response
        self._on_end = on_end

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx_errors():
            async for part in self._response.aiter_stream():
                yield part

    async def aclose(self) -> None:
        try:
            await self._response.aclose()
        finally:
            await self._on_end()


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Resolves, checks, connects to the address it has checked, and counts what the stream brings."""

    def __init__(self, *, scope: Scope, resolve: Resolve) -> None:
        self._scope: Scope = scope
        self._resolve = resolve
        self._sockets: httpcore.AsyncNetworkBackend = cast(httpcore.AsyncNetworkBackend, httpcore.AnyIOBackend())

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface, here and below
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            async with asyncio.timeout(timeout):
                stream = await self._connect(host, port, timeout, local_address, socket_options)
        except TimeoutError as exc:
            raise httpcore.ConnectTimeout(f"no connection to {host} in time") from exc
        return _CountedStream(stream)

    async def _connect(
        self,
        host: str,
        port: int,
        timeout_s: float | None,
        local_address: str | None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None,
    ) -> httpcore.AsyncNetworkStream:
        allowed = await self._allowed_addresses(host, port)
        share_s = timeout_s / len(allowed) if timeout_s is not None else None  # one that is silent must not eat it all
        for address in allowed[:-1]:
            try:
                return await self._sockets.connect_tcp(address, port, share_s, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue  # the next address of the same name may do
        return await self._sockets.connect_tcp(allowed[-1], port, share_s, local_address, socket_options)

    async def _allowed_addresses(self, host: str, port: int) -> list[str]:
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError) as exc:
            raise httpcore.ConnectError(f"{host} cannot be resolved: {exc}") from exc
        problems = {address: address_problem(address, scope=self._scope) for address in addresses}
        allowed = [address for address, problem in problems.items() if problem is None]
        if not allowed:
            if not problems:
                raise httpcore.ConnectError(f"{host} has no address")
            address, problem = next(iter(problems.items()))
            raise JudgeRejected(f"{host} resolves to {address}, which is not connected to: {problem}", kind="address")
        return allowed


class _CountedStream(httpcore.AsyncNetworkStream):
    """A stream whose answers are capped: httpcore itself would read interim answers (1xx) and framing for ever."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._read_bytes = 0

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        content = await self._stream.read(max_bytes, timeout)
        self._read_bytes += len(content)
        if self._read_bytes > MAX_WIRE_BYTES:
            raise httpcore.RemoteProtocolError(f"more than {MAX_WIRE_BYTES} bytes on the wire for one answer")
        return content

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        self._read_bytes = 0  # HTTP/1.1 without pipelining: what is read from now on answers this request
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        return _CountedStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


_HTTPX_ERRORS: tuple[tuple[type[Exception], type[httpx.TransportError]], ...] = (
    (httpcore.ConnectTimeout, httpx.ConnectTimeout),
    (httpcore.TimeoutException, httpx.ReadTimeout),
    (httpcore.ConnectError, httpx.ConnectError),
    (httpcore.NetworkError, httpx.ReadError),
    (httpcore.RemoteProtocolError, httpx.RemoteProtocolError),
    (httpcore.LocalProtocolError, httpx.LocalProtocolError),
    (httpcore.UnsupportedProtocol, httpx.UnsupportedProtocol),
)


@contextmanager
def _as_httpx_errors() -> Iterator[None]:
    try:
        yield
    except tuple(source for source, _ in _HTTPX_ERRORS) as exc:
        target = next(target for source, target in _HTTPX_ERRORS if isinstance(exc, source))
        raise target(str(exc)) from exc
