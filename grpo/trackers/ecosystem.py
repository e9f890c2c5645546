"""The ecosystem's trackers through accelerate.tracking: tensorboard, wandb, mlflow and others, each by its package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grpo.config import RunConfig, TrackerConfig
from grpo.errors import ConfigError
from grpo.trackers.base import Tracker

FOLDER = "trackers"
"""In the run directory: what trackers that write files write."""


def check_trackers(trackers: Sequence[TrackerConfig]) -> None:
    """Raises ConfigError: a tracker's package is not installed, or one is named twice."""
    for tracker in trackers:
        if find_spec(tracker.type) is None:
            package = tracker.type.replace("_", "-")
            raise ConfigError(
                f"trackers: {tracker.type} is not installed. Install it with: pip install {package}, or leave it out."
            )
    types = [tracker.type for tracker in trackers]
    if len(set(types)) < len(types):
        raise ConfigError(f"trackers: {types} names one twice. Name each once.")


def open_trackers(config: RunConfig, *, done: int) -> list[Tracker]:
    """Those that the recipe names; nothing is started yet.

    Args:
        done: steps that the run has done. What a tracker shows of later ones, a killed run's, is shown again.
    """
    return [EcosystemTracker(tracker, config, done=done) for tracker in config.trackers]


class EcosystemTracker:
    """One of accelerate's trackers. Owns it from `start` to `finish`."""

    def __init__(self, tracker: TrackerConfig, config: RunConfig, *, done: int) -> None:
        self.name: str = tracker.type
        self._config, self._run = tracker, config
        self._done = done
        self._tracker: Any = None

    def start(self) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # imports every tracker's package that is installed

        make = LOGGER_TYPE_TO_CLASS[self.name]
        folder = self._run.output_dir / FOLDER / self.name
        arguments: dict[str, Any] = {"logging_dir": str(folder)} if make.requires_logging_directory else {}
        if make.requires_logging_directory:
            folder.mkdir(parents=True, exist_ok=True)
        arguments.update(self._naming())
        self._tracker = make(self._first_argument(), **{**arguments, **self._config.params})
        self._tracker.start()
        self._tracker.store_init_configuration(flat(self._run.model_dump(mode="json")))

    def log(self, figures: Mapping[str, float], *, step: int) -> None:
        self._tracker.log(dict(figures), step=step)

    def finish(self) -> None:
        self._tracker.finish()

    @property
    def _run_name(self) -> str:
        return self._config.run_name or Path(self._run.output_dir).name

    def _first_argument(self) -> str:
        """accelerate calls it run_name; for most it is the project."""
        return self._run_name if self.name in {"tensorboard", "aim"} else self._config.project

    def _naming(self) -> dict[str, Any]:
        """Arguments that name the run, as each tracker calls them; and what is replaced when a run is resumed."""
        match self.name:
            case "tensorboard":
                # hides what a killed run showed of steps that are now run again
                return {"purge_step": self._done + 1} if self._done else {}
            case "wandb" | "trackio":
                return {"name": self._run_name}
            case "mlflow":
                return {"run_name": self._run_name}
            case "swanlab":
                return {"experiment_name": self._run_name}
            case "clearml":
                return {"task_name": self._run_name}
            case _:
                return {}


def flat(value: Any, name: str = "") -> dict[str, bool | int | float | str]:
    """A recipe as dotted names and plain values, which is what trackers take."""
    if isinstance(value, Mapping) and value:
        inner = {f"{name}.{key}" if name else str(key): each for key, each in value.items()}
        return {key: plain for path, each in inner.items() for key, plain in flat(each, path).items()}
    return {name: value if isinstance(value, bool | int | float | str) else str(value)}
