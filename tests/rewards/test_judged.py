"""The reward backed by a judge pool."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from judges import EndpointConfig, JudgeConfig, JudgeRefused, JudgeRejected, ScriptedClient
from judges.clients.scripted import verdict_for
from judges.demo_server import serve
from judges.prompts import read_fences
from rewards.base import RewardContext, check_reward_ready, close_reward, score_group
from rewards.config import RewardSpec
from rewards.errors import RewardConfigError, RewardError, RewardUnavailable
from rewards.judged import Judged
from rewards.registry import build_reward
from rewards.types import RewardInput, Score

SCENE = "Anna and Omar waited. One of them forgot the keys. Who forgot the keys?"
SECRET = "sk-planted-secret-0001"


def make_inputs(*completions: str) -> list[RewardInput]:
    return [
        RewardInput(prompt_id="p7", prompt=SCENE, completion=completion, reference="Anna") for completion in completions
    ]


def make_params(url: str = "http://127.0.0.1:9/v1", **extra: Any) -> dict[str, Any]:
    endpoint = {"url": url, "model": "demo-judge"}
    return {"endpoint": endpoint, "rubric": "fairness", "backoff_s": 0.001, **extra}


def make_config() -> JudgeConfig:
    return JudgeConfig(endpoints=(EndpointConfig(url="http://127.0.0.1:9/v1", model="m"),), rubric="fairness")


def build(params: dict[str, Any], *, base_dir: Path, audit_path: Path | None = None) -> Judged:
    reward = build_reward(
        RewardSpec(name="judged", params=params), RewardContext(base_dir=base_dir, audit_path=audit_path)
    )
    assert isinstance(reward, Judged)
    return reward


def run(reward: Judged, call: Callable[[Judged], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        try:
            return await call(reward)
        finally:
            await close_reward(reward)

    return asyncio.run(main())


def test_a_group_is_scored_through_a_server_whose_url_is_named_at_run_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = build(make_params("env:TEST_JUDGE_URL"), base_dir=tmp_path, audit_path=tmp_path / "judge_audit.jsonl")
    with serve() as server:
        monkeypatch.setenv("TEST_JUDGE_URL", server.url)

        async def call(reward: Judged) -> list[Score]:
            await check_reward_ready(reward)
            return await score_group(reward, make_inputs("Anna", "Omar", "Anna."))

        scores = run(reward, call)
    assert [score.value for score in scores] == [1.0, 0.0, 1.0]
    assert '"score": 1.0' in scores[0].reason
    lines = [json.loads(line) for line in (tmp_path / "judge_audit.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == ["p7#0", "p7#1", "p7#2"]
    assert {line["criterion"] for line in lines} == {"fairness"}


def test_a_failed_judge_is_a_missing_score_with_its_cause() -> None:
    def script(request: Any) -> str:
        if read_fences(request.messages[-1].content)[1]["completion"] == "bad":
            raise JudgeRejected("HTTP 400: no", status=400)
        return verdict_for(request, 1.0)

    reward = Judged(make_config(), client=ScriptedClient(script))
    good, bad = run(reward, lambda reward: reward.score(make_inputs("good", "bad")))
    assert good.value == 1.0
    assert bad == Score(value=None, reason="judge failed: rejected: HTTP 400: no")


def test_the_judge_is_shown_prompt_completion_and_reference() -> None:
    client = ScriptedClient(lambda request: verdict_for(request, 1.0))
    run(Judged(make_config(), client=client), lambda reward: reward.score(make_inputs("Omar")))
    _, fences = read_fences(client.requests[0].messages[-1].content)
    assert fences == {"question": SCENE, "completion": "Omar", "reference": "Anna"}


def test_an_unreachable_endpoint_is_reported_before_the_first_step(tmp_path: Path) -> None:
    with serve() as server:
        url = server.url
    with pytest.raises(RewardUnavailable, match="Start the judge's server") as caught:
        run(build(make_params(url), base_dir=tmp_path), lambda reward: reward.check())
    assert url in str(caught.value)


def test_a_url_variable_that_is_not_set_is_the_users_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_JUDGE_URL", raising=False)
    reward = build(make_params("env:TEST_JUDGE_URL"), base_dir=tmp_path)
    with pytest.raises(RewardConfigError, match="TEST_JUDGE_URL is not set"):
        run(reward, lambda reward: reward.check())
    with pytest.raises(RewardConfigError, match="TEST_JUDGE_URL is not set"):
        run(reward, lambda reward: reward.score(make_inputs("Anna")))


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"retries": 2}, "retries: Extra inputs"),
        ({"attempts": 0}, "attempts: "),
        ({"rubric": "kindness"}, "fairness, grounding"),
        ({"endpoint": {"url": "http://judge.example/v1", "model": "m"}}, r"endpoints\.0\.url: .*expected https"),
    ],
)
def test_wrong_params_are_named(extra: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(RewardConfigError, match=problem):
        build(make_params(**extra), base_dir=tmp_path)


def test_a_literal_key_in_a_recipe_is_refused_and_not_shown(tmp_path: Path) -> None:
    params = make_params(endpoint={"url": "https://judge.example/v1", "model": "m", "api_key": SECRET})
    with pytest.raises(RewardConfigError, match=r"endpoints\.0\.api_key: .*env:NAME") as caught:
        build(params, base_dir=tmp_path)
    cause: BaseException | None = caught.value
    while cause is not None:
        assert SECRET not in str(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def test_a_rubric_file_is_found_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "tone.txt").write_text('Criterion: {criterion}\n{completion}\n{"nonce": "{nonce}", "score": 1}')
    reward = build(make_params(rubric="tone.txt"), base_dir=tmp_path, audit_path=tmp_path / "audit.jsonl")
    run(reward, lambda reward: reward.score(make_inputs("Anna")))
    assert json.loads((tmp_path / "audit.jsonl").read_text())["criterion"] == "tone"


def test_an_audit_that_cannot_be_written_is_an_error_and_not_a_score(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    client = ScriptedClient(lambda request: verdict_for(request, 1.0))
    reward = Judged(make_config(), audit_path=tmp_path / "file" / "audit.jsonl", client=client)
    with pytest.raises(RewardError, match="cannot be written"):
        asyncio.run(reward.score(make_inputs("Anna")))


def test_one_reward_serves_one_event_loop_after_another() -> None:
    with serve() as server:
        reward = Judged(JudgeConfig.model_validate(make_params(server.url)))
        for _ in range(2):
            (score,) = run(reward, lambda reward: reward.score(make_inputs("Anna")))
            assert score.value == 1.0


def refusing_bad(request: Any) -> str:
    if read_fences(request.messages[-1].content)[1]["completion"] == "bad":
        raise JudgeRefused("no")
    return verdict_for(request, 1.0)


@pytest.mark.parametrize(
    ("choice", "value", "said"),
    [
        ({}, None, "on_completion_fault is not set"),
        ({"on_completion_fault": "mask"}, None, "the completion made the judge fail: refused"),
        ({"on_completion_fault": {"penalise": -1.0}}, -1.0, "penalised by the recipe"),
    ],
)
def test_a_completion_that_provokes_a_refusal_gets_what_the_recipe_says(
    choice: dict[str, Any], value: float | None, said: str
) -> None:
    config = JudgeConfig.model_validate(make_params(**choice))
    reward = Judged(config, client=ScriptedClient(refusing_bad))
    good, bad = run(reward, lambda reward: reward.score(make_inputs("good", "bad")))
    assert good.value == 1.0
    assert bad.value == value
    assert said in bad.reason


def test_a_judge_that_is_down_is_never_penalised() -> None:
    def down(request: Any) -> str:
        raise JudgeRejected("HTTP 404: no such model", status=404)

    config = JudgeConfig.model_validate(make_params(on_completion_fault={"penalise": -1.0}))
    (score,) = run(Judged(config, client=ScriptedClient(down)), lambda reward: reward.score(make_inputs("Anna")))
    assert score.value is None
