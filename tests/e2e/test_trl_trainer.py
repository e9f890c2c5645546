"""Our rewards inside TRL's own GRPOTrainer: it logs what they score, and leaves out what they leave missing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from rewards import RewardInput, Score
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
