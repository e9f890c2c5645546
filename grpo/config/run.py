"""A whole recipe, and the parts of it that are not prompts, objectives or the update."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from grpo.config.base import StrictModel
from grpo.config.objectives import ObjectiveConfig
from grpo.config.prompts import PromptsConfig
from grpo.config.rollout import RolloutConfig
from grpo.config.trackers import TrackerConfig
from grpo.config.trainable import LoraTrainable, TrainableConfig
from grpo.config.update import OptimConfig, UpdateConfig


class ScoringConfig(StrictModel):
    """When missing verdicts are too many to train on, and what happens then. Leftovers are never trained on."""

    min_valid_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of an objective's completions that must have a verdict in a step; an objective's own goes before it."""
    below: Literal["stop", "wait", "skip"] = "stop"
    """stop: at once, with a checkpoint. wait: ask again for what is missing, wait_rounds times, then stop. skip: leave
    the step without an update, and stop after max_skipped in a row."""
    wait_s: float = Field(default=60.0, ge=0)
    """Before each round of asking again: as long as a judge's circuit breaker may take to close."""
    wait_rounds: int = Field(default=10, ge=1)
    max_skipped: int = Field(default=3, ge=1)
    """Steps in a row that may go without an update."""
    replay: Path | None = None
    """An earlier run's judge_audit.jsonl, which answers instead of the judges; relative to the recipe's folder. What it
    does not hold has no verdict, and no judge is asked."""


class WarmupConfig(StrictModel):
    """Supervised training before the first step, on the same trainable parameters (TRL's SFTTrainer).

    Where it ends is the reference of the KL."""

    path: Path
    """JSON-lines or JSON file with a prompt and its completion in each row; relative to the recipe's folder."""
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    steps: int = Field(ge=1)
    batch_size: int = Field(default=8, ge=1)
    """Rows per optimizer step."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Rows that go through the model together on a rank; divides batch_size. All of the rank's where None."""
    learning_rate: float = Field(gt=0)
    max_tokens: int = Field(default=1024, ge=2)
    """Longer rows are cut."""

    @model_validator(mode="after")
    def _divides(self) -> WarmupConfig:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size = {self.micro_batch_size} does not divide {self.batch_size}")
        return self


class EvalConfig(StrictModel):
    """Greedy answers to held-out prompts, scored by the objectives' eval_rewards."""

    before: bool = True
    after: bool = True
    every: int | None = Field(default=None, ge=1)
    """Steps between evaluations during the run, whose means go into that step's line of metrics.jsonl, and into the
    watch for a score that does not move (`grpo.alarms`). None where None. The last step's is the one after training."""
    num_prompts: int = Field(default=64, ge=2)
    """Held-out prompts per objective."""

    @property
    def is_on(self) -> bool:
        """Whether a run evaluates at all."""
        return self.before or self.after or self.every is not None

    def is_due(self, step: int) -> bool:
        """Whether there is one after this step, counted from 1."""
        return self.every is not None and step % self.every == 0

    def count(self, steps: int) -> int:
        """Evaluations of a whole run of so many steps."""
        during = 0 if self.every is None else steps // self.every
        return self.before + during + (self.after and not self.is_due(steps))


class CheckpointConfig(StrictModel):
    """When the run is saved. It is also saved at its end and when it is interrupted."""

    every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; 10 where every_epochs is not given either."""
    every_epochs: int | None = Field(default=None, ge=1)
    """Instead of `every`: epochs between checkpoints, for prompts from a file or the hub. One is saved after the step
    that takes an epoch's last prompt."""
    keep: int = Field(default=2, ge=1)
    """The newest so many stay."""

    @model_validator(mode="before")
    @classmethod
    def _steps_unless_epochs(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("every") is None and values.get("every_epochs") is None:
            return {**values, "every": 10}
        return values

    @model_validator(mode="after")
    def _one_measure(self) -> CheckpointConfig:
        if self.every is not None and self.every_epochs is not None:
            raise ValueError(
                f"every = {self.every} counts steps and every_epochs = {self.every_epochs} epochs; give one of them, "
                "and null for the other"
            )
        return self

    def is_due(self, step: int, *, per_step: int, epoch_prompts: int | None) -> bool:
        """Whether there is one after this step, counted from 1.

        Args:
            per_step: prompts of a step.
            epoch_prompts: of an epoch; None where the prompts have no end.
        """
        if self.every is not None:
            return step % self.every == 0
        assert self.every_epochs is not None, "else every has its default"
        assert epoch_prompts is not None, "refused where the recipe is read"
        stretch = self.every_epochs * epoch_prompts
        return step * per_step // stretch > (step - 1) * per_step // stretch


class RunConfig(StrictModel):
    """A whole recipe."""

    model: str = Field(min_length=1)
    """A hub name, a folder, or package:<import name> for a model that an installed package carries."""
    seed: int = Field(default=0, ge=0)
    steps: int = Field(ge=1)
    output_dir: Path
    """The run directory; must not exist yet, or use --resume. Relative to the recipe's folder."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the frozen weights and the matrix products; auto is bfloat16 where that is the faster one: on cards
    from Ampere on, on CPUs with AMX."""
    quantization: Literal["none", "nf4"] = "none"
    """Of the frozen linear layers: in 4 bits and multiplied in `dtype` (QLoRA, arXiv:2305.14314; bitsandbytes, the
    extra `qlora`). For adapters only. The engine's copy has the same numbers written out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    determinism: Literal["default", "strict"] = "default"
    """strict: torch's deterministic algorithms only, and an error where an operation has none. A run on a CPU repeats
    itself bit for bit without it; on a card it does not, and pays for it with time (on a CPU an update takes 1.0 to 1.2
    times as long: `benchmarks/determinism_cost.py`)."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """auto is flash-attn on CUDA where it is installed and the card has compute capability 8.0, else torch's SDPA."""
    prompts: PromptsConfig
    objectives: dict[str, ObjectiveConfig] = Field(min_length=1)
    rollout: RolloutConfig = RolloutConfig()
    scoring: ScoringConfig = ScoringConfig()
    update: UpdateConfig = UpdateConfig()
    optim: OptimConfig
    warmup: WarmupConfig | None = None
    """A supervised stage before the first step; none where None."""
    trainable: TrainableConfig = LoraTrainable()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trackers: tuple[TrackerConfig, ...] = ()
    """Where the figures of metrics.jsonl are shown besides."""
    alarms: Literal["warn", "stop"] = "warn"
    """What follows where the run's own figures are alarming (`grpo.alarms`): a KL or gradient of exactly 0, one-token
    or truncated completions, no difference within any group of an objective, missing verdicts, an engine that
    disagrees: stop ends the run with a checkpoint. A learning rate for another kind of training: before the first step.
    An evaluation that did not move: after it, with everything saved."""
    base_dir: Path
    """Folder of the recipe, against which relative paths are resolved. Set by the loader."""

    @model_validator(mode="after")
    def _quantized_weights_are_frozen(self) -> RunConfig:
        if self.quantization != "none" and self.trainable.type != "lora":
            raise ValueError(
                f"quantization = {self.quantization} packs weights that do not learn, and trainable.type is "
                f"{self.trainable.type}; set trainable.type = lora, or quantization = none"
            )
        return self

    @model_validator(mode="after")
    def _epochs_end(self) -> RunConfig:
        if self.checkpoint.every_epochs is not None and self.prompts.type == "tasks":
            raise ValueError(
                f"checkpoint.every_epochs = {self.checkpoint.every_epochs}, but the scenes of prompts.type = tasks are "
                "made without end and have no epochs; set checkpoint.every, in steps"
            )
        return self

    @model_validator(mode="after")
    def _objectives_fit(self) -> RunConfig:
        if all(objective.weight == 0 for objective in self.objectives.values()):
            raise ValueError("objectives: all weights are 0, so nothing would be learned; set one above 0")
        for name in self.objectives:
            if not name.isidentifier():
                raise ValueError(f"objectives: {name!r} is no plain name; use letters, digits and underscores")
        return self
