"""How scores become an optimizer step: loss, KL, entropy, corrections, gradients, optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo.config.base import StrictModel


class KlConfig(StrictModel):
    """The penalty for moving away from the reference (FORMULAS 3)."""

    estimator: Literal["clamped", "k1", "k2", "k3", "k3+", "abs"] = "clamped"
    """`clamped` is one-sided and linear and cannot explode; `k3` pulls both ways; `k3+` reports k3 and pulls as k2."""
    max_log_ratio: float = Field(default=10.0, gt=0, le=50)
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
    """Bound on the ratio of tokens with a negative advantage (dual clip); above 1 + clip_high. With it, the
    share of tokens that it silences is logged as clip/delta_frac."""

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
    high: float | None = Field(default=None, gt=1)
    """None: 2.0 for `truncate`, 5.0 for `mask`."""
    sequence_log_ratio: Literal["mean", "sum"] = "mean"
    """For `sequence`: the mean over tokens is biased, but length does not decide."""

    @model_validator(mode="after")
    def _keeps_something(self) -> RolloutCorrectionConfig:
        if self.mode == "mask" and self.low >= self.bound:
            raise ValueError(f"low = {self.low} is not below high = {self.bound}, so every token would be masked")
        return self

    @property
    def bound(self) -> float:
        """What `high` stands for."""
        return self.high or (2.0 if self.mode == "truncate" else 5.0)


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
    """Groups whose scores are all equal teach nothing: they keep their KL term, or leave the update. Where beta is
    fixed at 0 and there is no entropy bonus, those that stay count in the denominators, but take no pass."""
    gradients: GradientsConfig = GradientsConfig()
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Budget of one micro-batch, padding included. Changes memory and speed, never the gradient. As few micro-batches
    as it allows, of like cost; a group's completions stay with their prompt where it holds them all."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Blocks of the model that keep only their input and are computed again for their gradient: every second one
    (selective) or all (full). The same gradient, in less memory and more time."""
    offload: Literal["none", "activations"] = "none"
    """What a policy pass keeps for its gradient waits in host memory: the same gradient, for the time of the copies. On
    a GPU only."""
    max_non_finite_steps: int = Field(default=3, ge=1)
    """Steps in a row that may be skipped for a loss or gradient that is not finite; then the run stops."""

    @model_validator(mode="after")
    def _can_be_taken_apart(self) -> UpdateConfig:
        if self.loss.type == "custom" and (self.gradients.method != "sum" or self.gradients.cosine_every):
            raise ValueError(
                "a custom loss cannot be taken apart by objectives: nothing says that it is linear in the advantage; "
                "set gradients.method = sum and gradients.cosine_every = 0"
            )
        return self

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
    offload: Literal["none", "states"] = "none"
    """The moments wait in host memory between steps. On a GPU only."""
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
