"""What a judged reward keeps by its recipe: a cache, a budget, and an audit that can answer in the judge's stead."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from judges.demo_server import serve
from rewards.base import RewardContext, begin_step, check_reward_ready, close_reward, score_group
from rewards.config import RewardSpec
from rewards.errors import RewardConfigError
from rewards.judged import Judged
from rewards.registry import build_reward
from rewards.types import RewardInput, Score

SCENE = "Anna and Omar waited. One of them forgot the keys. Who forgot the keys?"
PRICE = {"input": 1000.0, "output": 1000.0}  # 0.001 a token: the demo judge counts words


def make_reward(url: str, context: RewardContext, **params: Any) -> Judged:
    endpoint = {"url": url, "model": "demo-judge", "price": PRICE}
    reward = build_reward(
        RewardSpec(name="judged", params={"endpoint": endpoint, "rubric": "fairness", **params}), context
    )
    assert isinstance(reward, Judged)
    return reward


def score(reward: Judged, *completions: str, step: int | None = None) -> Sequence[Score]:
    async def main() -> Sequence[Score]:
        inputs = [RewardInput(prompt_id="p", prompt=SCENE, completion=one, reference="Anna") for one in completions]
        try:
            await check_reward_ready(reward)
            if step is not None:
                begin_step(reward, step)
            return await score_group(reward, inputs)
        finally:
            await close_reward(reward)

    return asyncio.run(main())


def test_a_cached_verdict_is_not_asked_for_again_in_a_later_run(tmp_path: Path) -> None:
    context = RewardContext(base_dir=tmp_path, audit_path=tmp_path / "audit.jsonl")
    with serve() as server:
        first = score(make_reward(server.url, context, cache="verdicts.db"), "Anna", "Omar")
        assert server.stats()["verdicts"] == 2
        second = score(make_reward(server.url, context, cache="verdicts.db"), "Anna", "Omar", "Anna!")
        assert server.stats()["verdicts"] == 3
    assert second[:2] == first  # scores and the judge's words
    assert (tmp_path / "verdicts.db").exists()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["origin"] for line in lines] == ["asked", "asked", "cached", "cached", "asked"]


def test_rewards_that_ask_one_judge_share_its_cap_and_a_later_run_knows_what_they_spent(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    budget = {"budget": {"per_run": 5.0}, "max_tokens": 100}
    with serve() as server:
        context = RewardContext(base_dir=tmp_path, audit_path=path)
        rewards = [make_reward(server.url, context, **budget) for _ in range(2)]
        assert score(rewards[0], "Anna")[0].value == 1.0
        (shared,) = context.budgets.values()
        spent = shared.spent
        assert 0 < spent < 1
        assert score(rewards[1], "Omar")[0].value == 0.0
        assert shared.spent > 1.9 * spent
        resumed = RewardContext(base_dir=tmp_path, audit_path=path)
        make_reward(server.url, resumed, **budget)
        (left,) = resumed.budgets.values()
        with pytest.raises(Exception, match="per_run is reached"):
            left.reserve(5.0 - shared.spent + 1e-9)
        left.reserve(5.0 - shared.spent - 1e-9)


def test_at_the_cap_of_a_step_scores_are_missing_and_the_next_step_goes_on(tmp_path: Path) -> None:
    context = RewardContext(base_dir=tmp_path, audit_path=tmp_path / "audit.jsonl")
    texts = [f"Omar {n}" for n in range(30)]
    with serve() as server:
        reward = make_reward(server.url, context, budget={"per_step": 6.0}, max_tokens=100)
        steps = [score(reward, *texts, step=step) for step in (1, 2)]
    for scores in steps:
        missing = [one for one in scores if one.value is None]
        assert 0 < len(missing) < 30
        assert all("budget.per_step is reached" in one.reason for one in missing)
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    spent = {
        step: sum(one["booking"]["amount"] for one in lines if "booking" in one and one["step"] == step)
        for step in (1, 2)
    }
    assert all(3.0 < amount <= 6.0 for amount in spent.values())


def test_one_judge_cannot_have_two_budgets(tmp_path: Path) -> None:
    context = RewardContext(base_dir=tmp_path)
    make_reward("http://127.0.0.1:9/v1", context, budget={"per_run": 1.0})
    with pytest.raises(RewardConfigError, match="their budgets differ"):
        make_reward("http://127.0.0.1:9/v1", context, budget={"per_run": 2.0})


def test_a_replayed_reward_is_ready_without_a_server_a_url_or_a_key(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with serve() as server:
        first = score(make_reward(server.url, RewardContext(base_dir=tmp_path, audit_path=path)), "Anna", "Omar")
    replayed = make_reward("env:NOT_SET_ANYWHERE", RewardContext(base_dir=tmp_path, replay_path=path))
    assert score(replayed, "Anna", "Omar") == first
    (missing,) = score(replayed, "Eve")
    assert missing.value is None
    assert missing.reason.startswith("judge failed: not_recorded: audit.jsonl holds no judgement of request p#0")
