"""Anthropic's dialect over real loopback sockets. What the dialects share is tested in test_openai_chat."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fault_server import Answer, FaultServer, reply, serving

from judges.clients.anthropic_messages import AnthropicMessagesClient
from judges.config import EndpointConfig
from judges.errors import InvalidVerdict, JudgeError, JudgeOverloaded, JudgeRefused, JudgeRejected
from judges.types import ChatReply, ChatRequest, Message, Usage
from judges.verdicts import verdict_schema

SECRET = "sk-ant-planted-secret-0001"
REQUEST = ChatRequest(
    messages=(Message(role="system", content="Be strict."), Message(role="user", content="hello")), max_tokens=5
)


def message(*texts: str, **more: object) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text} for text in texts], "stop_reason": "end_turn", **more}


def complete(
    *answers: Answer, request: ChatRequest = REQUEST, **settings: Any
) -> tuple[ChatReply | JudgeError, FaultServer]:
    async def main() -> tuple[ChatReply | JudgeError, FaultServer]:
        async with serving(*answers) as server:
            config = EndpointConfig(url=server.url, model="claude-1", dialect="anthropic_messages", **settings)
            client = AnthropicMessagesClient(config, timeout_s=5.0)
            try:
                return await client.complete(request), server
            except JudgeError as exc:
                return exc, server
            finally:
                await client.aclose()

    return asyncio.run(main())


def test_a_call_is_one_post_with_the_request_and_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", SECRET)
    usage = {"input_tokens": 3, "cache_read_input_tokens": 10, "cache_creation_input_tokens": None, "output_tokens": 2}
    answer, server = complete(reply(200, message("a", "b", usage=usage)), api_key="env:TEST_JUDGE_KEY")
    assert answer == ChatReply(text="ab", finish_reason="end_turn", usage=Usage(prompt_tokens=13, completion_tokens=2))
    (received,) = server.received
    assert received.line == "POST /v1/messages HTTP/1.1"
    assert received.body == {
        "model": "claude-1",
        "max_tokens": 5,
        "system": "Be strict.",
        "messages": [{"role": "user", "content": "hello"}],
    }
    assert received.headers["x-api-key"] == SECRET
    assert received.headers["anthropic-version"] == "2023-06-01"
    assert "authorization" not in received.headers


def test_temperature_and_schema_are_sent_only_where_they_are_asked_for() -> None:
    schema = verdict_schema("pointwise", low=0.0, high=1.0)
    request = ChatRequest(messages=REQUEST.messages[1:], max_tokens=5, temperature=0.5, seed=3, json_schema=schema)
    _, server = complete(reply(200, message("a")), request=request, structured="json_schema")
    body = server.received[0].body
    assert body["temperature"] == 0.5
    assert body["output_config"] == {"format": {"type": "json_schema", "schema": schema}}
    assert "seed" not in body
    assert "system" not in body


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"content": [], "stop_reason": "end_turn"}, "empty"),
        ({"content": [{"type": "thinking", "thinking": "hm"}], "stop_reason": "end_turn"}, "empty"),
        ({"content": [{"type": "thinking", "thinking": "hm"}], "stop_reason": "max_tokens"}, "truncated"),
        ({"content": "text"}, "invalid_verdict"),
        ({"content": [{"type": "text", "text": 3}]}, "invalid_verdict"),
        ({"choices": []}, "invalid_verdict"),
        ([], "invalid_verdict"),
    ],
    ids=repr,
)
def test_a_reply_without_text_is_no_verdict_and_says_of_which_kind(body: object, kind: str) -> None:
    answer, _ = complete(reply(200, body))
    assert isinstance(answer, InvalidVerdict)
    assert answer.kind == kind


def test_a_refusal_is_told_from_a_broken_reply() -> None:
    usage = {"input_tokens": 3, "output_tokens": 0}
    answer, _ = complete(reply(200, message("I", stop_reason="refusal", usage=usage)))
    assert isinstance(answer, JudgeRefused)
    assert answer.usage == Usage(prompt_tokens=3, completion_tokens=0)


def test_a_reply_that_was_cut_off_says_so() -> None:
    answer, _ = complete(reply(200, message("a", stop_reason="max_tokens")))
    assert isinstance(answer, ChatReply)
    assert answer.is_truncated


def test_its_errors_are_sorted_like_all_others() -> None:
    too_long = {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 9 > 8"}}
    answer, _ = complete(reply(400, too_long))
    assert isinstance(answer, JudgeRejected)
    assert (answer.kind, answer.fault) == ("too_long", "completion")
    busy = {"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}}
    answer, _ = complete(reply(429, busy, Retry_After="3"))
    assert isinstance(answer, JudgeOverloaded)
    assert answer.retry_after_s == 3.0
