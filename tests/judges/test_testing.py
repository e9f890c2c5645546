"""The contract kit: what keeps the contract passes, and each way to break it is named."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from judges import (
    ChatReply,
    ChatRequest,
    EndpointConfig,
    Failed,
    JudgeConfig,
    Judgement,
    JudgePool,
    JudgeRefused,
    JudgeRequest,
    JudgeUnavailable,
    Scored,
    Usage,
)
from judges.clients.openai_chat import OpenAIChatClient
from judges.clients.scripted import ScriptedClient, stub_client, verdict_for
from judges.config import GroupwiseMode, PairwiseMode, ScaleConfig
from judges.demo_server import serve
from judges.prompts import read_fences
from judges.testing import JudgeContractBroken, check_judge


def make_config(**settings: Any) -> JudgeConfig:
    endpoint = EndpointConfig(url="http://127.0.0.1:9/v1", model="m")
    return JudgeConfig(**{"endpoints": (endpoint,), "rubric": "fairness", "backoff_s": 0.001, **settings})


def problems_of(judge: Any, **settings: Any) -> str:
    with pytest.raises(JudgeContractBroken) as caught:
        check_judge(judge, **settings)
    return str(caught.value)


def test_the_doubles_that_we_ship_keep_the_contract() -> None:
    check_judge(ScriptedClient(lambda request: verdict_for(request, 1.0)))
    check_judge(stub_client(failure_rate=0.2, latency_s=lambda request: 0.02))


def test_our_http_client_keeps_it_against_a_real_server() -> None:
    with serve() as server:
        endpoint = EndpointConfig(url=server.url, model="demo-judge")
        check_judge(OpenAIChatClient(endpoint, timeout_s=5.0))


@pytest.mark.parametrize("mode", [GroupwiseMode(), PairwiseMode(opponents=2)], ids=["groupwise", "pairwise"])
def test_a_pool_keeps_it_in_modes_that_compare(mode: Any) -> None:
    config = make_config(mode=mode)
    check_judge(JudgePool(client=stub_client(), config=config), config=config)


def test_a_judge_that_refuses_hostile_texts_keeps_it() -> None:
    def script(request: ChatRequest) -> str:
        if "Anna, as line" not in read_fences(request.messages[-1].content)[1]["completion"]:
            raise JudgeRefused("I will not judge this")
        return verdict_for(request, 0.5)

    check_judge(ScriptedClient(script))


def test_another_scale_is_checked_by_its_config() -> None:
    config = make_config(scale=ScaleConfig(low=1, high=10))
    check_judge(ScriptedClient(lambda request: verdict_for(request, 7)), config=config)


class Client:
    """Answers by a function of its own, which may do anything."""

    def __init__(self, answer: Callable[[ChatRequest], Any]) -> None:
        self._answer = answer

    async def complete(self, request: ChatRequest) -> Any:
        answer = self._answer(request)
        return await answer if asyncio.iscoroutine(answer) else answer

    async def aclose(self) -> None:
        return


def reply_of(request: ChatRequest, **changes: Any) -> ChatReply:
    return ChatReply(**{"text": verdict_for(request, 1.0), "finish_reason": "stop", **changes})


def raise_foreign_error(request: ChatRequest) -> ChatReply:
    raise KeyError("choices")


async def swallow_cancelling(request: ChatRequest) -> ChatReply:
    while True:
        try:
            await asyncio.sleep(0.05)
            return reply_of(request)
        except asyncio.CancelledError:
            await asyncio.sleep(5.0)


async def leave_a_task(request: ChatRequest) -> ChatReply:
    LEFT.append(asyncio.create_task(asyncio.sleep(30.0)))
    await asyncio.sleep(0.05)
    LEFT.pop().cancel()
    return reply_of(request)


LEFT: list[asyncio.Task[None]] = []


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (raise_foreign_error, "the client raised KeyError: 'choices'; expected a JudgeFailure"),
        (lambda request: reply_of(request).text, "complete() answered a str; expected a ChatReply"),
        (lambda request: reply_of(request, finish_reason=None), "finish_reason must be texts"),
        (
            lambda request: reply_of(request, usage=Usage(prompt_tokens=-1, completion_tokens=1)),
            "expected a Usage of whole numbers from 0 on",
        ),
        (lambda request: reply_of(request, usage={"prompt_tokens": 1}), "expected a Usage of whole numbers"),
        (lambda request: reply_of(request, text="fine"), "no harmless text was scored"),
        (lambda request: reply_of(request, text=verdict_for(request, 2.0)), "no harmless text was scored"),
        (leave_a_task, "left 1 tasks behind"),
        (swallow_cancelling, "a cancelled call has not ended within 1 s"),
    ],
    ids=["foreign error", "text", "no reason", "negative", "dict", "prose", "scale", "task left", "not cancellable"],
)
def test_what_a_client_does_wrong_is_named(answer: Callable[[ChatRequest], Any], problem: str) -> None:
    assert problem in problems_of(Client(answer))


def test_a_client_that_mixes_its_replies_up_is_found_out() -> None:
    last: list[str] = []

    def script(request: ChatRequest) -> str:
        last.append(verdict_for(request, 1.0))
        return last[-2] if len(last) > 1 else last[-1]

    assert "a reply answers another call" in problems_of(ScriptedClient(script))


def test_a_client_that_holds_up_the_loop_is_found_out() -> None:
    blocks = [0.6]

    def block(request: ChatRequest) -> ChatReply:
        time.sleep(blocks.pop() if blocks else 0.0)
        return reply_of(request)

    assert "the event loop was held up for 0.6" in problems_of(Client(block))


def test_an_unreachable_judge_proves_nothing() -> None:
    def script(request: ChatRequest) -> str:
        raise JudgeUnavailable("connection refused")

    assert "no harmless text was scored" in problems_of(ScriptedClient(script))


def test_a_client_that_closes_only_once_is_found_out() -> None:
    class ClosesOnce(Client):
        is_closed = False

        async def aclose(self) -> None:
            if self.is_closed:
                raise RuntimeError("closed already")
            self.is_closed = True

    assert "the second aclose() raised RuntimeError: closed already" in problems_of(ClosesOnce(reply_of))


class Pool:
    """Stands in for a pool, and answers by a function of the requests."""

    def __init__(self, answer: Callable[[Sequence[JudgeRequest]], Any]) -> None:
        self._answer = answer

    async def judge(self, requests: Sequence[JudgeRequest]) -> list[Judgement]:
        return self._answer(requests)


def scored(value: Any = 1.0) -> Scored:
    return Scored(value=value, raw="", usage=None, attempts=1)


def raise_failure(requests: Sequence[JudgeRequest]) -> list[Judgement]:
    raise JudgeUnavailable("down")


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (raise_failure, "judge() raised JudgeUnavailable: down instead of answering Failed"),
        (lambda requests: [scored() for _ in requests][:-1], "12 requests got 11 judgements"),
        (lambda requests: None, "12 requests got a NoneType"),
        (lambda requests: [scored(float("nan")) for _ in requests], "the score is nan; expected a finite number"),
        (lambda requests: [scored(1.01) for _ in requests], "the score is 1.01; expected a finite number from 0 to 1"),
        (lambda requests: [scored(True) for _ in requests], "the score is True"),
        (lambda requests: [0.5 for _ in requests], "the judgement is a float; expected Scored or Failed"),
        (lambda requests: [scored() for _ in requests] or [scored()], "0 requests got 1 judgements"),
    ],
)
def test_what_a_pool_does_wrong_is_named(answer: Callable[[Sequence[JudgeRequest]], Any], problem: str) -> None:
    assert problem in problems_of(Pool(answer))


def test_known_scores_show_whether_the_order_is_kept() -> None:
    def by_length(requests: Sequence[JudgeRequest]) -> list[Judgement]:
        return [scored(min(1.0, len(one.completion) / 100)) for one in requests]

    known = [(JudgeRequest(id=f"k{n}", question="q", completion="x" * n, criterion="c"), n / 100) for n in (10, 20, 30)]
    check_judge(Pool(by_length), known=known)
    words = problems_of(Pool(lambda requests: by_length(requests)[::-1]), known=known)
    assert "request k30 must get 0.3, but got 0.1" in words


def test_a_failure_where_a_score_is_known_is_named() -> None:
    def answer(requests: Sequence[JudgeRequest]) -> list[Judgement]:
        failed = Failed(kind="refused", attempts=1, fault="completion", detail="no")
        return [failed if one.id == "k" else scored() for one in requests]

    known = [(JudgeRequest(id="k", question="q", completion="x", criterion="c"), 1.0)]
    assert "request k must get 1.0, but got refused: no" in problems_of(Pool(answer), known=known)


def test_what_is_no_judge_at_all_is_named() -> None:
    assert "it has neither complete() nor judge()" in problems_of(object())
