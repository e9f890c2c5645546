"""A client's connections: used again while they are good, replaced without a failure, gone at the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from judges import ChatRequest, EndpointConfig, JudgeFailure, Message
from judges.clients.openai_chat import OpenAIChatClient

REQUEST = ChatRequest(messages=(Message(role="user", content="Who?"),), max_tokens=5)


class Keeper:
    """Keeps connections open between requests; `hang_up()` closes those that are open."""

    def __init__(self) -> None:
        self.num_connections = 0
        self.writers: set[asyncio.StreamWriter] = set()
        self.status = 200
        self.delay_s = 0.0
        self.was_asked = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.writers.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]))
                self.was_asked.set()
                await asyncio.sleep(self.delay_s)
                choice = {"message": {"content": "Anna"}, "finish_reason": "stop"}
                body = json.dumps({"choices": [choice]}).encode()
                writer.write(f"HTTP/1.1 {self.status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has left
        finally:
            self.writers.discard(writer)
            writer.close()

    async def hang_up(self) -> None:
        for writer in tuple(self.writers):
            writer.close()
            await writer.wait_closed()
        await asyncio.sleep(0.02)  # the client's side hears of it


@asynccontextmanager
async def keeping() -> AsyncIterator[tuple[Keeper, OpenAIChatClient]]:
    keeper = Keeper()
    server = await asyncio.start_server(keeper.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    client = OpenAIChatClient(EndpointConfig(url=url, model="m"), timeout_s=5.0)
    try:
        yield keeper, client
    finally:
        await client.aclose()
        server.close()
        await keeper.hang_up()


def test_calls_one_after_the_other_share_a_connection() -> None:
    async def main() -> int:
        async with keeping() as (keeper, client):
            for _ in range(5):
                await client.complete(REQUEST)
            return keeper.num_connections

    assert asyncio.run(main()) == 1


def test_as_many_connections_as_calls_at_a_time_and_all_are_used_again() -> None:
    async def main() -> int:
        async with keeping() as (keeper, client):
            keeper.delay_s = 0.05
            for _ in range(3):
                await asyncio.gather(*(client.complete(REQUEST) for _ in range(4)))
            return keeper.num_connections

    assert asyncio.run(main()) == 4


def test_an_error_that_was_read_whole_leaves_the_connection_good() -> None:
    async def main() -> int:
        async with keeping() as (keeper, client):
            keeper.status = 503
            with pytest.raises(JudgeFailure):
                await client.complete(REQUEST)
            keeper.status = 200
            await client.complete(REQUEST)
            return keeper.num_connections

    assert asyncio.run(main()) == 1


def test_a_connection_that_the_server_has_closed_costs_no_failure() -> None:
    async def main() -> tuple[str, int]:
        async with keeping() as (keeper, client):
            await client.complete(REQUEST)
            await keeper.hang_up()
            reply = await client.complete(REQUEST)
            return reply.text, keeper.num_connections

    assert asyncio.run(main()) == ("Anna", 2)


def test_a_cancelled_call_takes_its_connection_with_it() -> None:
    async def main() -> int:
        async with keeping() as (keeper, client):
            keeper.delay_s = 60.0
            call = asyncio.create_task(client.complete(REQUEST))
            await keeper.was_asked.wait()
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            keeper.delay_s = 0.0
            await client.complete(REQUEST)
            return keeper.num_connections

    assert asyncio.run(main()) == 2  # its answer may still come: nobody else must read it


def test_closing_the_client_closes_connections_in_use_too() -> None:
    async def main() -> None:
        async with keeping() as (keeper, client):
            keeper.delay_s = 60.0
            call = asyncio.create_task(client.complete(REQUEST))
            await keeper.was_asked.wait()
            await client.aclose()
            async with asyncio.timeout(2.0):
                with pytest.raises(JudgeFailure):
                    await call

    asyncio.run(main())
