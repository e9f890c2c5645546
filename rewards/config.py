"""How a recipe names a reward. Knows YAML-shaped values; knows nothing of what a reward does."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class StrictModel(BaseModel):
    """Base of parameter records: unknown keys are errors, values are not coerced, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RewardSpec(StrictModel):
    """One reward of an objective, as a recipe writes it."""

    name: str = Field(min_length=1)
    """A built-in's name, an entry point of group `grpo.rewards`, or `package.module:name`."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """Factor in the objective's weighted sum, exponent in its product. 0 logs the reward without training on it; a
    penalty may be negative."""
    missing: Literal["void", "reweigh"] = "void"
    """What a missing verdict of this reward does. void: the objective has none either. reweigh: the other rewards
    carry its weight, in proportion to theirs."""
    params: dict[str, Any] = Field(default_factory=dict)
    """The reward's own parameters, checked when it is built."""
