"""Everything the toolkit raises on purpose, sorted by who can act.

GrpoError
├── InputError          the user: exit code 2, nothing written
│   ├── ConfigError     a recipe key or value
│   ├── DatasetError    the prompts
│   ├── ModelError      the model's name, folder or package
│   └── CheckpointError a checkpoint is damaged or belongs to another recipe
└── RunStopped          the run cannot go on and must not guess: exit code 1
    ├── NonFiniteUpdate     loss or gradient is NaN or infinite
    ├── OutOfMemory         the smallest micro-batch does not fit
    ├── TooFewVerdicts      too many completions went unscored
    ├── EngineError         the rollout engine does not do what it was told
    ├── TooAlarming         the run's own figures say that nothing good comes of it
    ├── StorageError        the run directory cannot be written or read
    └── RankLost            another process of the run is gone
"""

from __future__ import annotations


class GrpoError(Exception):
    """Base of every error raised on purpose."""


class InputError(GrpoError):
    """What the user gave cannot be used. The message says what was wrong, what was expected and what to do."""


class ConfigError(InputError):
    """A recipe key or value is wrong."""


class DatasetError(InputError):
    """The prompts cannot be read or used."""


class ModelError(InputError):
    """The model cannot be found or loaded."""


class CheckpointError(InputError):
    """A checkpoint is damaged, missing, or belongs to another recipe."""


class RunStopped(GrpoError):
    """The run cannot go on, and going on would be a guess."""


class NonFiniteUpdate(RunStopped):
    """The loss or a gradient is NaN or infinite; no optimizer step was taken on it."""


class OutOfMemory(RunStopped):
    """An update does not fit into memory in micro-batches of any size, or the sampling of a single group does not; no
    optimizer step was taken."""


class TooFewVerdicts(RunStopped):
    """More completions of an objective went unscored than the recipe allows."""


class TooAlarming(RunStopped):
    """An alarm was raised in a run with `alarms: stop`."""


class EngineError(RunStopped):
    """The rollout engine failed, or samples from other weights than the policy's."""


class StorageError(RunStopped):
    """The disk refuses what must be kept, such as when it is full. The message names the path and what was needed."""


class RankLost(RunStopped):
    """Another process of the run has died, or cannot be reached: this one cannot go on alone."""
