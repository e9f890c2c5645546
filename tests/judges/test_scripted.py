"""The judges that need no model."""

from __future__ import annotations

import asyncio

import pytest

from judges.clients.base import JudgeClient
from judges.clients.scripted import ScriptedClient, in_turn, stub_client, verdict_by, verdict_for
from judges.errors import JudgeUnavailable
from judges.prompts import RenderedPrompt, load_rubric, render_comparison, render_prompt
from judges.types import ChatReply, ChatRequest, JudgeRequest, Message
from judges.verdicts import parse_group_verdict, parse_pair_verdict, parse_verdict

# sha256("3\\nscore\\n" + text), its first 48 bits as a fraction of 10
ANNA, OMAR = 4.820909055641138, 1.4720496777590597


def make_requests(*completions: str) -> list[JudgeRequest]:
    return [
        JudgeRequest(id=text, question="Who?", completion=text, reference="Anna", criterion="fairness")
        for text in completions
    ]


def point(text: str) -> RenderedPrompt:
    return render_prompt(load_rubric("fairness"), make_requests(text)[0], low=0.0, high=10.0)


def ask(client: ScriptedClient, prompt: RenderedPrompt) -> str:
    request = ChatRequest(messages=(Message(role="user", content=prompt.text),), max_tokens=9)
    return asyncio.run(client.complete(request)).text


def test_a_script_says_texts_replies_and_failures_in_turn() -> None:
    client = ScriptedClient(in_turn("a", ChatReply(text="b", finish_reason="length"), JudgeUnavailable("down")))
    assert isinstance(client, JudgeClient)
    prompt = point("Anna")
    assert [ask(client, prompt), ask(client, prompt)] == ["a", "b"]
    for _ in range(2):
        with pytest.raises(JudgeUnavailable, match="down"):
            ask(client, prompt)
    assert len(client.requests) == 4


def test_a_verdict_for_a_prompt_is_one_that_is_read_back() -> None:
    prompt = point("Anna")
    text = ask(ScriptedClient(lambda request: verdict_for(request, 7.5)), prompt)
    assert parse_verdict(text, nonce=prompt.nonce, low=0.0, high=10.0) == 7.5


def test_a_stub_scores_a_text_alike_in_every_mode_and_every_process() -> None:
    client, scale = stub_client(seed=3, high=10.0), {"low": 0.0, "high": 10.0}
    alone = []
    for text in ("Anna", "Omar"):
        prompt = point(text)
        alone.append(parse_verdict(ask(client, prompt), nonce=prompt.nonce, **scale))
    assert alone == pytest.approx([ANNA, OMAR], abs=0)

    group = render_comparison(load_rubric("fairness"), make_requests("Anna", "Omar"), mode="groupwise", **scale)
    verdicts = parse_group_verdict(ask(client, group), nonce=group.nonce, ids=group.ids, **scale)
    assert [verdicts[one].score for one in group.ids] == alone

    pair = render_comparison(load_rubric("fairness"), make_requests("Anna", "Omar"), mode="pairwise", **scale)
    winner = parse_pair_verdict(ask(client, pair), nonce=pair.nonce, ids=pair.ids)
    assert winner == pair.ids[0 if alone[0] > alone[1] else 1]
    tied = ask(ScriptedClient(lambda request: verdict_by(request, lambda text: 1.0)), pair)
    assert parse_pair_verdict(tied, nonce=pair.nonce, ids=pair.ids) is None


def test_a_stub_fails_as_often_as_it_is_told() -> None:
    client = stub_client(failure_rate=0.3)
    num_failures = 0
    for _ in range(300):
        try:
            ask(client, point("Anna"))
        except JudgeUnavailable:
            num_failures += 1
    assert 50 < num_failures < 130  # 90 +- 5 standard deviations of 7.9
