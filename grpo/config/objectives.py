"""What the model is to be good at: rewards, weights, and one KL controller each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from grpo.config.base import StrictModel
from rewards.config import RewardSpec

ObservedKl = Literal["k3", "penalty"]


class FixedBetaConfig(StrictModel):
    """A constant weight of the KL penalty."""

    type: Literal["fixed"]
    value: float = Field(default=0.02, ge=0)

    @property
    def observed(self) -> ObservedKl:
        """Which KL is looked at; a fixed beta only checks that it is finite."""
        return "k3"


class _AdaptiveBetaConfig(StrictModel):
    """What every adaptive beta has."""

    initial: float = Field(default=0.02, gt=0)
    minimum: float = Field(default=1e-4, gt=0)
    maximum: float = Field(default=10.0, gt=0)
    observe: ObservedKl = "k3"
    """What the KL is: the k3 estimate, or the mean of the penalty that the loss uses."""
    alarm_after: int = Field(default=20, ge=1)
    """Windows in a row (update.iterations of them a step) with beta at its maximum and the KL still too high, after
    which a warning says so."""

    @property
    def observed(self) -> ObservedKl:
        """Which KL is looked at."""
        return self.observe

    @model_validator(mode="after")
    def _starts_inside(self) -> _AdaptiveBetaConfig:
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(f"initial = {self.initial} lies outside [{self.minimum}, {self.maximum}]")
        return self


class BandBetaConfig(_AdaptiveBetaConfig):
    """Beta that holds the objective's KL inside [low, high], in nats per token."""

    type: Literal["band"] = "band"
    low: float = Field(ge=0)
    high: float = Field(gt=0)
    rate: float = Field(default=0.1, gt=0, lt=1)
    """Beta changes by this share per window while the KL is outside."""

    @model_validator(mode="after")
    def _has_room(self) -> BandBetaConfig:
        if self.low >= self.high:
            raise ValueError(f"the KL band has low = {self.low} >= high = {self.high}; set low < high")
        return self


class ProportionalBetaConfig(_AdaptiveBetaConfig):
    """Beta moves in proportion to the relative error, at most a fifth of it, slowly (Ziegler et al. 2019)."""

    type: Literal["proportional"]
    target: float = Field(gt=0)
    """KL to hold, in nats per token."""
    horizon: float = Field(default=10_000, gt=0)
    """Rows over which beta may change by its own size; the rows of a window over it are the window's share."""


class DualBetaConfig(_AdaptiveBetaConfig):
    """Log beta integrates the relative error: the dual ascent of "KL <= target"."""

    type: Literal["dual"]
    target: float = Field(gt=0)
    """KL to hold, in nats per token."""
    rate: float = Field(default=0.1, gt=0)
    """Log beta changes by this much per window at twice the target."""


BetaConfig = Annotated[
    FixedBetaConfig | BandBetaConfig | ProportionalBetaConfig | DualBetaConfig, Field(discriminator="type")
]


class ObjectiveConfig(StrictModel):
    """One thing to be good at: its rewards, its weight among the objectives, its own KL controller."""

    weight: float = Field(default=1.0, ge=0)
    rewards: tuple[RewardSpec, ...] = Field(min_length=1)
    """What the objective's score is made of; where one is missing, so is the score, unless its `missing` says
    otherwise."""
    combine: Literal["sum", "product"] = "sum"
    """sum: weight * value; product: value ** weight, for values >= 0: one 0 makes the score 0."""
    min_valid_fraction: float | None = Field(default=None, ge=0, le=1)
    """Share of its completions that must have a verdict in a step; scoring.min_valid_fraction where None."""
    eval_rewards: tuple[RewardSpec, ...] | None = None
    """What evaluation measures; the same rewards where None. Leave shaping terms and judges out here."""
    beta: BetaConfig

    @model_validator(mode="after")
    def _rewards_can_score(self) -> ObjectiveConfig:
        for specs in (self.rewards, self.eval_rewards or self.rewards):
            names = [spec.name for spec in specs]
            if len(set(names)) < len(names):
                raise ValueError(f"a reward is named twice in {names}; name each once and change its weight")
            if all(spec.weight == 0 for spec in specs):
                raise ValueError(f"all rewards {names} have weight 0, so every score would be 0; set one above 0")
            if self.combine == "product" and any(spec.weight < 0 for spec in specs):
                raise ValueError(f"a product of {names} has a weight below 0, which would divide by a reward that is 0")
        return self
