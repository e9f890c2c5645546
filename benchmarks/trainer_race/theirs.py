"""A run of TRL's `GRPOTrainer` that stops for a signal before every step."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from trainer_race.pacing import Pace
from trainer_race.task import ALPHA, BETA, LEARNING_RATE, MODEL, RANK, Case, StepFigures, digit_share
from transformers import TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from grpo.runtime.devices import choose_device, choose_dtype
from grpo.runtime.models import load_model, load_tokenizer


class Timed(GRPOTrainer):
    """TRL's trainer, watched: how long it samples and scores, and what."""

    rollout_s = scoring_s = reward = 0.0
    tokens = 0

    def _generate(self, prompts: list[Any]) -> Any:
        start = time.perf_counter()
        made = super()._generate(prompts)
        self.rollout_s += time.perf_counter() - start
        self.tokens += sum(len(ids) for ids in made[1])
        return made

    def _calculate_rewards(self, *arguments: Any) -> Tensor:
        start = time.perf_counter()
        rewards = super()._calculate_rewards(*arguments)
        self.scoring_s += time.perf_counter() - start
        self.reward = float(rewards.mean())
        return rewards


class Paced(TrainerCallback):
    """Waits for the signal before a step, and tells what it took."""

    def __init__(self, pace: Pace) -> None:
        self._pace, self._start = pace, 0.0
        self.trainer: Timed | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Of an optimizer step; sampling comes after it."""
        assert self.trainer is not None
        self._pace.wait()
        self.trainer.rollout_s = self.trainer.scoring_s = 0.0
        self.trainer.tokens = 0
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After the optimizer's step."""
        assert self.trainer is not None
        self._pace.done(
            StepFigures(
                step_s=time.perf_counter() - self._start,
                rollout_s=self.trainer.rollout_s,
                scoring_s=self.trainer.scoring_s,
                tokens=self.trainer.tokens,
                reward=self.trainer.reward,
            )
        )


def train(case: Case, prompts: Sequence[str], pace: Pace, *, checkpoints: bool = False) -> None:
    """case.steps steps; a micro-batch is one group of 8, which is its default."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    dtype = choose_dtype("auto", choose_device("auto"))
    arguments = GRPOConfig(
        output_dir=tempfile.gettempdir(),  # TRL wants a folder; nothing is written there
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=checkpoints,
        per_device_train_batch_size=case.group_size,
        gradient_accumulation_steps=case.prompts,
        num_generations=case.group_size,
        max_completion_length=case.new_tokens,
        temperature=1.0,
        beta=BETA,
        loss_type="dapo",
        use_bias_correction_kl=True,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=case.steps,
        shuffle_dataset=False,
        logging_steps=10_000,
        adam_beta2=0.999,
    )
    paced = Paced(pace)
    trainer = Timed(
        model=load_model(MODEL, dtype=dtype, base_dir=Path()),
        reward_funcs=digit_share,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in prompts]}),
        processing_class=load_tokenizer(MODEL, base_dir=Path()),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[paced],
    )
    paced.trainer = trainer
    trainer.train()
