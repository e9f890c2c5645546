"""A recipe's objectives -> rewards ready to score, and controllers ready to observe. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from grpo.config import BandBetaConfig, BetaConfig, FixedBetaConfig, ObjectiveConfig
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
    missing: Literal["void", "reweigh"] = "void"
    """What a missing value of it does; see `rewards.config.RewardSpec.missing`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One thing to be good at, with the rewards that measure it."""

    name: str
    rewards: tuple[WeightedReward, ...]
    combine: Literal["sum", "product"] = "sum"

    def score(self, values: Mapping[str, float | None]) -> float | None:
        """Its rewards' values, by name, in one number; None where it has no verdict. A reward of weight 0 says nothing.

        A product of rewards has none where a value is below 0: its root would be no number.
        """
        counted = [(reward, values[reward.name]) for reward in self.rewards if reward.weight != 0]
        there = [(reward.weight, value) for reward, value in counted if value is not None]
        if any(value is None and reward.missing == "void" for reward, value in counted) or not there:
            return None
        whole, left = (
            math.fsum(abs(weight) for weight in weights)
            for weights in ([reward.weight for reward, _ in counted], [weight for weight, _ in there])
        )
        share = 1.0 if len(there) == len(counted) else whole / left
        if self.combine == "sum":
            return math.fsum(share * weight * value for weight, value in there)
        if any(value < 0 for _, value in there):
            return None
        return math.prod(value ** (share * weight) for weight, value in there)


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
        objectives.append(Objective(name=name, rewards=rewards, combine=config.combine))
    return tuple(objectives)


def _build(spec: RewardSpec, context: RewardContext, *, objective: str) -> WeightedReward:
    try:
        reward = build_reward(spec, context)
    except RewardConfigError as exc:
        raise ConfigError(f"objectives.{objective}: {exc}") from exc
    return WeightedReward(name=spec.name, weight=spec.weight, reward=reward, missing=spec.missing)


def check_objectives_of_prompts(
    asked: Iterable[tuple[str, ...]], configs: Mapping[str, ObjectiveConfig], *, source: str
) -> None:
    """Refuse prompts that name an unknown objective, and shared rows whose controllers contradict each other.

    Objectives that score the same rows see the same KL: without a value that all of them rest at, one beta would go
    to its minimum and another to its maximum. A fixed beta holds nothing, so it contradicts none.

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
        _check_held_kl_meets({name: configs[name].beta for name in names}, source=source)


def held_kl(beta: BetaConfig) -> tuple[float, float] | None:
    """(low, high) in nats per token that a controller holds the observed KL in: a band, or a target twice.

    None for a fixed beta, which holds nothing.
    """
    if isinstance(beta, FixedBetaConfig):
        return None
    return (beta.low, beta.high) if isinstance(beta, BandBetaConfig) else (beta.target, beta.target)


def _check_held_kl_meets(betas: Mapping[str, BetaConfig], *, source: str) -> None:
    held = {name: (beta, *kl) for name, beta in betas.items() if (kl := held_kl(beta)) is not None}
    if len(held) < 2:
        return
    observed = {beta.observed for beta, _, _ in held.values()}
    if len(observed) == 1 and max(low for _, low, _ in held.values()) <= min(high for _, _, high in held.values()):
        return
    targets = [name for name, (_, low, high) in held.items() if low == high]
    kinds = "bands" if not targets else "targets" if len(targets) == len(held) else "bands and targets"
    listed = ", ".join(
        f"{name} {low if low == high else [low, high]} of {beta.observed}" for name, (beta, low, high) in held.items()
    )
    raise ConfigError(
        f"{source} has prompts that several objectives score, so they see one KL, but their {kinds} do not meet: "
        f"{listed}. Give them bands that intersect, targets that are equal or lie inside the bands, all of the same "
        "quantity (beta.observe); or fixed betas; or score each prompt for one objective."
    )
