"""OpenAI's dialect over real loopback sockets, well-behaved and not."""

from __future__ import annotations

import asyncio
import socket
import time
import traceback
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from fault_server import Answer, FaultServer, Received, chat, drip, echo_the_key, flood, raw, reply, reset, serving

from judges.clients.http import MAX_REPLY_BYTES
from judges.clients.openai_chat import OpenAIChatClient
from judges.config import EndpointConfig
from judges.errors import (
    InvalidVerdict,
    JudgeConfigError,
    JudgeDenied,
    JudgeError,
    JudgeFailure,
    JudgeOverloaded,
    JudgeRefused,
    JudgeRejected,
    JudgeTimeout,
    JudgeUnavailable,
)
from judges.types import ChatReply, ChatRequest, Message, Usage
from judges.verdicts import verdict_schema

SECRET = "sk-planted-secret-0001"
SLOW_BODY = drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b" ")
SLOW_HEAD = drip(b"HTTP/1.1 200 OK\r\nX: ", b"a")
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
REQUEST = ChatRequest(messages=(Message(role="user", content="hello"),), max_tokens=5)


def endpoint(url: str, **settings: Any) -> EndpointConfig:
    return EndpointConfig(url=url, model="judge-1", **settings)


def complete(
    *answers: Answer, timeout_s: float = 10.0, request: ChatRequest = REQUEST, **settings: Any
) -> tuple[ChatReply | JudgeError, FaultServer]:
    """What one call makes of the answers."""

    async def main() -> tuple[ChatReply | JudgeError, FaultServer]:
        async with serving(*answers) as server:
            client = OpenAIChatClient(endpoint(server.url, **settings), timeout_s=timeout_s)
            try:
                return await client.complete(request), server
            except JudgeError as exc:
                return exc, server
            finally:
                await client.aclose()

    return asyncio.run(main())


def test_a_call_is_one_post_with_the_request_and_nothing_more() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    answer, server = complete(reply(200, {**chat("hi"), "usage": usage}))
    assert answer == ChatReply(text="hi", finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=2))
    (received,) = server.received
    assert received.line == "POST /v1/chat/completions HTTP/1.1"
    assert received.body == {
        "model": "judge-1",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 5,
    }
    assert received.headers["accept-encoding"] == "identity"
    assert "authorization" not in received.headers


def test_the_key_is_sent_as_a_bearer_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", SECRET)
    _, server = complete(reply(200, chat("hi")), api_key="env:TEST_JUDGE_KEY")
    assert server.received[0].headers["authorization"] == f"Bearer {SECRET}"


def test_nobody_listening_is_unavailable() -> None:
    async def main() -> None:
        async with serving(reply(200, {})) as server:
            url = server.url
        with pytest.raises(JudgeUnavailable, match="ConnectError"):
            await OpenAIChatClient(endpoint(url)).complete(REQUEST)

    asyncio.run(main())


@pytest.mark.parametrize("silent", [raw(b"", then_wait_s=60), SLOW_BODY, SLOW_HEAD], ids=["silence", "body", "head"])
def test_the_total_time_of_a_call_ends_it_however_slowly_bytes_drip(silent: Answer) -> None:
    started = time.monotonic()
    answer, _ = complete(silent, timeout_s=0.3)
    assert isinstance(answer, JudgeTimeout)
    assert time.monotonic() - started < 5.0


def test_a_reply_over_the_byte_cap_is_cut_and_not_tried_again() -> None:
    answer, _ = complete(flood(CHUNKED, b"10000\r\n" + b"x" * 0x10000 + b"\r\n"))
    assert isinstance(answer, JudgeRejected)
    assert answer.kind == "reply_too_large"
    assert str(MAX_REPLY_BYTES) in str(answer)


def test_an_endless_reply_costs_no_more_memory_than_a_long_one() -> None:
    tracemalloc.start()
    try:
        complete(flood(CHUNKED, b"10000\r\n" + b"x" * 0x10000 + b"\r\n"))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 * MAX_REPLY_BYTES  # ours, httpcore's and the server's buffers together


def test_a_call_that_is_cancelled_lets_go_of_its_connection() -> None:
    async def main() -> bool:
        gone = asyncio.Event()

        async def answer(writer: asyncio.StreamWriter, received: Received) -> None:
            try:
                await drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b" ")(writer, received)
            except ConnectionError:
                gone.set()

        async with serving(answer) as server:
            client = OpenAIChatClient(endpoint(server.url))
            call = asyncio.create_task(client.complete(REQUEST))
            await asyncio.sleep(0.1)
            call.cancel()
            await asyncio.wait([call])
            async with asyncio.timeout(2.0):
                await gone.wait()
            await client.aclose()
        return call.cancelled()

    assert asyncio.run(main())


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_an_ipv6_address_in_the_url_is_called() -> None:
    async def main() -> str:
        with pytest.raises(JudgeUnavailable) as caught:
            await OpenAIChatClient(endpoint("http://[::1]:9/v1")).complete(REQUEST)
        return str(caught.value)

    assert "ConnectError" in asyncio.run(main())  # refused, as nobody listens; not a name that cannot be resolved


def test_an_encoded_reply_is_refused_before_it_is_unpacked() -> None:
    answer, _ = complete(reply(200, b"\x1f\x8b" + b"0" * 64, Content_Encoding="gzip"))
    assert isinstance(answer, JudgeRejected)
    assert "encoded (gzip)" in str(answer)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_and_nobody_else_sees_the_key(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", SECRET)

    async def main() -> None:
        async with serving(reply(200, chat("hi"))) as other:
            async with serving(reply(status, {}, Location=f"{other.url}/chat/completions")) as server:
                client = OpenAIChatClient(endpoint(server.url, api_key="env:TEST_JUDGE_KEY"))
                with pytest.raises(JudgeRejected, match=r"redirects are not followed \(to 127\.0\.0\.1\)"):
                    await client.complete(REQUEST)
                await client.aclose()
            assert other.received == []

    asyncio.run(main())


def test_a_proxy_in_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    answer, _ = complete(reply(200, chat("hi")))
    assert isinstance(answer, ChatReply)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"<html>welcome</html>", "invalid_verdict"),
        (b"[]", "invalid_verdict"),
        (b"null", "invalid_verdict"),
        (b"[" * 100_000, "invalid_verdict"),
        (b'{"choices": [], "choices": []}', "invalid_verdict"),
        (b'{"choices": NaN}', "invalid_verdict"),
        (b'{"choices": [{"message": {"content": "caf\xe9"}}]}', "invalid_verdict"),
        (b'{"choices": [{"message": {"content": "\\ud83d"}}]}', "invalid_verdict"),
        ({"choices": [{"message": None}]}, "invalid_verdict"),
        (chat(["a"]), "invalid_verdict"),
        (b"", "empty"),
        ({"choices": []}, "empty"),
        (chat(None), "empty"),
        (chat(" \n"), "empty"),
        ({"choices": [{"message": {"content": None, "reasoning_content": "It is"}}]}, "empty"),
        (chat(None, finish_reason="length"), "truncated"),
    ],
    ids=repr,
)
def test_a_reply_without_text_is_no_verdict_and_says_of_which_kind(body: object, kind: str) -> None:
    answer, _ = complete(reply(200, body))
    assert isinstance(answer, InvalidVerdict)
    assert answer.kind == kind


@pytest.mark.parametrize(
    "body", [chat("x", finish_reason="content_filter"), {"choices": [{"message": {"content": None, "refusal": "no"}}]}]
)
def test_a_refusal_is_told_from_a_broken_reply_and_its_cost_is_known(body: dict[str, Any]) -> None:
    answer, _ = complete(reply(200, {**body, "usage": {"prompt_tokens": 3, "completion_tokens": 2}}))
    assert isinstance(answer, JudgeRefused)
    assert answer.fault == "completion"
    assert answer.usage == Usage(prompt_tokens=3, completion_tokens=2)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [],
        {"prompt_tokens": -1, "completion_tokens": 2},
        {"prompt_tokens": 3.0, "completion_tokens": 2},
        {"prompt_tokens": True, "completion_tokens": 2},
        {"prompt_tokens": 10**12, "completion_tokens": 2},
        {"prompt_tokens": 3},
    ],
    ids=repr,
)
def test_a_count_of_tokens_that_cannot_be_is_none(usage: object) -> None:
    answer, _ = complete(reply(200, {**chat("hi"), "usage": usage}))
    assert isinstance(answer, ChatReply)
    assert answer.usage is None


def test_a_reply_says_what_its_rate_limit_leaves() -> None:
    headers = {"X_RateLimit_Remaining_Requests": "7", "X_RateLimit_Remaining_Tokens": "900"}
    answer, _ = complete(reply(200, chat("hi"), **headers))
    assert isinstance(answer, ChatReply)
    assert (answer.remaining_requests, answer.remaining_tokens) == (7, 900)


def test_a_schema_is_sent_where_the_request_has_one() -> None:
    schema = verdict_schema("pointwise", low=0.0, high=1.0)
    request = ChatRequest(messages=REQUEST.messages, max_tokens=5, temperature=0.0, seed=3, json_schema=schema)
    _, server = complete(reply(200, chat("hi")), request=request)
    body = server.received[0].body
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "verdict", "strict": True, "schema": schema},
    }
    assert (body["temperature"], body["seed"]) == (0.0, 3)
    _, server = complete(reply(200, chat("hi")))
    assert "response_format" not in server.received[0].body


def test_the_limit_of_the_reply_goes_under_the_name_that_the_endpoint_knows() -> None:
    _, server = complete(reply(200, chat("hi")), token_limit="max_completion_tokens")
    assert server.received[0].body["max_completion_tokens"] == 5
    assert "max_tokens" not in server.received[0].body


def test_half_a_surrogate_pair_in_a_request_is_sent_escaped() -> None:
    request = ChatRequest(messages=(Message(role="user", content="a\ud83d"),), max_tokens=5)
    _, server = complete(reply(200, chat("hi")), request=request)
    assert server.received[0].body["messages"][0]["content"] == "a\ud83d"


HTTP_ERRORS: list[tuple[int, object, type[JudgeFailure], str]] = [
    (408, {}, JudgeUnavailable, "unavailable"),
    (409, {}, JudgeUnavailable, "unavailable"),
    (425, {}, JudgeUnavailable, "unavailable"),
    (429, {"error": {"code": "rate_limit_exceeded"}}, JudgeOverloaded, "overloaded"),
    (429, {"error": {"message": "insufficient_quota, says the text"}}, JudgeOverloaded, "overloaded"),
    (429, {"error": {"code": "insufficient_quota"}}, JudgeDenied, "quota"),
    (429, {"error": {"type": "insufficient_quota", "code": None}}, JudgeDenied, "quota"),
    (402, {}, JudgeDenied, "quota"),
    (400, {"error": {"message": "Your credit balance is too low"}}, JudgeDenied, "quota"),
    (401, {}, JudgeDenied, "auth"),
    (403, {}, JudgeDenied, "auth"),
    (500, b"oops", JudgeUnavailable, "unavailable"),
    (503, {}, JudgeUnavailable, "unavailable"),
    (529, {"error": {"type": "overloaded_error"}}, JudgeUnavailable, "unavailable"),
    (400, {"error": {"code": "context_length_exceeded"}}, JudgeRejected, "too_long"),
    (400, {"message": "This model's maximum context length is 100 tokens."}, JudgeRejected, "too_long"),
    (400, {"error": {"message": "prompt is too long: 9 tokens > 8 maximum"}}, JudgeRejected, "too_long"),
    (400, {"message": "This model's maximum context length is 4 tokens."}, JudgeRejected, "rejected"),
    (413, b"", JudgeRejected, "too_long"),
    (400, {"error": {"code": "content_filter"}}, JudgeRefused, "refused"),
    (400, {"error": {"message": "no"}}, JudgeRejected, "rejected"),
    (404, {"error": "no such model"}, JudgeRejected, "rejected"),
    (422, b"[" * 5000, JudgeRejected, "rejected"),
    (204, b"", JudgeRejected, "rejected"),
]


@pytest.mark.parametrize(("status", "body", "error", "kind"), HTTP_ERRORS, ids=lambda value: repr(value)[:60])
def test_each_error_of_an_endpoint_is_of_a_kind_that_says_what_to_do(
    status: int, body: object, error: type[JudgeFailure], kind: str
) -> None:
    answer, _ = complete(reply(status, body))
    assert type(answer) is error
    assert isinstance(answer, JudgeFailure)
    assert (answer.kind, answer.status) == (kind, status)
    assert answer.fault == ("completion" if kind in ("too_long", "refused") else "judge")
    assert str(answer).startswith(f"HTTP {status}: ")


@pytest.mark.parametrize(
    "broken",
    [
        raw(b""),
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"),
        raw(CHUNKED + b"zz\r\n{}"),
        raw(CHUNKED + b"5\r\n{}"),
        raw(b"nonsense\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 300_000 + b"\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}}"),
        flood(b"", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 100),
        flood(CHUNKED, b"1\r\n \r\n" * 10_000),
        reset(),
        reset(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"),
    ],
    ids=[
        "end",
        "half",
        "chunk",
        "cut chunk",
        "no http",
        "header",
        "lengths",
        "103s",
        "tiny chunks",
        "rst",
        "rst later",
    ],
)
def test_an_answer_that_is_no_whole_http_may_come_whole_at_the_next_try(broken: Answer) -> None:
    answer, _ = complete(broken, timeout_s=30.0)  # a busy machine needs seconds for 200,000 chunks
    assert type(answer) is JudgeUnavailable


def check(*answers: Answer, **settings: Any) -> tuple[JudgeError | None, FaultServer]:
    async def main() -> tuple[JudgeError | None, FaultServer]:
        async with serving(*answers) as server:
            client = OpenAIChatClient(endpoint(server.url, **settings), timeout_s=1.0)
            try:
                await client.check()
            except JudgeError as exc:
                return exc, server
            finally:
                await client.aclose()
            return None, server

    return asyncio.run(main())


def test_check_asks_for_the_models_and_is_content_where_ours_is_among_them() -> None:
    problem, server = check(reply(200, {"data": [{"id": "judge-1"}]}))
    assert problem is None
    assert [one.line for one in server.received] == ["GET /v1/models HTTP/1.1"]


def test_check_asks_a_small_question_where_models_are_not_listed() -> None:
    problem, server = check(reply(404, {}), reply(200, chat("pong")))
    assert problem is None
    assert [one.line.split()[0] for one in server.received] == ["GET", "POST"]


def test_check_asks_the_model_itself_where_the_list_lacks_it() -> None:
    problem, server = check(reply(200, {"data": [{"id": "judge-2"}]}), reply(200, chat("pong")))
    assert problem is None
    assert len(server.received) == 2
    problem, _ = check(reply(200, {"data": []}), reply(404, {"error": {"message": "no such model"}}))
    assert isinstance(problem, JudgeRejected)
    assert "endpoint.model (judge-1)" in str(problem)


def test_check_of_a_dead_endpoint_names_the_url_and_the_remedy() -> None:
    async def main() -> str:
        async with serving(reply(200, {})) as server:
            url = server.url
        with pytest.raises(JudgeUnavailable) as caught:
            await OpenAIChatClient(endpoint(url)).check()
        assert url in str(caught.value)
        return str(caught.value)

    assert "Start the judge's server" in asyncio.run(main())


def test_check_of_a_refused_key_names_the_variable_and_not_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", SECRET)
    problem, _ = check(echo_the_key, api_key="env:TEST_JUDGE_KEY")
    assert isinstance(problem, JudgeDenied)
    assert "env:TEST_JUDGE_KEY" in str(problem)
    assert SECRET not in "".join(traceback.format_exception(problem))


def test_check_of_a_path_that_is_no_api_is_a_rejection() -> None:
    problem, server = check(reply(404, {}))
    assert isinstance(problem, JudgeRejected)
    assert server.url in str(problem)


def test_building_a_client_needs_no_secret_and_using_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_JUDGE_NONE", raising=False)
    client = OpenAIChatClient(endpoint("http://127.0.0.1:9/v1", api_key="env:TEST_JUDGE_NONE"))
    with pytest.raises(JudgeConfigError, match="TEST_JUDGE_NONE"):
        asyncio.run(client.complete(REQUEST))


def test_closing_twice_raises_nothing() -> None:
    async def main() -> list[None]:
        client = OpenAIChatClient(endpoint("http://127.0.0.1:9/v1"))
        return [await client.aclose(), await client.aclose()]

    assert asyncio.run(main()) == [None, None]


def test_a_file_of_authorities_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    client = OpenAIChatClient(endpoint("https://judge.example/v1", ca_file=str(path)))
    with pytest.raises(JudgeConfigError, match=r"ca\.pem cannot be used"):
        asyncio.run(client.complete(REQUEST))
    path.write_text("no certificate")
    with pytest.raises(JudgeConfigError, match=r"ca\.pem cannot be used"):
        asyncio.run(client.complete(REQUEST))
