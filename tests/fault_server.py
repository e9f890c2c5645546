"""A judge's server that misbehaves on purpose, on raw loopback sockets: what no HTTP library would let one do.

`async with serving(answer, answer, ...) as server:` answers each connection's one request with the next answer; the
last one repeats. An answer is a coroutine function of the socket's writer and the request as the socket saw it.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from judges.prompts import read_fences

Answer = Callable[[asyncio.StreamWriter, "Received"], Awaitable[None]]


class Received:
    """One request as the socket saw it."""

    def __init__(self, head: str, body: bytes) -> None:
        self.line, *lines = head.split("\r\n")
        self.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines if line)}
        self.body = json.loads(body) if body else None

    @property
    def nonce(self) -> str:
        """The code that a verdict must repeat."""
        return read_fences(self.body["messages"][-1]["content"])[0]


class FaultServer:
    """Owns what it has received, and how many connections came."""

    def __init__(self, answers: tuple[Answer, ...], greeting: bytes = b"") -> None:
        self._answers = answers
        self._greeting = greeting
        self.received: list[Received] = []
        self.num_connections = 0
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            if self._greeting:
                writer.write(self._greeting)
                await writer.drain()
                await reader.read(1)  # a close before the client has spoken could overtake the greeting
                return
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
            body = await reader.readexactly(int(length[1])) if length else b""
            self.received.append(Received(head, body))
            answer = self._answers[min(len(self.received), len(self._answers)) - 1]
            await answer(writer, self.received[-1])
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass  # the client has left
        finally:
            writer.close()


@asynccontextmanager
async def serving(
    *answers: Answer, ssl_context: ssl.SSLContext | None = None, greeting: bytes = b""
) -> AsyncIterator[FaultServer]:
    """The server for as long as the block runs. With a greeting it sends that to whoever connects, and nothing else."""
    server = FaultServer(answers, greeting)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(server.handle(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listener = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=ssl_context)
    port = listener.sockets[0].getsockname()[1]
    server.url = f"{'https' if ssl_context else 'http'}://127.0.0.1:{port}/v1"
    try:
        yield server
    finally:
        listener.close()
        await asyncio.sleep(0.01)  # handlers whose client has left get to close their sockets
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def black_hole() -> AsyncIterator[str]:
    """The URL of a port that answers no SYN: its queue of connections is full, and nobody accepts any."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    fillers = [socket.socket() for _ in range(3)]
    try:
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        await asyncio.sleep(0.05)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        for one in (*fillers, listener):
            one.close()


def reply(status: int, body: Any, **headers: str) -> Answer:
    """A well-formed answer. Header names have underscores for hyphens."""

    async def answer(writer: asyncio.StreamWriter, received: Received) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(content)}", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)

    return answer


def chat(text: object, **choice: object) -> dict[str, Any]:
    """The body of a chat completion."""
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop", **choice}]}


def verdict(score: Any, *, usage: object = None, delay_s: float = 0.0, **choice: object) -> Answer:
    """A judge that gives this score. A text is taken as the JSON to stand for the score."""

    async def answer(writer: asyncio.StreamWriter, received: Received) -> None:
        literal = score if isinstance(score, str) else json.dumps(score)
        text = f'{{"nonce": "{received.nonce}", "reason": "", "score": {literal}}}'
        await asyncio.sleep(delay_s)
        body = chat(text, **choice) | ({} if usage is None else {"usage": usage})
        await reply(200, body)(writer, received)

    return answer


def says(make_text: Callable[[str], str], **choice: object) -> Answer:
    """A judge that says this, made from the call's nonce."""

    async def answer(writer: asyncio.StreamWriter, received: Received) -> None:
        await reply(200, chat(make_text(received.nonce), **choice))(writer, received)

    return answer


def raw(data: bytes, *, then_wait_s: float = 0.0) -> Answer:
    """These bytes, and then the end."""

    async def answer(writer: asyncio.StreamWriter, received: Received) -> None:
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(then_wait_s)

    return answer


def drip(head: bytes, drop: bytes, *, every_s: float = 0.02) -> Answer:
    """The head at once, and then a drop at a time, for ever."""

    async def answer(writer: asyncio.StreamWriter, received: Received) -> None:
        writer.write(head)
        while True:
            writer.write(drop)
            await writer.drain()
            await asyncio.sleep(every_s)

    return answer


def flood(head: bytes, wave: bytes) -> Answer:
    """The head, and then wave after wave as fast as the client reads."""
    return drip(head, wave, every_s=0.0)


def reset(before: bytes = b"") -> Answer:
    """These bytes, and then RST instead of an end."""

    async def answer(writer: asyncio.StreamWriter, received: Received) -> None:
        writer.write(before)
        await writer.drain()
        await asyncio.sleep(0.01)  # the bytes arrive before the reset takes them away
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    return answer


async def echo_the_key(writer: asyncio.StreamWriter, received: Received) -> None:
    """An error that repeats the key, in the status line, a header and the body."""
    key = received.headers["authorization"]
    body = json.dumps({"error": {"message": f"bad key {key}"}}).encode()
    head = f"HTTP/1.1 401 {key}\r\nX-Key: {key}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)


async def say_the_key(writer: asyncio.StreamWriter, received: Received) -> None:
    """A reply that repeats the key instead of giving a verdict."""
    await reply(200, chat(f"your key is {received.headers['authorization']}"))(writer, received)
