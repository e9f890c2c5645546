"""Micro-batch -> its part of the window's loss, and what it says about itself. Knows records; changes no parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo import metrics as names
from grpo.batching import MicroBatch, TrainBatch, parts_within
from grpo.config import CispoLossConfig, ClippedLossConfig, CustomLossConfig, SapoLossConfig, UpdateConfig
from grpo.errors import ConfigError
from grpo.rollout.base import SamplingParams
from grpo.rollout.replay import Replay
from grpo.runtime.policy import Policy
from grpo.update.activations import checkpointed, checkpointed_blocks
from grpo.update.forward import Forward, policy_pass, reference_logprobs, replay_of
from grpo.update.host_memory import Host, offloaded
from grpo.update.kl import kl_penalty
from grpo.update.losses import (
    REDUCTIONS,
    LossInput,
    Reduction,
    check_custom_output,
    clipped_tokens,
    load_custom_loss,
    loss_coefficients,
    policy_ratio,
    reduce_loss,
)
from grpo.update.non_finite import is_finite
from grpo.update.rollout_correction import correction_weights, ratio_tails
from grpo.update.statistics import WindowStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighing:
    """What is constant in a window: over all ranks, taken before its first backward pass (FORMULAS 4, 6)."""

    num_tokens: int
    """Loss tokens of the window."""
    num_rows: int
    """Rows that have any."""
    betas: Mapping[str, float]
    """Objective -> weight of its KL."""
    entropy_coefficient: float
    """Of the bonus; 0 without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fixed:
    """What is the same for a micro-batch in all mu windows: taken in the first, before any optimizer step."""

    ref_logprobs: Tensor
    """[B, T]"""
    old_logprobs: Tensor
    """[B, T]"""
    advantages: Tensor
    """[B], or [B, T] where the KL is taken off them."""
    shares: Tensor
    """[B, O], or [B, T, O]; each objective's part of the advantages."""
    correction: Tensor | None
    """[B, T] weights of the policy term, for what engine and trainer disagree about."""

    def rows(self, rows: Tensor, *, width: int) -> _Fixed:
        """Of some rows [B'] of the micro-batch, and their first `width` tokens."""

        def cut(values: Tensor) -> Tensor:
            """[B, ...] and, where it is told per token, [B, T, ...]"""
            per_token = values.shape[:2] == self.ref_logprobs.shape
            return values[rows, :width] if per_token else values[rows]

        return _Fixed(
            ref_logprobs=cut(self.ref_logprobs),
            old_logprobs=cut(self.old_logprobs),
            advantages=cut(self.advantages),
            shares=self.shares[rows, :width] if self.shares.dim() == 3 else self.shares[rows],
            correction=None if self.correction is None else cut(self.correction),
        )


@dataclass(slots=True)
class MicroBatchWork:
    """A micro-batch on its way through the mu windows."""

    batch: MicroBatch
    replay: Replay
    fixed: _Fixed | None = None
    place: int = 0
    """Of the micro-batch, in the rank's batch, that it is or is a part of."""

    def not_finite(self) -> list[str]:
        """Names of what the loss is given that is not finite."""
        given = {
            "the advantages": self.batch.advantages,
            "the sampler's log-probabilities": self.batch.sampler_logprobs,
        }
        if self.fixed is not None:
            given["the reference's log-probabilities"] = self.fixed.ref_logprobs
        return [name for name, values in given.items() if not is_finite(values)]

    def parts(self, budget: int, params: SamplingParams, *, remembers: bool) -> list[MicroBatchWork]:
        """Smaller ones that come to the same: within a budget of padded tokens, or of one row. What the first window
        has fixed stays fixed."""
        found: list[MicroBatchWork] = []
        of_row = self.batch.completion_mask.nonzero()[:, 0]  # [N] row of each loss token
        for rows in parts_within(self.batch, budget):
            batch = self.batch.rows(rows)
            replay = replay_of(batch, params, remembers=remembers)
            fixed = None
            if self.fixed is not None:
                replay.take_over(self.replay, torch.isin(of_row, rows).nonzero()[:, 0])
                fixed = self.fixed.rows(rows, width=batch.completion_ids.shape[1])
            found.append(MicroBatchWork(batch=batch, replay=replay, fixed=fixed, place=self.place))
        return found


class WindowLoss:
    """The loss that a recipe's `update` describes, micro-batch by micro-batch."""

    def __init__(
        self,
        policy: Policy,
        *,
        observed: Mapping[str, str],
        params: SamplingParams,
        update: UpdateConfig,
        host: Host | None = None,
    ) -> None:
        """Args: observed: objective -> "k3" or "penalty", what its controller looks at; params: the sampling law; host:
        where what the policy's pass keeps for its gradient waits; None: where it is.

        Raises:
            ModelError: the model does not say which blocks could be checkpointed.
        """
        checkpointed_blocks(policy.causal_lm, update.checkpointing)
        self._policy, self._params, self._update, self._host = policy, params, update, host
        self._observed = dict(observed)
        self._loss_arguments = loss_arguments(update)
        self._custom_loss = load_custom_loss(update.loss.path) if isinstance(update.loss, CustomLossConfig) else None

    def parts(
        self,
        work: MicroBatchWork,
        whole: TrainBatch,
        weighing: Weighing,
        statistics: WindowStatistics,
        *,
        is_apart: bool = False,
    ) -> list[tuple[int | None, Tensor]]:
        """One micro-batch's part of the window's loss.

        Args:
            work: the micro-batch; what the first window fixes is kept in it.
            whole: the batch it belongs to.
            weighing: denominators and coefficients of the window.
            statistics: is added to.
            is_apart: give the loss objective by objective.
        Returns:
            (objective's place, loss), where None is the place of what belongs to no objective. They add up to the
            micro-batch's loss.
        """
        batch, mask, bonus = work.batch, work.batch.completion_mask, weighing.entropy_coefficient
        # the reference first: its activations are gone before those that the backward pass needs are held
        ref_logprobs = work.fixed.ref_logprobs if work.fixed else reference_logprobs(self._policy, batch, self._params)
        model = self._policy.causal_lm
        with checkpointed(model, self._update.checkpointing), offloaded(model, self._host):
            forward = policy_pass(
                self._policy, batch, self._params, replay=work.replay, entropy_has_gradient=bonus > 0
            )  # [B, T] each
        weights = kl_weights(batch.is_scored, whole.weights.to(mask.device), whole.objectives, weighing.betas)  # [B, O]
        is_first = work.fixed is None
        if work.fixed is None:
            work.fixed = self._fix(batch, forward, ref_logprobs, weights)
        fixed = work.fixed
        penalty = self._penalty(forward, fixed, mask)  # [B, T]
        has_kl_term = self._update.kl.kl_in == "loss"

        def kl_term(weight: Tensor) -> Tensor:
            """Args: weight: [B]"""
            return weight[:, None] * penalty if has_kl_term else torch.zeros_like(penalty)

        policy_term, factors = self._policy_term(batch, forward, fixed, statistics)  # [B, T] each
        whole_kl_term = kl_term(weights.sum(dim=-1))
        parts: list[tuple[int | None, Tensor]] = []
        if is_apart:
            assert factors is not None  # the recipe refuses to take a loss of one's own apart
            for o in range(len(whole.objectives)):
                token_loss = factors * _per_token(fixed.shares[..., o]) + kl_term(weights[:, o])
                parts.append((o, self._reduced(token_loss, mask, weighing)))
        else:
            parts.append((None, self._reduced(policy_term + whole_kl_term, mask, weighing)))
        if bonus > 0:
            entropy_loss = -bonus * reduce_loss(forward.entropy, mask, num_tokens=weighing.num_tokens)
            parts.append((None, entropy_loss))
        with torch.no_grad():
            self._record(statistics, batch, forward, fixed, policy_term=policy_term, kl_term=whole_kl_term)
            if is_first:
                _record_sampler(statistics, work, fixed)
            statistics.add_kl(
                batch,
                whole.objectives,
                forward.plain_logprobs - fixed.ref_logprobs,
                penalty,
                max_log_ratio=self._update.kl.max_log_ratio,
                observes=self._observed,
            )
        return parts

    def _fix(self, batch: MicroBatch, forward: Forward, ref_logprobs: Tensor, weights: Tensor) -> _Fixed:
        """Args: weights: [B, O] of the KL."""
        with torch.no_grad():
            old_logprobs = forward.logprobs.detach()  # before the first optimizer step: the policy before it is this
            advantages, shares = batch.advantages, batch.shares
            if self._update.kl.kl_in == "reward":
                off = kl_penalty(
                    forward.plain_logprobs.detach(),
                    ref_logprobs,
                    estimator=self._update.kl.estimator,
                    max_log_ratio=self._update.kl.max_log_ratio,
                    mask=batch.completion_mask,
                )  # [B, T]
                shares = shares[:, None, :] - weights[:, None, :] * off[..., None]  # [B, T, O]
                advantages = advantages[:, None] - weights.sum(dim=-1)[:, None] * off  # [B, T]
            correction = None
            if self._update.correction is not None:
                correction = correction_weights(
                    old_logprobs,
                    batch.sampler_logprobs,
                    batch.completion_mask,
                    **{**self._update.correction.model_dump(), "high": self._update.correction.bound},
                )
        return _Fixed(
            ref_logprobs=ref_logprobs,
            old_logprobs=old_logprobs,
            advantages=advantages,
            shares=shares,
            correction=correction,
        )

    def _policy_term(
        self, batch: MicroBatch, forward: Forward, fixed: _Fixed, statistics: WindowStatistics
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T] the policy loss of each token, and what it is linear in: the factor [B, T] of the advantage."""
        mask = batch.completion_mask
        if self._custom_loss is not None:
            assert isinstance(self._update.loss, CustomLossConfig)
            given = LossInput(
                logprobs=forward.logprobs,
                old_logprobs=fixed.old_logprobs,
                sampler_logprobs=batch.sampler_logprobs,
                ref_logprobs=fixed.ref_logprobs,
                advantages=fixed.advantages,
                mask=mask,
            )
            try:
                output = check_custom_output(self._custom_loss(given, **self._update.loss.params), given)
            except ValueError as exc:
                raise ConfigError(f"update.loss.path {self._update.loss.path}: {exc}") from exc
            for name, values in output.metrics.items():
                is_per_token = values.dim() == 2
                counted = (values[mask] if is_per_token else values).detach()
                statistics.means.add(f"loss/{name}", float(counted.sum()), counted.numel())
            policy_term = output.token_loss.masked_fill(~mask, 0.0)
            return policy_term if fixed.correction is None else policy_term * fixed.correction, None
        factors = loss_coefficients(
            forward.logprobs, fixed.old_logprobs, fixed.advantages, mask, **self._loss_arguments
        )  # [B, T]
        factors = factors if fixed.correction is None else factors * fixed.correction
        return factors * _per_token(fixed.advantages), factors

    def _penalty(self, forward: Forward, fixed: _Fixed, mask: Tensor) -> Tensor:
        """[B, T] the KL penalty of each token, in nats."""
        kl = self._update.kl
        penalty = kl_penalty(
            forward.plain_logprobs,
            fixed.ref_logprobs,
            estimator=kl.estimator,
            max_log_ratio=kl.max_log_ratio,
            mask=mask,
        )
        if kl.kl_correction == "ratio":
            penalty = penalty * policy_ratio(forward.logprobs, fixed.old_logprobs, mask)
        return penalty

    def _reduced(self, token_loss: Tensor, mask: Tensor, weighing: Weighing) -> Tensor:
        return reduce_loss(
            token_loss,
            mask,
            num_tokens=weighing.num_tokens,
            reduction=reduction_of(self._update),
            num_rows=weighing.num_rows,
            max_new_tokens=self._params.max_new_tokens,
        )

    def _record(
        self,
        statistics: WindowStatistics,
        batch: MicroBatch,
        forward: Forward,
        fixed: _Fixed,
        *,
        policy_term: Tensor,
        kl_term: Tensor,
    ) -> None:
        """Means over loss tokens, whatever the loss itself is divided by, so that runs can be compared."""
        mask, num_tokens, loss = batch.completion_mask, batch.num_tokens, self._update.loss
        statistics.means.add(names.POLICY_LOSS, float(policy_term.sum()), num_tokens)
        statistics.means.add(names.KL_LOSS, float(kl_term.sum()), num_tokens)
        statistics.means.add(names.ENTROPY, float(forward.entropy.sum()), num_tokens)
        if isinstance(loss, ClippedLossConfig):
            level = "sequence" if loss.type == "gspo" else "token"
            ratio = policy_ratio(forward.logprobs, fixed.old_logprobs, mask, level=level)
            clipped = clipped_tokens(
                ratio, fixed.advantages, mask, clip_low=loss.clip_low, clip_high=loss.clip_high
            ).tolist()
            statistics.means.add(names.CLIP_LOW_FRAC, clipped[0], num_tokens)
            statistics.means.add(names.CLIP_HIGH_FRAC, clipped[1], num_tokens)
            if loss.delta is not None:
                bounded = (ratio > loss.delta) & (_per_token(fixed.advantages) < 0) & mask
                statistics.means.add(names.CLIP_DELTA_FRAC, float(bounded.sum()), num_tokens)
        elif isinstance(loss, CispoLossConfig):  # truncated, not silenced: on either side of the advantage
            ratio = policy_ratio(forward.logprobs, fixed.old_logprobs, mask)
            statistics.means.add(names.CLIP_HIGH_FRAC, float(((ratio > loss.max_ratio) & mask).sum()), num_tokens)


def _record_sampler(statistics: WindowStatistics, work: MicroBatchWork, fixed: _Fixed) -> None:
    """What engine and trainer disagree about; looked at once, under the weights that sampled."""
    batch, mask = work.batch, work.batch.completion_mask
    statistics.sampler_gaps.append(ratio_tails(fixed.old_logprobs, batch.sampler_logprobs, mask).cpu())
    statistics.num_forced += work.replay.num_forced
    if fixed.correction is not None:
        weights = fixed.correction[mask]
        statistics.means.add(names.CORRECTION_WEIGHT_MEAN, float(weights.sum()), batch.num_tokens)
        statistics.means.add(names.CORRECTION_MASKED_FRAC, float((weights == 0).sum()), batch.num_tokens)


def loss_arguments(update: UpdateConfig) -> dict[str, Any]:
    """The numbers of `loss_coefficients` that a recipe's `update.loss` names; none for a loss of one's own."""
    loss = update.loss
    if isinstance(loss, CustomLossConfig):
        return {}
    arguments = {**loss.model_dump(exclude={"type"}), "variant": loss.type}
    assert isinstance(loss, ClippedLossConfig | CispoLossConfig | SapoLossConfig)
    return arguments


def reduction_of(update: UpdateConfig) -> Reduction:
    """What the sum of token losses is divided by."""
    return update.loss.reduction if isinstance(update.loss, CustomLossConfig) else REDUCTIONS[update.loss.type]


def kl_weights(is_scored: Tensor, weights: Tensor, objectives: tuple[str, ...], betas: Mapping[str, float]) -> Tensor:
    """[B, O] w_o * beta_o where objective o scored the row, else 0; their sum weighs the row's KL term (FORMULAS 4)."""
    per_objective = weights * torch.tensor([betas[name] for name in objectives], device=weights.device)  # [O]
    return is_scored * per_objective


def _per_token(values: Tensor) -> Tensor:
    """[B] -> [B, 1]; [B, T] as it is."""
    return values[:, None] if values.dim() == 1 else values
