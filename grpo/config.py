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


ObservedKl = Literal["k3", "penalty"]

PromptsConfig = Annotated[TaskPrompts | FilePrompts | HubPrompts, Field(discriminator="type")]


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
    """Steps in a row with beta at its maximum and the KL still too high, after which a warning says so."""

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
    """Beta changes by this share per step while the KL is outside."""

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
    """Rows over which beta may change by its own size; the rows of a step over it are the step's share."""


class DualBetaConfig(_AdaptiveBetaConfig):
    """Log beta integrates the relative error: the dual ascent of "KL <= target"."""

    type: Literal["dual"]
    target: float = Field(gt=0)
    """KL to hold, in nats per token."""
    rate: float = Field(default=0.1, gt=0)
    """Log beta changes by this much per step at twice the target."""


BetaConfig = Annotated[
    FixedBetaConfig | BandBetaConfig | ProportionalBetaConfig | DualBetaConfig, Field(discriminator="type")
]


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
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Drops tokens less likely than this share of the likeliest."""
    max_new_tokens: int = Field(default=256, ge=1)
    min_new_tokens: int = Field(default=0, ge=0)
    """No end token among the first so many tokens."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken off the logit of each token that the completion already holds, before the temperature."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """As presence_penalty, times the number of occurrences."""
    end_tokens: tuple[str | int, ...] = ()
    """Further end tokens, by id or text, besides those of tokenizer, generation config and chat template."""
    resample_rounds: int = Field(default=0, ge=0)
    """Dynamic sampling (DAPO): groups whose scores are all equal are replaced by groups of other prompts, at most so
    many times a step."""
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
    """The penalty for moving away from the reference (FORMULAS 3)."""

    estimator: Literal["clamped", "k1", "k2", "k3", "k3+", "abs"] = "clamped"
    """`clamped` is one-sided and linear and cannot explode; `k3` pulls both ways; `k3+` reports k3 and pulls as k2."""
    max_log_ratio: float = Field(default=10.0, gt=0)
    """Log-ratios are clamped to this many nats, with a straight-through gradient."""
    kl_in: Literal["loss", "reward"] = "loss"
    """A term of the loss, or taken off each token's advantage after normalisation (then it is the log-ratio itself)."""
    kl_correction: Literal["none", "ratio"] = "none"
    """`ratio` multiplies by policy / old, with gradient: the exact reverse-KL gradient, for k1 and k3."""

    @model_validator(mode="after")
    def _has_a_gradient(self) -> KlConfig:
        if self.kl_correction == "ratio" and self.estimator not in ("k1", "k3"):
            raise ValueError(f"kl_correction = ratio is exact for k1 and k3 only, not for {self.estimator}; set none")
        if self.kl_in == "reward" and (self.estimator != "k1" or self.kl_correction != "none"):
            raise ValueError("kl_in = reward takes the log-ratio off the advantage: set estimator = k1, no correction")
        if self.kl_in == "loss" and self.estimator == "k1" and self.kl_correction == "none":
            raise ValueError(
                "k1 in the loss has expected gradient zero: set kl_correction = ratio, or kl_in = reward, or another "
                "estimator"
            )
        return self


class ClippedLossConfig(StrictModel):
    """GRPO's clipped loss; the types differ in what the sum is divided by, gspo also in its ratio (FORMULAS 5, 6)."""

    type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "gspo"] = "dapo"
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.2, gt=0)
    delta: float | None = Field(default=None, gt=1)
    """Bound on the ratio of tokens with a negative advantage (dual clip); above 1 + clip_high."""

    @model_validator(mode="after")
    def _delta_is_outside(self) -> ClippedLossConfig:
        if self.delta is not None and self.delta <= 1 + self.clip_high:
            raise ValueError(f"delta = {self.delta} must be above 1 + clip_high = {1 + self.clip_high}")
        return self


class CispoLossConfig(StrictModel):
    """REINFORCE weighted by a truncated, detached ratio: no token is silenced (MiniMax, arXiv:2506.13585)."""

    type: Literal["cispo"]
    max_ratio: float = Field(default=5.0, gt=1)


class SapoLossConfig(StrictModel):
    """A soft gate in place of the clip (arXiv:2511.20347)."""

    type: Literal["sapo"]
    temperature_positive: float = Field(default=1.0, gt=0)
    temperature_negative: float = Field(default=1.05, gt=0)


class CustomLossConfig(StrictModel):
    """A loss of one's own: a function of grpo.update.losses.LossInput, named `package.module:name`."""

    type: Literal["custom"]
    path: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    params: dict[str, Any] = Field(default_factory=dict)
    """Given to the function as keyword arguments."""
    reduction: Literal["tokens", "rows", "max_tokens"] = "tokens"
    """Divided by the window's loss tokens, as a mean over rows of each row's mean, or by rows * max_new_tokens."""


LossConfig = Annotated[
    ClippedLossConfig | CispoLossConfig | SapoLossConfig | CustomLossConfig, Field(discriminator="type")
]


class FixedEntropyConfig(StrictModel):
    """A bonus of coefficient * mean entropy over the window's loss tokens."""

    type: Literal["fixed"]
    coefficient: float = Field(gt=0)


class AdaptiveEntropyConfig(StrictModel):
    """A bonus that grows while the entropy is at or below its target, and rests above it."""

    type: Literal["adaptive"]
    target: float = Field(gt=0)
    """Nats per token."""
    step: float = Field(default=1e-3, gt=0)
    """The coefficient moves by this much per window."""
    initial: float = Field(default=0.0, ge=0)
    maximum: float = Field(default=0.05, gt=0)

    @model_validator(mode="after")
    def _starts_inside(self) -> AdaptiveEntropyConfig:
        if self.initial > self.maximum:
            raise ValueError(f"initial = {self.initial} lies above maximum = {self.maximum}")
        return self


EntropyConfig = Annotated[FixedEntropyConfig | AdaptiveEntropyConfig, Field(discriminator="type")]


class RolloutCorrectionConfig(StrictModel):
    """Weights the policy term by old / sampler, where engine and trainer differ (FORMULAS 5)."""

    level: Literal["token", "sequence"] = "token"
    mode: Literal["truncate", "mask"] = "truncate"
    """`truncate` bounds the weight at `high`; `mask` drops what lies outside [low, high]."""
    low: float = Field(default=0.5, ge=0)
    """For `mask` only."""
    high: float = Field(default=2.0, gt=1)
    sequence_log_ratio: Literal["mean", "sum"] = "mean"
    """For `sequence`: the mean over tokens is biased, but length does not decide."""


class TruncatedMask(StrictModel):
    """Completions cut at max_new_tokens leave the loss and its denominators."""

    type: Literal["mask"]
    in_baseline: bool = True
    """Whether their scores still count in their group's mean and standard deviation."""


class TruncatedPenalty(StrictModel):
    """A score that falls from 0 to -weight over the last `buffer_tokens` before max_new_tokens (DAPO)."""

    type: Literal["penalty"]
    buffer_tokens: int = Field(ge=1)
    weight: float = Field(default=1.0, gt=0)


class TruncatedKeep(StrictModel):
    """Completions cut at max_new_tokens are trained on as all others."""

    type: Literal["keep"] = "keep"


TruncatedConfig = Annotated[TruncatedKeep | TruncatedMask | TruncatedPenalty, Field(discriminator="type")]


class GradientsConfig(StrictModel):
    """How the objectives' gradients become one (FORMULAS 7)."""

    method: Literal["sum", "pcgrad", "cagrad", "mgda"] = "sum"
    """Anything but `sum` takes a backward pass for each objective."""
    cosine_every: int = Field(default=0, ge=0)
    """Every so many steps the objectives' gradients are taken apart to log their cosines and norms; 0 never does,
    where the method does not need them anyway."""


class UpdateConfig(StrictModel):
    """How scores become a gradient."""

    loss: LossConfig = ClippedLossConfig()
    combine: Literal["decoupled", "summed"] = "decoupled"
    """Normalise each objective on its own (GDPO), or sum the scores first."""
    scale: Literal["group", "batch", "none"] | None = None
    """What centred scores are divided by. None: `none` for dr_grpo, as its paper has it, else `group`."""
    kl: KlConfig = KlConfig()
    entropy: EntropyConfig | None = None
    """A bonus for entropy; none where None."""
    iterations: int = Field(default=1, ge=1)
    """mu: optimizer steps over one batch."""
    correction: RolloutCorrectionConfig | None = None
    """Rollout correction; none where None. The ratio's tails are logged either way."""
    truncated: TruncatedConfig = TruncatedKeep()
    flat_groups: Literal["kl_only", "drop"] = "kl_only"
    """Groups whose scores are all equal teach nothing: they keep their KL term, or leave the update."""
    gradients: GradientsConfig = GradientsConfig()
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Budget of one micro-batch, padding included. Changes memory and speed, never the gradient."""
    max_non_finite_steps: int = Field(default=3, ge=1)
    """Steps in a row that may be skipped for a loss or gradient that is not finite; then the run stops."""

    @property
    def score_scale(self) -> Literal["group", "batch", "none"]:
        """What centred scores are divided by."""
        return self.scale or ("none" if self.loss.type == "dr_grpo" else "group")


Momentum = Annotated[float, Field(ge=0, lt=1)]


class LearningRateRule(StrictModel):
    """A learning rate of its own for the parameters whose name matches."""

    pattern: str = Field(min_length=1)
    """A regular expression, searched in the parameter's name; `lora_B` is LoRA+ (arXiv:2402.12354)."""
    factor: float = Field(gt=0)
    """Times learning_rate."""


class OptimConfig(StrictModel):
    """AdamW."""

    type: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps its moments in 8 bits (bitsandbytes, the extra `8bit`)."""
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """`linear` and `cosine` fall from learning_rate after the warm-up towards 0 after the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """The learning rate rises linearly over the first so many steps."""
    rules: tuple[LearningRateRule, ...] = ()
    """Per-module learning rates; the first that matches a parameter holds."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The window's gradient is scaled down to this norm, once."""


class WarmupConfig(StrictModel):
    """Supervised training before the first step, on the same trainable parameters (TRL's SFTTrainer)."""

    path: Path
    """JSON-lines or JSON file with a prompt and its completion in each row; relative to the recipe's folder."""
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    steps: int = Field(ge=1)
    batch_size: int = Field(default=8, ge=1)
    """Rows per optimizer step."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Rows that go through the model together; divides batch_size."""
    learning_rate: float = Field(gt=0)
    max_tokens: int = Field(default=1024, ge=2)
    """Longer rows are cut."""

    @model_validator(mode="after")
    def _divides(self) -> WarmupConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size = {self.micro_batch_size} does not divide {self.batch_size}")
        return self


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
    warmup: WarmupConfig | None = None
    """A supervised stage before the first step; none where None."""
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
