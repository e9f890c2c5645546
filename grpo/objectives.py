"""A recipe's objectives -> rewards ready to score, and controllers ready to observe. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from grpo.config import BandBetaConfig, ObjectiveConfig
from grpo.errors import ConfigError
from rewards.base import AnyReward, RewardContext
from rewards.config import RewardSpec
from rewards.errors import RewardConfigError
from rewards.registry import build_reward


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedReward:
    """One term of an objective's score."""

    name: str
    weight: float
    reward: AnyReward


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One thing to be good at, with the rewards that measure it."""

    name: str
    rewards: tuple[WeightedReward, ...]


def build_objectives(
    configs: Mapping[str, ObjectiveConfig], context: RewardContext, *, for_evaluation: bool = False
) -> tuple[Objective, ...]:
    """Build every objective's rewards, in the recipe's order.

    Args:
        for_evaluation: take `eval_rewards` where an objective has them.
    Raises:
        ConfigError: a reward is unknown, or its parameters are wrong.
    """
    objectives: list[Objective] = []
    for name, config in configs.items():
        specs = (config.eval_rewards if for_evaluation else None) or config.rewards
        rewards = tuple(_build(spec, context, objective=name) for spec in specs)
        objectives.append(Objective(name=name, rewards=rewards))
    return tuple(objectives)


def _build(spec: RewardSpec, context: RewardContext, *, objective: str) -> WeightedReward:
    try:
        reward = build_reward(spec, context)
    except RewardConfigError as exc:
        raise ConfigError(f"objectives.{objective}: {exc}") from exc
    return WeightedReward(name=spec.name, weight=spec.weight, reward=reward)


def weighted_sum(terms: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """Sum of weight * value; None where a term that counts is missing: a missing verdict is never a number."""
    counted = [(weights[name], value) for name, value in terms.items() if weights[name] != 0]
    if any(value is None for _, value in counted):
        return None
    return math.fsum(weight * value for weight, value in counted if value is not None)


def check_objectives_of_prompts(
    asked: Iterable[tuple[str, ...]], configs: Mapping[str, ObjectiveConfig], *, source: str
) -> None:
    """Refuse prompts that name an unknown objective, and shared rows whose KL bands contradict each other.

    Objectives that score the same rows see the same KL: bands without a common point would pull beta apart for ever.

    Raises:
        ConfigError: see above.
    """
    for names in set(asked):
        unknown = [name for name in names if name not in configs]
        if unknown or not names:
            raise ConfigError(
                f"{source} asks for objectives {list(names)}, but the recipe has {list(configs)}. "
                "Add the objective to the recipe, or change the prompts."
            )
        bands = {name: beta for name in names if isinstance(beta := configs[name].beta, BandBetaConfig)}
        if len(bands) >= 2:
            _check_bands_meet(bands, source=source)


def _check_bands_meet(bands: Mapping[str, BandBetaConfig], *, source: str) -> None:
    observed = {beta.observe for beta in bands.values()}
    meet = max(beta.low for beta in bands.values()) <= min(beta.high for beta in bands.values())
    if len(observed) > 1 or not meet:
        ranges = ", ".join(f"{name} [{b.low}, {b.high}] of {b.observe}" for name, b in bands.items())
        raise ConfigError(
            f"{source} has prompts that several objectives score, so they see one KL, but their bands do not meet: "
            f"{ranges}. Give them intersecting bands of the same quantity, or score each prompt for one objective."
        )
