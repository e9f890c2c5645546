"""TrainBatch -> one optimizer step and its UpdateStats. Alone in this folder, it knows records and state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo import metrics as names
from grpo.batching import MicroBatch, TrainBatch
from grpo.config import OptimConfig, UpdateConfig
from grpo.errors import NonFiniteUpdate
from grpo.metrics import MeanAccumulator, kl_name, kl_penalty_name
from grpo.rollout.base import SamplingParams
from grpo.runtime.policy import Policy, dropout_off
from grpo.update.beta import BetaController
from grpo.update.forward import policy_pass, reference_logprobs
from grpo.update.gradients import GradientWindow
from grpo.update.kl import kl_penalty
from grpo.update.losses import clipped_tokens, policy_loss, policy_ratio, reduce_loss

OBSERVED_KL_LIMIT = 10.0
"""A token counts with at most so many nats of k3 in what a controller sees: one bad token must not multiply beta."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStats:
    """What one window did."""

    means: Mapping[str, float]
    """Metric name -> mean over the window's loss tokens, or over the objective's; absent where nothing counted."""
    grad_norm: float
    """Of the window's gradient, before clipping."""
    learning_rate: float
    """That the step was taken with."""
    ratio_p99: float
    """99th percentile of |log(policy / sampler)| over loss tokens, as a ratio; 1 where both agree."""
    kl_max: Mapping[str, float]
    """Objective -> largest per-token k3."""
    betas: Mapping[str, float]
    """Objective -> the beta that this window used."""
    num_forced: int
    """Sampled tokens that the replayed filter would have dropped."""


@dataclass(slots=True)
class _Window:
    """Sums over a window's micro-batches."""

    means: MeanAccumulator = field(default_factory=MeanAccumulator)
    observed: MeanAccumulator = field(default_factory=MeanAccumulator)
    kl_max: dict[str, float] = field(default_factory=dict)
    sampler_gaps: list[Tensor] = field(default_factory=list)
    num_forced: int = 0


class Updater:
    """Takes optimizer steps. Owns the optimizer, the window's gradient and the objectives' beta controllers."""

    def __init__(
        self,
        policy: Policy,
        controllers: Mapping[str, BetaController],
        *,
        observed: Mapping[str, str],
        params: SamplingParams,
        update: UpdateConfig,
        optim: OptimConfig,
    ) -> None:
        """Args: observed: objective -> "k3" or "penalty", what its controller looks at; params: the sampling law."""
        self.policy = policy
        self.controllers = dict(controllers)
        self._observed = dict(observed)
        self._params, self._update, self._optim = params, update, optim
        parameters = policy.trainable_parameters()
        self.gradients = GradientWindow(parameters)
        self.optimizer = torch.optim.AdamW(
            list(parameters.values()),
            lr=optim.learning_rate,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )

    def step(self, batch: TrainBatch, *, progress: float = 0.0) -> UpdateStats:
        """One window: zero once, add every micro-batch's gradient, clip once, step once.

        Args:
            progress: share of the run's steps that are done, in [0, 1); what the learning-rate schedule goes by.
        Raises:
            NonFiniteUpdate: the loss or a gradient is not finite; the parameters are as they were.
        """
        window = _Window()
        betas = {name: controller.value for name, controller in self.controllers.items()}  # constant in the window
        self.gradients.start_window()
        with dropout_off(self.policy.model):
            for micro_batch in batch.micro_batches:
                loss = self._loss(micro_batch.to(self.policy.device), batch, betas, window)
                if not bool(torch.isfinite(loss)):
                    raise NonFiniteUpdate(
                        f"the loss of a micro-batch of {micro_batch.num_tokens} tokens is {loss.item()}; "
                        "no optimizer step was taken. Look at the step's completions and at update.kl."
                    )
                self.gradients.add(loss)
        learning_rate = scheduled_learning_rate(self._optim, progress)
        grad_norm = self._apply(learning_rate)
        observed = window.observed.means()
        for name, controller in self.controllers.items():
            if name in observed:
                controller.observe(observed[name])
        return UpdateStats(
            means=window.means.means(),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            ratio_p99=_ratio_p99(window.sampler_gaps),
            kl_max=window.kl_max,
            betas=betas,
            num_forced=window.num_forced,
        )

    def _apply(self, learning_rate: float) -> float:
        name = self.gradients.first_non_finite()
        if name is not None:
            raise NonFiniteUpdate(f"the gradient of {name} is not finite; no optimizer step was taken")
        grad_norm = self.gradients.clip(self._optim.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return grad_norm

    def _loss(self, batch: MicroBatch, whole: TrainBatch, betas: Mapping[str, float], window: _Window) -> Tensor:
        """This micro-batch's part of the window's loss."""
        update, mask = self._update, batch.completion_mask
        ref_logprobs = reference_logprobs(self.policy, batch, self._params)  # [B, T]
        forward = policy_pass(self.policy, batch, self._params)
        old_logprobs = forward.logprobs.detach()  # one step per batch: the policy before it is the policy now
        policy_term = policy_loss(
            forward.logprobs,
            old_logprobs,
            batch.advantages,
            mask,
            clip_low=update.clip_low,
            clip_high=update.clip_high,
        )  # [B, T]
        penalty = kl_penalty(
            forward.plain_logprobs,
            ref_logprobs,
            estimator=update.kl.estimator,
            max_log_ratio=update.kl.max_log_ratio,
            mask=mask,
        )  # [B, T]
        row_beta = kl_weights(batch.is_scored, whole.weights.to(mask.device), whole.objectives, betas)  # [B]
        kl_term = row_beta[:, None] * penalty  # [B, T]
        with torch.no_grad():
            ratio = policy_ratio(forward.logprobs, old_logprobs, mask)
            clipped = clipped_tokens(
                ratio, batch.advantages, mask, clip_low=update.clip_low, clip_high=update.clip_high
            )
            num_tokens = batch.num_tokens
            window.means.add(names.CLIP_LOW_FRAC, float(clipped[0]), num_tokens)
            window.means.add(names.CLIP_HIGH_FRAC, float(clipped[1]), num_tokens)
            window.means.add(names.POLICY_LOSS, float(policy_term.sum()), num_tokens)
            window.means.add(names.KL_LOSS, float(kl_term.sum()), num_tokens)
            window.means.add(names.ENTROPY, float(forward.entropy.sum()), num_tokens)
            window.sampler_gaps.append((forward.logprobs - batch.sampler_logprobs)[mask].abs().cpu())
            window.num_forced += forward.num_forced
            self._record_kl(window, batch, whole.objectives, forward.plain_logprobs - ref_logprobs, penalty)
        return reduce_loss(policy_term + kl_term, mask, num_tokens=whole.num_tokens)

    def _record_kl(
        self, window: _Window, batch: MicroBatch, objectives: tuple[str, ...], difference: Tensor, penalty: Tensor
    ) -> None:
        """Args: difference: [B, T] policy - reference; penalty: [B, T] what the loss uses."""
        mask, limit = batch.completion_mask, self._update.kl.max_log_ratio
        k3 = kl_penalty(difference, torch.zeros_like(difference), estimator="k3", max_log_ratio=limit, mask=mask)
        is_clamped = mask & (difference.abs() > limit)
        window.means.add(names.KL_CLAMPED_FRAC, float(is_clamped.sum()), batch.num_tokens)
        for o, name in enumerate(objectives):
            own = mask & batch.is_scored[:, o, None]  # [B, T]
            count = int(own.sum())
            if not count:
                continue
            window.means.add(kl_name(name), float(k3[own].sum()), count)
            window.means.add(kl_penalty_name(name), float(penalty[own].sum()), count)
            seen = penalty if self._observed[name] == "penalty" else k3.clamp(max=OBSERVED_KL_LIMIT)
            window.observed.add(name, float(seen[own].sum()), count)
            window.kl_max[name] = max(window.kl_max.get(name, 0.0), float(k3[own].max()))


def scheduled_learning_rate(optim: OptimConfig, progress: float) -> float:
    """The learning rate after a share `progress` of the run; a function of it alone, so a resumed run goes on."""
    return optim.learning_rate * (1 - progress) if optim.schedule == "linear" else optim.learning_rate


def kl_weights(is_scored: Tensor, weights: Tensor, objectives: tuple[str, ...], betas: Mapping[str, float]) -> Tensor:
    """[B] weight of each row's KL term: the sum of w_o * beta_o over the objectives o that scored it (FORMULAS 4)."""
    per_objective = weights * torch.tensor([betas[name] for name in objectives], device=weights.device)  # [O]
    return (is_scored * per_objective).sum(dim=-1)


def _ratio_p99(gaps: list[Tensor]) -> float:
    if not gaps:
        return 1.0
    sorted_gaps = torch.cat(gaps).sort().values
    return float(sorted_gaps[int(0.99 * (sorted_gaps.numel() - 1))].exp())
