"""A recipe: what every key means, its bounds, and why its default. Imports no torch.

Unknown keys are errors, choices are tagged unions on `type`, and the resolved form is written beside the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rewards.config import RewardSpec


class StrictModel(BaseModel):
    """A part of a recipe: unknown keys refused, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        for name, field in cls.model_fields.items() if isinstance(values, Mapping) else ():
            if field.annotation in (int, float) and isinstance(values.get(name), bool):  # pydantic would read 1
                raise ValueError(f"{name} is {values[name]}; expected a number")
        return values


class TaskPrompts(StrictModel):
    """Generated scenes with known answers, unlimited; held-out scenes share no name, attribute or template."""

    type: Literal["tasks"]
    names: tuple[str, ...] = Field(min_length=1)
    """Tasks in turn: prompt n comes from task n modulo their number."""
    per_step: int = Field(default=8, ge=1)
    """P: prompts per optimizer step."""


class FilePrompts(StrictModel):
    """A JSON-lines or JSON file with one prompt a row."""

    type: Literal["file"]
    path: Path
    """Relative to the recipe's folder."""
    held_out_path: Path | None = None
    """Prompts for evaluation, same columns; needed where eval.before or eval.after is on."""
    prompt_column: str = "prompt"
    """Text of the user's message, or a list of {"role", "content"} messages."""
    reference_column: str = "reference"
    """Right answer; may be absent from the file."""
    objectives: tuple[str, ...] | None = None
    """Objectives that score every row; where None, the row's own column `objectives`, else all of them."""
    per_step: int = Field(default=8, ge=1)


class HubPrompts(StrictModel):
    """A dataset on the hub, by name, read through `datasets`."""

    type: Literal["hub"]
    name: str
    subset: str | None = None
    split: str = "train"
    held_out_split: str | None = None
    """Split for evaluation; needed where eval.before or eval.after is on."""
    prompt_column: str = "prompt"
    reference_column: str = "reference"
    objectives: tuple[str, ...] | None = None
    per_step: int = Field(default=8, ge=1)


PromptsConfig = Annotated[TaskPrompts | FilePrompts | HubPrompts, Field(discriminator="type")]


class FixedBetaConfig(StrictModel):
    """A constant weight of the KL penalty."""

    type: Literal["fixed"]
    value: float = Field(default=0.02, ge=0)

    @property
    def observed(self) -> str:
        """Which KL is looked at; a fixed beta only checks that it is finite."""
        return "k3"


class BandBetaConfig(StrictModel):
    """Beta that holds the objective's KL inside [low, high], in nats per token."""

    type: Literal["band"] = "band"
    initial: float = Field(default=0.02, gt=0)
    low: float = Field(ge=0)
    high: float = Field(gt=0)
    rate: float = Field(default=0.1, gt=0, lt=1)
    """Beta changes by this share per step while the KL is outside."""
    minimum: float = Field(default=1e-4, gt=0)
    maximum: float = Field(default=10.0, gt=0)
    observe: Literal["k3", "penalty"] = "k3"
    """What the band is about: the k3 estimate, or the mean of the penalty that the loss uses."""

    @property
    def observed(self) -> str:
        """Which KL is looked at."""
        return self.observe

    @model_validator(mode="after")
    def _has_room(self) -> BandBetaConfig:
        if self.low >= self.high:
            raise ValueError(f"the KL band has low = {self.low} >= high = {self.high}; set low < high")
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(f"initial = {self.initial} lies outside [{self.minimum}, {self.maximum}]")
        return self


BetaConfig = Annotated[FixedBetaConfig | BandBetaConfig, Field(discriminator="type")]


class ObjectiveConfig(StrictModel):
    """One thing to be good at: its rewards, its weight among the objectives, its own KL controller."""

    weight: float = Field(default=1.0, ge=0)
    rewards: tuple[RewardSpec, ...] = Field(min_length=1)
    """The objective's score is their weighted sum; where one is missing, the score is missing."""
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
        return self


class RolloutConfig(StrictModel):
    """How completions are sampled. temperature, top_p and top_k go to the engine as its own arguments."""

    group_size: int = Field(default=8, ge=2)
    """K completions per prompt; advantages are relative to the group, so at least 2."""
    temperature: float = Field(default=1.0, gt=0)
    """A greedy policy (0) has no policy gradient: refused."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 keeps all tokens."""
    max_new_tokens: int = Field(default=256, ge=1)
    min_new_tokens: int = Field(default=0, ge=0)
    """No end token among the first so many tokens."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken off the logit of each token that the completion already holds, before the temperature."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """As presence_penalty, times the number of occurrences."""
    end_tokens: tuple[str | int, ...] = ()
    """Further end tokens, by id or text, besides those of tokenizer, generation config and chat template."""
    max_rows: int = Field(default=64, ge=1)
    """Rows decoded side by side; more prompts are sampled in turns."""

    @model_validator(mode="after")
    def _ends_fit(self) -> RolloutConfig:
        if self.min_new_tokens >= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens = {self.min_new_tokens} leaves no token for an end within "
                f"max_new_tokens = {self.max_new_tokens}; set it lower"
            )
        return self


class ScoringConfig(StrictModel):
    """When missing verdicts are too many to train on."""

    max_unscored_frac: float = Field(default=0.5, ge=0, le=1)
    """The run stops where more of an objective's completions than this have no verdict in a step."""


class KlConfig(StrictModel):
    """The penalty for moving away from the reference."""

    estimator: Literal["clamped", "k3"] = "clamped"
    """`clamped` is one-sided and linear and cannot explode; `k3` pulls both ways."""
    max_log_ratio: float = Field(default=10.0, gt=0)
    """Log-ratios are clamped to this many nats, with a straight-through gradient."""


class UpdateConfig(StrictModel):
    """How scores become a gradient."""

    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.2, gt=0)
    combine: Literal["decoupled", "summed"] = "decoupled"
    """Normalise each objective on its own (GDPO), or sum the scores first."""
    scale: Literal["group", "batch", "none"] = "group"
    kl: KlConfig = KlConfig()
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Budget of one micro-batch, padding included. Changes memory and speed, never the gradient."""


Momentum = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(StrictModel):
    """AdamW."""

    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "linear"] = "constant"
    """`linear` falls from learning_rate in the first step towards 0 after the last: what is learned early stays."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The window's gradient is scaled down to this norm, once."""


class LoraTrainable(StrictModel):
    """Low-rank adapters; the reference is the same model with them switched off."""

    type: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Module names as peft matches them; all-linear leaves the language-model head out."""


class FullTrainable(StrictModel):
    """Every parameter learns, in float32; the reference is a second copy of the model."""

    type: Literal["full"]


TrainableConfig = Annotated[LoraTrainable | FullTrainable, Field(discriminator="type")]


class EvalConfig(StrictModel):
    """Greedy answers to held-out prompts, scored by the objectives' eval_rewards."""

    before: bool = True
    after: bool = True
    num_prompts: int = Field(default=64, ge=2)
    """Held-out prompts per objective."""


class CheckpointConfig(StrictModel):
    """When the run is saved. It is also saved at its end and when it is interrupted."""

    every: int = Field(default=10, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(default=2, ge=1)
    """The newest so many stay."""


class RunConfig(StrictModel):
    """A whole recipe."""

    model: str = Field(min_length=1)
    """A hub name, a folder, or package:<import name> for a model that an installed package carries."""
    seed: int = Field(default=0, ge=0)
    steps: int = Field(ge=1)
    output_dir: Path
    """The run directory; must not exist yet, or use --resume. Relative to the recipe's folder."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the frozen weights and the matrix products; auto is bfloat16 where the hardware has it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    prompts: PromptsConfig
    objectives: dict[str, ObjectiveConfig] = Field(min_length=1)
    rollout: RolloutConfig = RolloutConfig()
    scoring: ScoringConfig = ScoringConfig()
    update: UpdateConfig = UpdateConfig()
    optim: OptimConfig
    trainable: TrainableConfig = LoraTrainable()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    base_dir: Path
    """Folder of the recipe, against which relative paths are resolved. Set by the loader."""

    @model_validator(mode="after")
    def _objectives_fit(self) -> RunConfig:
        if all(objective.weight == 0 for objective in self.objectives.values()):
            raise ValueError("objectives: all weights are 0, so nothing would be learned; set one above 0")
        for name in self.objectives:
            if not name.isidentifier():
                raise ValueError(f"objectives: {name!r} is no plain name; use letters, digits and underscores")
        return self
