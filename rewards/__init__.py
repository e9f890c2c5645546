"""Score texts for one objective, by rule or by judge. Knows no RL and no torch."""

from rewards.base import (
    AnyReward,
    PlainReward,
    Reward,
    RewardContext,
    check_reward_ready,
    close_reward,
    score_group,
)
from rewards.config import RewardSpec
from rewards.errors import RewardConfigError, RewardError, RewardUnavailable
from rewards.registry import build_reward, reward_names
from rewards.types import RewardInput, Score

__all__ = [
    "AnyReward",
    "PlainReward",
    "Reward",
    "RewardConfigError",
    "RewardContext",
    "RewardError",
    "RewardInput",
    "RewardSpec",
    "RewardUnavailable",
    "Score",
    "build_reward",
    "check_reward_ready",
    "close_reward",
    "reward_names",
    "score_group",
]
