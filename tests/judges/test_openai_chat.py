"""The HTTP client against real loopback sockets that behave badly."""

from __future__ import annotations

import asyncio
import json
import re
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from judges.audit import AuditLog
from judges.clients.openai_chat import MAX_REPLY_BYTES, OpenAIChatClient, retry_after_s
from judges.config import EndpointConfig, JudgeConfig
from judges.errors import (
    InvalidVerdict,
    JudgeConfigError,
    JudgeError,
    JudgeRefused,
    JudgeRejected,
    JudgeTimeout,
    JudgeUnavailable,
)
from judges.pool import JudgePool
from judges.prompts import read_fences
from judges.types import ChatReply, ChatRequest, Failed, Judgement, JudgeRequest, Message, Scored, Usage

SECRET = "sk-planted-secret-0001"
REQUEST = ChatRequest(messages=(Message(role="user", content="hello"),), max_tokens=5)
Answer = Callable[[asyncio.StreamWriter, "Received"], Awaitable[None]]


class Received:
    """One request as the socket saw it."""

    def __init__(self, head: str, body: bytes) -> None:
        self.line, *lines = head.split("\r\n")
        self.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines if line)}
        self.body = json.loads(body) if body else None


class Server:
    """Answers each connection's one request with the next of `answers`; the last one repeats."""

    def __init__(self, answers: tuple[Answer, ...]) -> None:
        self._answers = answers
        self.received: list[Received] = []
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
            body = await reader.readexactly(int(length[1])) if length else b""
            self.received.append(Received(head, body))
            answer = self._answers[min(len(self.received), len(self._answers)) - 1]
            await answer(writer, self.received[-1])
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has left
        finally:
            writer.close()


@asynccontextmanager
async def serving(*answers: Answer) -> AsyncIterator[Server]:
    server = Server(answers)
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    try:
        yield server
    finally:
        listener.close()
        await asyncio.sleep(0.01)  # handlers whose client has left get to close their sockets


def reply(status: int, body: Any, **headers: str) -> Answer:
    async def answer(writer: asyncio.StreamWriter, received: Received) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(content)}", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)

    return answer


def chat(text: object, **choice: object) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop", **choice}]}


def verdict(score: float) -> Answer:
    async def answer(writer: asyncio.StreamWriter, received: Received) -> None:
        nonce, _ = read_fences(received.body["messages"][-1]["content"])
        await reply(200, chat(json.dumps({"nonce": nonce, "score": score})))(writer, received)

    return answer


def raw(data: bytes, *, then_wait_s: float = 0.0) -> Answer:
    async def answer(writer: asyncio.StreamWriter, received: Received) -> None:
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(then_wait_s)

    return answer


async def slowloris(writer: asyncio.StreamWriter, received: Received) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(1000):
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.02)


async def endless(writer: asyncio.StreamWriter, received: Received) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        await writer.drain()


def endpoint(url: str, **settings: Any) -> EndpointConfig:
    return EndpointConfig(url=url, model="judge-1", **settings)


def complete(*answers: Answer, timeout_s: float = 10.0, **settings: Any) -> tuple[ChatReply | JudgeError, Server]:
    """What one call makes of the answers."""

    async def main() -> tuple[ChatReply | JudgeError, Server]:
        async with serving(*answers) as server:
            client = OpenAIChatClient(endpoint(server.url, **settings), timeout_s=timeout_s)
            try:
                return await client.complete(REQUEST), server
            except JudgeError as exc:
                return exc, server
            finally:
                await client.aclose()

    return asyncio.run(main())


def judge(
    *answers: Answer, audit_path: Path | None = None, api_key: str | None = None, **settings: Any
) -> tuple[Judgement, Server]:
    """What the pool makes of the answers."""

    async def main() -> tuple[Judgement, Server]:
        async with serving(*answers) as server:
            config = JudgeConfig(
                endpoint=endpoint(server.url, api_key=api_key), rubric="fairness", **{"backoff_s": 0.001, **settings}
            )
            client = OpenAIChatClient(config.endpoints[0], timeout_s=config.timeout_s)
            audit = AuditLog(audit_path) if audit_path else None
            request = JudgeRequest(id="p#0", question="Who?", completion="Anna", reference="Anna", criterion="fairness")
            try:
                (judgement,) = await JudgePool(client=client, config=config, audit=audit).judge([request])
            finally:
                await client.aclose()
                if audit:
                    audit.close()
            return judgement, server

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


def test_503_is_tried_again_and_then_scored() -> None:
    judgement, server = judge(reply(503, {}), reply(503, {}), verdict(1.0))
    assert isinstance(judgement, Scored)
    assert (judgement.value, judgement.attempts, len(server.received)) == (1.0, 3, 3)


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 504, 529])
def test_overload_and_server_errors_are_tried_again(status: int) -> None:
    judgement, _ = judge(reply(status, {"error": "x"}), verdict(0.0))
    assert isinstance(judgement, Scored)
    assert (judgement.value, judgement.attempts) == (0.0, 2)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_the_endpoint_will_never_take_is_not_tried_again(status: int) -> None:
    judgement, server = judge(reply(status, {"error": {"message": "no such model"}}), verdict(1.0))
    assert isinstance(judgement, Failed)
    assert (judgement.kind, judgement.attempts, len(server.received)) == (
        "too_long" if status == 413 else "rejected",
        1,
        1,
    )
    assert judgement.detail.startswith(f"HTTP {status}: ")
    assert "no such model" in judgement.detail


def test_an_unpaid_bill_is_not_tried_again() -> None:
    judgement, server = judge(reply(429, {"error": {"code": "insufficient_quota"}}), verdict(1.0))
    assert isinstance(judgement, Failed)
    assert (judgement.kind, len(server.received)) == ("rejected", 1)


@pytest.mark.parametrize(
    "broken",
    [
        raw(b""),
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"),
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}"),
        raw(b"nonsense\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 300_000 + b"\r\n\r\n"),
    ],
    ids=["no answer", "short body", "bad chunk", "not http", "huge header"],
)
def test_a_reply_cut_off_or_garbled_on_the_way_is_tried_again(broken: Answer) -> None:
    judgement, _ = judge(broken, verdict(1.0))
    assert isinstance(judgement, Scored)
    assert judgement.attempts == 2


def test_nobody_listening_is_unavailable() -> None:
    async def main() -> None:
        async with serving(reply(200, {})) as server:
            url = server.url
        with pytest.raises(JudgeUnavailable, match="ConnectError"):
            await OpenAIChatClient(endpoint(url)).complete(REQUEST)

    asyncio.run(main())


@pytest.mark.parametrize("silent", [raw(b"", then_wait_s=60), slowloris], ids=["silence", "a byte at a time"])
def test_the_total_time_of_a_call_ends_it_however_slowly_bytes_drip(silent: Answer) -> None:
    started = time.monotonic()
    answer, _ = complete(silent, timeout_s=0.3)
    assert isinstance(answer, JudgeTimeout)
    assert time.monotonic() - started < 5.0


def test_a_reply_over_the_byte_cap_is_cut_and_not_tried_again() -> None:
    answer, _ = complete(endless)
    assert isinstance(answer, JudgeRejected)
    assert str(MAX_REPLY_BYTES) in str(answer)


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
    "body",
    [
        b"<html>welcome</html>",
        b"",
        b"[]",
        b"null",
        b"[" * 100_000,
        {"choices": []},
        {"choices": [{"message": None}]},
        chat(None),
        chat(""),
        chat(["a"]),
    ],
    ids=repr,
)
def test_a_reply_without_text_is_an_invalid_verdict(body: object) -> None:
    answer, _ = complete(reply(200, body))
    assert isinstance(answer, InvalidVerdict)


@pytest.mark.parametrize(
    "body", [chat("x", finish_reason="content_filter"), {"choices": [{"message": {"content": None, "refusal": "no"}}]}]
)
def test_a_refusal_is_told_from_a_broken_reply(body: object) -> None:
    answer, _ = complete(reply(200, body))
    assert isinstance(answer, JudgeRefused)


def test_malformed_verdicts_end_in_a_failure_without_a_number() -> None:
    judgement, server = judge(reply(200, chat('{"score": 1}')))
    assert isinstance(judgement, Failed)
    assert (judgement.kind, judgement.attempts, len(server.received)) == ("invalid_verdict", 2, 2)


def test_retry_after_reaches_the_pool_from_the_header() -> None:
    answer, _ = complete(reply(429, {}, Retry_After="7"))
    assert isinstance(answer, JudgeUnavailable)
    assert answer.retry_after_s == 7.0
    judgement, server = judge(reply(429, {}, Retry_After="89"), verdict(1.0), deadline_s=20.0)
    assert isinstance(judgement, Failed)
    assert (judgement.kind, len(server.received)) == ("deadline", 1)


def test_retry_after_is_read_as_seconds_or_a_date_and_nonsense_is_ignored() -> None:
    assert retry_after_s("0") == 0.0
    assert retry_after_s("1.5") == 1.5
    in_a_minute = retry_after_s(formatdate(time.time() + 60, usegmt=True))
    assert in_a_minute is not None
    assert 50 < in_a_minute <= 61
    for nonsense in (None, "", "-5", "inf", "nan", "1e400", "soon", formatdate(0, usegmt=True)):
        assert retry_after_s(nonsense) is None


async def echo_the_key(writer: asyncio.StreamWriter, received: Received) -> None:
    await reply(401, {"error": f"bad key: {received.headers['authorization']}"})(writer, received)


async def say_the_key(writer: asyncio.StreamWriter, received: Received) -> None:
    await reply(200, chat(f"your key is {received.headers['authorization']}"))(writer, received)


@pytest.mark.parametrize("answer", [echo_the_key, say_the_key, raw(b""), slowloris])
def test_the_key_is_in_no_judgement_no_audit_and_no_exception(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", SECRET)
    path = tmp_path / "audit.jsonl"
    judgement, server = judge(answer, audit_path=path, api_key="env:TEST_JUDGE_KEY", timeout_s=0.3, attempts=1)
    assert server.received[0].headers["authorization"] == f"Bearer {SECRET}"
    assert SECRET not in repr(judgement)
    assert SECRET not in path.read_text()
    error, _ = complete(answer, api_key="env:TEST_JUDGE_KEY", timeout_s=0.3)
    if isinstance(error, JudgeError):
        assert SECRET not in "".join(traceback.format_exception(error)) + repr(error)


def check(*answers: Answer, **settings: Any) -> tuple[JudgeError | None, Server]:
    async def main() -> tuple[JudgeError | None, Server]:
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


def test_check_asks_for_the_models_and_is_content() -> None:
    problem, server = check(reply(200, {"data": []}))
    assert problem is None
    assert [one.line for one in server.received] == ["GET /v1/models HTTP/1.1"]


def test_check_asks_a_small_question_where_models_are_not_listed() -> None:
    problem, server = check(reply(404, {}), reply(200, chat("pong")))
    assert problem is None
    assert [one.line.split()[0] for one in server.received] == ["GET", "POST"]


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
    assert isinstance(problem, JudgeRejected)
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
