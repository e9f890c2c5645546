"""Our rewards inside TRL's own GRPOTrainer, and functions made for that trainer as rewards of ours."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from judges.demo_server import serve
from rewards import RewardContext, RewardInput, RewardSpec, Score, build_reward, close_reward, score_group
from rewards.trl_bridge import as_trl_reward

GROUP_SIZE = 4


class Vowels:
    """Asynchronous; the share of vowels, and no verdict on a text of an odd length. Keeps what it has scored."""

    def __init__(self) -> None:
        self.inputs: list[RewardInput] = []
        self.scores: list[Score] = []
        self.group_sizes: list[int] = []
        self.steps: list[int] = []

    def begin_step(self, step: int) -> None:
        self.steps.append(step)

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        scores = [self._score_of(one.completion) for one in inputs]
        self.inputs += inputs
        self.scores += scores
        self.group_sizes.append(len(inputs))
        return scores

    def _score_of(self, text: str) -> Score:
        if len(text) % 2:
            return Score(value=None, reason="an odd length")
        return Score(value=sum(letter in "aeiou" for letter in text) / max(1, len(text)), reason="an even length")


def train(model: Path, folder: Path, reward_funcs: list[Any], **columns: Any) -> GRPOTrainer:
    """Two steps of TRL's trainer on the tiny model, two prompts each."""
    texts = ["Say a word.", "Add 1 and 2.", "Name a fox.", "What is it?"]
    rows = {"prompt": [[{"role": "user", "content": text}] for text in texts], **columns}
    config = GRPOConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2 * GROUP_SIZE,
        num_generations=GROUP_SIZE,
        max_completion_length=6,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        seed=3,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own, of versions to come; what is claimed here does not hang on them
        trainer = GRPOTrainer(
            model=str(model), reward_funcs=reward_funcs, args=config, train_dataset=Dataset.from_dict(rows)
        )
        trainer.train()
    return trainer


def test_trl_logs_the_scores_of_our_rewards_and_takes_the_missing_ones_out(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    vowels = Vowels()
    with (
        as_trl_reward(vowels, name="vowels") as first,
        as_trl_reward("length", params={"target_tokens": 2, "limit_tokens": 6}) as second,
    ):
        trainer = train(tiny_model_dir, tmp_path, [first, second], kind=["a", "b", "c", "d"])
    logged = [entry for entry in trainer.state.log_history if "rewards/vowels/mean" in entry]
    assert len(logged) == 2
    assert set(vowels.steps) == {1, 2}
    assert vowels.group_sizes == [GROUP_SIZE] * 4  # a prompt's completions come in one call
    assert {one.meta["kind"] for one in vowels.inputs} == {"a", "b", "c", "d"}
    missing = [score.value is None for score in vowels.scores]
    assert any(missing)
    assert not all(missing)
    per_step = 2 * GROUP_SIZE
    for step, entry in enumerate(logged):
        own = slice(step * per_step, (step + 1) * per_step)
        values = [score.value for score in vowels.scores[own] if score.value is not None]
        assert entry["rewards/vowels/mean"] == pytest.approx(sum(values) / len(values), rel=1e-5)
        # 0 up to 2 tokens, then a quarter less for each of the four up to 6
        penalties = [-max(0, one.num_tokens - 2) / 4 for one in vowels.inputs[own]]
        assert entry["rewards/length/mean"] == pytest.approx(sum(penalties) / per_step, rel=1e-5, abs=1e-7)


def test_the_reasons_are_in_trls_table_of_completions(tiny_model_dir: Path, tmp_path: Path) -> None:
    vowels = Vowels()
    with as_trl_reward(vowels, name="vowels") as function:
        trainer = train(tiny_model_dir, tmp_path, [function])
    reasons = list(trainer._logs["extra"]["vowels_reason"])
    last = vowels.scores[-len(reasons) :]
    assert reasons == [score.reason for score in last]
    assert set(reasons) <= {"an even length", "an odd length"}


def test_a_completion_that_our_reward_leaves_missing_moves_no_advantage_in_trl(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    vowels = Vowels()
    with as_trl_reward(vowels, name="vowels") as function:
        trainer = train(tiny_model_dir, tmp_path, [function])
    advantages = list(trainer._logs["advantages"])
    values = [score.value for score in vowels.scores[-len(advantages) :]]
    assert None in values
    for start in range(0, len(values), GROUP_SIZE):
        own = [value for value in values[start : start + GROUP_SIZE] if value is not None]
        spread = statistics.stdev(own) if len(own) > 1 else 0.0
        for value, advantage in zip(values[start:][:GROUP_SIZE], advantages[start:][:GROUP_SIZE], strict=True):
            # the group's mean and deviation are those of the scored completions alone
            expected = 0.0 if value is None else (value - statistics.mean(own)) / (spread + 1e-4)
            assert advantage == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_judge_of_ours_scores_in_trls_trainer_and_writes_its_audit(tiny_model_dir: Path, tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    with serve() as server:
        params = {"endpoint": {"url": server.url, "model": "demo-judge"}, "rubric": "fairness"}
        with as_trl_reward("judged", params=params, audit_path=audit, reference_column="answer") as function:
            trainer = train(tiny_model_dir, tmp_path, [function], answer=["word", "3", "Reynard", "it"])
    records = [json.loads(line) for line in audit.read_text().splitlines()]
    assert len(records) == 2 * 2 * GROUP_SIZE  # one for every completion of both steps
    logged = [entry["rewards/judged/mean"] for entry in trainer.state.log_history if "rewards/judged/mean" in entry]
    for step, mean in enumerate(logged, start=1):
        own = [one["value"] for one in records if one["step"] == step and one["outcome"] == "scored"]
        assert mean == pytest.approx(statistics.mean(own))
    assert len(logged) == 2


MADE_FOR_TRL = '''
"""As people write it for TRL: nothing here knows of this toolkit."""

seen = []


def similar(prompts, completions, completion_ids, solution, log_extra, log_metric, trainer_state, **kwargs):
    seen.append({"prompts": prompts, "completions": completions, "completion_ids": completion_ids,
                 "solution": solution, "step": trainer_state.global_step, **kwargs})
    shares = [len(set(c[0]["content"]) & set(right)) / len(set(right)) for c, right in zip(completions, solution)]
    log_extra("solution", list(solution))
    log_metric("similar", sum(shares) / len(shares))
    return [share if len(c[0]["content"]) % 2 == 0 else None for share, c in zip(shares, completions)]
'''


def test_a_function_made_for_trl_is_called_here_as_trls_trainer_calls_it(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_for_trl_trainer.py").write_text(MADE_FOR_TRL)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = RewardSpec(name="trl:made_for_trl_trainer:similar", params={"reference_as": "solution"})
    reward = build_reward(spec, RewardContext(base_dir=tmp_path))
    module = sys.modules["made_for_trl_trainer"]
    monkeypatch.delitem(sys.modules, "made_for_trl_trainer")
    trainer = train(
        tiny_model_dir, tmp_path, [module.similar], solution=["word", "three", "reynard", "it"], kind=["a", "b"] * 2
    )
    by_trl = [call for call in module.seen if call["step"] == 1]  # during the second step one is done
    module.seen.clear()
    (last,) = by_trl
    rows = range(2 * GROUP_SIZE)
    inputs = [
        RewardInput(
            prompt_id=last["prompts"][row][0]["content"],
            prompt=last["prompts"][row][0]["content"],
            completion=last["completions"][row][0]["content"],
            reference=last["solution"][row],
            meta={"kind": last["kind"][row]},
            messages=tuple(last["prompts"][row]),
            token_ids=tuple(last["completion_ids"][row]),
        )
        for row in rows
    ]

    async def scored() -> list[Score]:
        reward.begin_step(2)  # pyright: ignore[reportAttributeAccessIssue]
        groups = [inputs[:GROUP_SIZE], inputs[GROUP_SIZE:]]
        scores = [score for group in groups for score in await score_group(reward, group)]
        await close_reward(reward)
        return scores

    scores = asyncio.run(scored())
    assert [call.keys() for call in module.seen] == [last.keys()] * 2
    for name, values in last.items():
        here = [call[name] for call in module.seen]
        assert here == ([values] * 2 if name == "step" else [values[:GROUP_SIZE], values[GROUP_SIZE:]])
    values = [score.value for score in scores if score.value is not None]
    assert 0 < len(values) < len(scores)
    logged = [entry for entry in trainer.state.log_history if "rewards/similar/mean" in entry]
    assert logged[-1]["rewards/similar/mean"] == pytest.approx(statistics.mean(values), rel=1e-5)
    assert all(
        score.reason.split("solution: ")[1].startswith(one.reference or "-")
        for score, one in zip(scores, inputs, strict=True)
    )
