"""Where a run's figures are shown besides metrics.jsonl."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import Field, model_validator

from grpo.config.base import StrictModel

TrackerType: TypeAlias = Literal[
    "tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"
]
"""What accelerate.tracking speaks to; each needs its own package."""


class TrackerConfig(StrictModel):
    """One tracker; its name alone is the same with the defaults: `trackers: [tensorboard]`.

    A tracker that is down, slow or out of disk space costs its own figures, never the run's."""

    type: TrackerType
    project: str = Field(default="grpo", min_length=1)
    """What the tracker groups runs by: a project, or mlflow's experiment. tensorboard and aim have none."""
    run_name: str | None = Field(default=None, min_length=1)
    """The run directory's name where None."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the tracker's own start, such as wandb's entity or mode; they go before ours."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value
