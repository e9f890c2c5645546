"""Small makers of records and parts for tests of the update, the engine and the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from grpo.batching import TrainBatch, build_batch
from grpo.config import FullTrainable, LoraTrainable, OptimConfig, TrainableConfig, UpdateConfig
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import SamplingParams
from grpo.runtime.models import load_model
from grpo.runtime.policy import Policy
from grpo.types import Completion, Message, Prompt, RolloutGroup, ScoredGroup, Verdict
from grpo.update.beta import FixedBeta
from grpo.update.entropy import EntropyBonus
from grpo.update.step import Updater

END = 2
"""End token of the tiny model."""


def make_prompt(name: str = "p0", *, objectives: tuple[str, ...] = ("a",), text: str = "Who?") -> Prompt:
    """A prompt of one user message."""
    return Prompt(id=name, messages=(Message(role="user", content=text),), objectives=objectives)


def make_group(
    scores: Sequence[dict[str, float | None]],
    *,
    prompt: Prompt | None = None,
    lengths: Sequence[int] | None = None,
    prompt_length: int = 5,
    seed: int = 0,
) -> ScoredGroup:
    """A group with random tokens: one completion per entry of `scores`, which are objective -> value."""
    generator = torch.Generator().manual_seed(seed)
    prompt = prompt or make_prompt(f"p{seed}", objectives=tuple(scores[0]))
    lengths = lengths or [3 + k for k in range(len(scores))]

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 200, (count,), generator=generator).tolist())

    completions = tuple(
        Completion(
            token_ids=(*tokens(length - 1), END),
            text="",
            sampler_logprobs=(-1.0,) * length,
            finish_reason="stop",
        )
        for length in lengths
    )
    rollout = RolloutGroup(prompt=prompt, prompt_token_ids=tokens(prompt_length), completions=completions)
    verdicts = tuple({name: Verdict(value=value, parts={}) for name, value in row.items()} for row in scores)
    return ScoredGroup(rollout=rollout, verdicts=verdicts)


def make_policy(
    model_dir: Path, *, trainable: TrainableConfig | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Policy:
    """The tiny model with an adapter on all linear layers."""
    model = load_model(str(model_dir), dtype=dtype, base_dir=model_dir)
    return Policy(model, trainable or LoraTrainable(rank=4, alpha=8), seed=seed)


def make_updater(
    policy: Policy,
    *,
    beta: float = 0.02,
    objectives: Sequence[str] = ("a",),
    params: SamplingParams | None = None,
    update: UpdateConfig | None = None,
    learning_rate: float = 1e-2,
    schedule: Literal["constant", "linear"] = "constant",
    max_grad_norm: float = 1.0,
    entropy_bonus: EntropyBonus | None = None,
) -> Updater:
    """An updater with fixed betas."""
    return Updater(
        policy,
        {name: FixedBeta(value=beta) for name in objectives},
        observed=dict.fromkeys(objectives, "k3"),
        params=params or SamplingParams(end_token_ids=(END,), max_new_tokens=16),
        update=update or UpdateConfig(),
        optim=OptimConfig(learning_rate=learning_rate, schedule=schedule, max_grad_norm=max_grad_norm),
        entropy_bonus=entropy_bonus,
    )


def make_batch(
    groups: Sequence[ScoredGroup], *, weights: Mapping[str, float] | None = None, budget: int = 8192, **options: Any
) -> TrainBatch:
    """A window under the defaults; `options` are those of `build_batch`."""
    names = dict.fromkeys((name for group in groups for name in group.rollout.prompt.objectives), 1.0)
    arguments = {"combine": "decoupled", "scale": "group", "max_new_tokens": 16, **options}
    return build_batch(groups, weights or names, micro_batch_tokens=budget, **arguments)


def full_training() -> FullTrainable:
    """Every parameter learns."""
    return FullTrainable(type="full")


def encoded(count: int, *, seed: int = 0) -> list[EncodedPrompt]:
    """Prompts of random tokens and different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        EncodedPrompt(
            prompt=make_prompt(f"p{number}"),
            token_ids=tuple(torch.randint(3, 200, (4 + 2 * number,), generator=generator).tolist()),
        )
        for number in range(count)
    ]
