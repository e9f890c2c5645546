"""TRL's own way from reward functions to advantages, without a model: what its trainer does between the two."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

RewardFunction = Callable[..., list[float | None]]


class GivenCompletions:
    """Has what `GRPOTrainer._generate_and_score_completions` and `_calculate_rewards` read of a trainer; its
    completions are there already. The methods are TRL's."""

    def __init__(
        self, completions: Sequence[str], functions: Sequence[RewardFunction], *, group_size: int, aggregation: str
    ) -> None:
        self._completions = list(completions)
        self.reward_funcs = list(functions)
        self.reward_func_names = [f"o{number}" for number in range(len(functions))]
        self.reward_processing_classes = [None] * len(functions)
        self.reward_weights = torch.ones(len(functions))
        self.num_generations = group_size
        self.multi_objective_aggregation, self.scale_rewards = aggregation, "group"
        self.args = SimpleNamespace(
            per_device_train_batch_size=1,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
            report_to=[],
        )
        self.state = SimpleNamespace(global_step=0)
        self.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
        self.accelerator = SimpleNamespace(
            device=torch.device("cpu"), process_index=0, is_main_process=True, gather=lambda values: values
        )
        self.num_iterations, self.beta, self.use_vllm = 1, 0.0, False
        self.environment_factories = self.environments = self.tools = self.pad_to_multiple_of = None
        self.mask_truncated_completions = self.log_multimodal = False
        self._tokenizer = SimpleNamespace(pad_token_id=0)
        self._metrics = {"train": defaultdict(list)}
        self._logs: dict[str, Any] = {"prompt": [], "completion": [], "advantages": []}
        self._logs |= {"rewards": defaultdict(list), "extra": defaultdict(list)}
        self._pending_extra_logs, self._pending_metrics = defaultdict(list), defaultdict(list)
        self._log_completion_extra = self._log_metric = lambda *_: None

    def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
        ids = [[1]] * len(prompts)
        return ids, ids, None, self._completions, None, {}, None, None

    def _calculate_rewards(self, *arguments: Any) -> Tensor:
        return GRPOTrainer._calculate_rewards(self, *arguments)  # pyright: ignore[reportArgumentType]


def trl_advantages(
    completions: Sequence[str], functions: Sequence[RewardFunction], *, group_size: int, aggregation: str
) -> Tensor:
    """[P, K] TRL's advantages of P * K completions, scored by its reward functions, each of weight 1."""
    PartialState()  # TRL's logger wants it
    trainer = GivenCompletions(completions, functions, group_size=group_size, aggregation=aggregation)
    inputs = [{"prompt": f"prompt {row // group_size}"} for row in range(len(completions))]
    output = GRPOTrainer._generate_and_score_completions(trainer, inputs)  # pyright: ignore[reportArgumentType]
    return output["advantages"].view(-1, group_size)
