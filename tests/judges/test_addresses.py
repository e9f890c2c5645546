"""Where a judge may live, and what a hostile resolver can do about it."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import pytest
from fault_server import chat, reply, serving

from judges.clients.addresses import Scope, address_problem, scope_of
from judges.clients.openai_chat import OpenAIChatClient
from judges.config import EndpointConfig
from judges.errors import JudgeFailure, JudgeRejected, JudgeUnavailable
from judges.types import ChatReply, ChatRequest, Message

REQUEST = ChatRequest(messages=(Message(role="user", content="hello"),), max_tokens=5)


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "169.254.1.1",
        "fe80::1",
        "fe80::1%eth0",
        "fd00:ec2::254",
        "100.100.100.200",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::1",
        "not an address",
    ],
)
@pytest.mark.parametrize("scope", ["loopback", "private", "public"])
def test_metadata_and_link_local_addresses_are_never_connected_to(address: str, scope: Scope) -> None:
    assert address_problem(address, scope=scope) is not None


@pytest.mark.parametrize(
    "address", ["10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "fc00::1", "::ffff:10.0.0.1"]
)
def test_a_private_address_is_for_endpoints_that_are_declared_private(address: str) -> None:
    assert address_problem(address, scope="private") is None
    assert address_problem(address, scope="public") is not None
    assert address_problem(address, scope="loopback") is not None


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_this_machine_is_for_endpoints_that_name_it(address: str) -> None:
    assert address_problem(address, scope="loopback") is None
    assert address_problem(address, scope="private") is not None
    assert address_problem(address, scope="public") is not None


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111"])
def test_a_public_address_is_fine_but_for_an_endpoint_on_this_machine(address: str) -> None:
    assert address_problem(address, scope="public") is None
    assert address_problem(address, scope="private") is None
    assert address_problem(address, scope="loopback") is not None


def test_the_scope_is_what_the_url_and_the_recipe_say() -> None:
    assert scope_of("localhost", is_private=True) == "loopback"
    assert scope_of("::1", is_private=False) == "loopback"
    assert scope_of("judge.example", is_private=False) == "public"
    assert scope_of("judge.example", is_private=True) == "private"
    assert scope_of("localhost.example", is_private=False) == "public"


def ask(url: str, *resolved: list[str]) -> list[ChatReply | JudgeFailure]:
    """What calls in a row make of what the resolver says, each with a connection of its own."""
    asked = iter(resolved)

    async def resolve(host: str, port: int) -> list[str]:
        return next(asked)

    async def main() -> list[ChatReply | JudgeFailure]:
        async with serving(reply(200, chat("hi"))) as server:
            config = EndpointConfig(url=url.format(port=urlsplit(server.url).port), model="judge-1")
            client = OpenAIChatClient(config, timeout_s=2.0, resolve=resolve)
            outcomes: list[ChatReply | JudgeFailure] = []
            for _ in resolved:
                try:
                    outcomes.append(await client.complete(REQUEST))
                except JudgeFailure as failure:
                    outcomes.append(failure)
            await client.aclose()
            return outcomes

    return asyncio.run(main())


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "10.0.0.5"])
def test_a_public_name_that_leads_inside_is_refused_at_the_connection(address: str) -> None:
    (failure,) = ask("https://judge.example/v1", [address])
    assert isinstance(failure, JudgeRejected)
    assert failure.kind == "address"
    assert address in str(failure)


def test_a_name_that_is_rebound_between_two_calls_is_refused_at_the_second() -> None:
    first, second = ask("http://localhost:{port}/v1", ["127.0.0.1"], ["169.254.169.254"])
    assert isinstance(first, ChatReply)
    assert isinstance(second, JudgeRejected)
    assert second.kind == "address"


def test_localhost_that_resolves_elsewhere_is_refused() -> None:
    (failure,) = ask("http://localhost:9/v1", ["8.8.8.8"])
    assert isinstance(failure, JudgeRejected)
    assert failure.kind == "address"


def test_the_next_address_of_a_name_is_tried_where_the_first_is_closed() -> None:
    (answer,) = ask("http://localhost:{port}/v1", ["127.0.0.2", "127.0.0.1"])  # the server has the second alone
    assert isinstance(answer, ChatReply)


def test_a_name_without_an_address_is_unavailable() -> None:
    (failure,) = ask("https://judge.example/v1", [])
    assert isinstance(failure, JudgeUnavailable)
