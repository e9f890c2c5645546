"""What a window's micro-batches say about themselves, as sums that add up over micro-batches, windows and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo.batching import MicroBatch
from grpo.metrics import KL_CLAMPED_FRAC, KL_LOSS, POLICY_LOSS, MeanAccumulator, kl_name, kl_penalty_name
from grpo.runtime.distributed import Ranks
from grpo.update.kl import kl_penalty

OBSERVED_KL_LIMIT = 10.0
"""A token counts with at most so many nats of k3 in what a controller sees: one bad token must not multiply beta."""


@dataclass(slots=True)
class WindowStatistics:
    """Sums over micro-batches; `merged` adds the ranks' together."""

    means: MeanAccumulator = field(default_factory=MeanAccumulator)
    """Metric name -> (sum, count)."""
    observed: MeanAccumulator = field(default_factory=MeanAccumulator)
    """Objective -> the KL that its controller looks at."""
    num_scored_rows: dict[str, int] = field(default_factory=dict)
    """Objective -> rows it scored."""
    kl_max: dict[str, float] = field(default_factory=dict)
    """Objective -> largest per-token k3."""
    sampler_gaps: list[Tensor] = field(default_factory=list)
    """[N] each: |log(policy before the step / sampler)| of loss tokens."""
    num_forced: int = 0
    """Sampled tokens that the replayed filter would have dropped."""

    def add_kl(
        self,
        batch: MicroBatch,
        objectives: Sequence[str],
        difference: Tensor,
        penalty: Tensor,
        *,
        max_log_ratio: float,
        observes: Mapping[str, str],
    ) -> None:
        """Args: difference: [B, T] policy - reference; penalty: [B, T] what the loss uses; observes: objective ->
        "k3" or "penalty"."""
        mask = batch.completion_mask
        zeros = torch.zeros_like(difference)
        k3 = kl_penalty(difference, zeros, estimator="k3", max_log_ratio=max_log_ratio, mask=mask)  # [B, T]
        is_clamped = mask & (difference.abs() > max_log_ratio)
        self.means.add(KL_CLAMPED_FRAC, float(is_clamped.sum()), batch.num_tokens)
        for o, name in enumerate(objectives):
            own = mask & batch.is_scored[:, o, None]  # [B, T]
            count = int(own.sum())
            if not count:
                continue
            self.means.add(kl_name(name), float(k3[own].sum()), count)
            self.means.add(kl_penalty_name(name), float(penalty[own].sum()), count)
            seen = penalty if observes[name] == "penalty" else k3.clamp(max=OBSERVED_KL_LIMIT)
            self.observed.add(name, float(seen[own].sum()), count)
            self.kl_max[name] = max(self.kl_max.get(name, 0.0), float(k3[own].max()))
            self.num_scored_rows[name] = self.num_scored_rows.get(name, 0) + int(batch.is_scored[:, o].sum())

    def add_idle(self, num_tokens: int) -> None:
        """Loss tokens whose losses are known to be 0. Of all else that is counted here, they say nothing."""
        for name in (POLICY_LOSS, KL_LOSS):
            self.means.add(name, 0.0, num_tokens)

    def merged(self, ranks: Ranks) -> WindowStatistics:
        """The statistics of all ranks together, the same on each."""
        if ranks.count == 1:
            return self
        whole = WindowStatistics()
        for part in ranks.gather([self]):
            whole.include(part)
        return whole

    def include(self, part: WindowStatistics) -> None:
        """Add those of another rank or window."""
        self.means.merge(part.means.totals())
        self.observed.merge(part.observed.totals())
        self.sampler_gaps += part.sampler_gaps
        self.num_forced += part.num_forced
        for name, value in part.kl_max.items():
            self.kl_max[name] = max(self.kl_max.get(name, 0.0), value)
        for name, count in part.num_scored_rows.items():
            self.num_scored_rows[name] = self.num_scored_rows.get(name, 0) + count

    def sampler_ratio(self, quantile: float) -> float | None:
        """That quantile of the ratio, either way, between policy and sampler: 1 where both agree, None where no token
        was seen."""
        gaps = torch.cat(self.sampler_gaps) if self.sampler_gaps else torch.zeros(0)
        if not gaps.numel():
            return None
        return float(gaps.sort().values[int(quantile * (gaps.numel() - 1))].exp())
