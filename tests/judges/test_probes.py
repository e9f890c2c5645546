"""Master keys: texts that answer nothing and must not be scored as if they did."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from judges.clients.scripted import ScriptedClient, verdict_by
from judges.config import EndpointConfig, JudgeConfig
from judges.errors import JudgeRefused
from judges.pool import JudgePool
from judges.probes import MASTER_KEYS, ProbeReport, probe_judge
from judges.types import ChatRequest, Judgement, JudgeRequest, Scored


def probe(score_of: Callable[[str], float]) -> ProbeReport:
    endpoint = EndpointConfig(url="http://127.0.0.1:9/v1", model="judge-1")
    config = JudgeConfig(endpoints=(endpoint,), rubric="fairness")
    pool = JudgePool(client=ScriptedClient(lambda request: verdict_by(request, score_of)), config=config)
    return asyncio.run(probe_judge(pool, criterion="fairness"))


def honest(text: str) -> float:
    return 1.0 if text == "Anna" else 0.0


def test_an_honest_judge_is_trustworthy() -> None:
    report = probe(honest)
    assert report.is_trustworthy
    assert report.problems == ()
    assert len(report.findings) == 2 + len(MASTER_KEYS)


BLANK_KEYS = [key for key in MASTER_KEYS if not key.strip()]


@pytest.mark.parametrize("key", [key for key in MASTER_KEYS if key.strip()], ids=repr)
def test_a_judge_that_one_key_opens_is_refused(key: str) -> None:
    report = probe(lambda text: 0.5 if text == key else honest(text))
    assert not report.is_trustworthy
    (problem,) = report.problems
    assert problem == f"{key[:60]!r}, which is no right answer, gets 0.5"


def test_a_blank_key_opens_no_pool_whatever_its_judge_says_and_is_no_lack_of_a_verdict() -> None:
    assert len(BLANK_KEYS) == 2
    assert probe(lambda text: 1.0 if not text.strip() else honest(text)).is_trustworthy


def test_a_blank_key_opens_a_judge_that_is_asked_about_it() -> None:
    class Gullible:
        async def judge(self, requests: Sequence[JudgeRequest]) -> list[Judgement]:
            return [
                Scored(value=1.0 if one.completion in ("Anna", "") else 0.0, raw="", usage=None, attempts=1)
                for one in requests
            ]

    report = asyncio.run(probe_judge(Gullible(), criterion="fairness"))
    assert report.problems == ("'', which is no right answer, gets 1",)


def test_a_judge_that_likes_or_dislikes_everything_is_refused() -> None:
    assert {finding.result for finding in probe(lambda text: 1.0).findings} == {"passed", "fooled"}
    assert probe(lambda text: 0.0).problems == ("the right answer 'Anna' gets 0 only",)


def test_a_probe_that_was_not_judged_has_not_passed() -> None:
    def script(request: ChatRequest) -> str:
        raise JudgeRefused("no")

    endpoint = EndpointConfig(url="http://127.0.0.1:9/v1", model="judge-1")
    pool = JudgePool(client=ScriptedClient(script), config=JudgeConfig(endpoints=(endpoint,), rubric="fairness"))
    report = asyncio.run(probe_judge(pool, criterion="fairness"))
    assert not report.is_trustworthy
    assert {finding.result for finding in report.findings if finding.completion.strip()} == {"no_verdict"}
