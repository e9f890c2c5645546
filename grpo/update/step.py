"""TrainBatch -> optimizer steps and their UpdateStats. Owns the optimizer and its order of events."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo import metrics as names
from grpo.batching import TrainBatch
from grpo.config import CustomLossConfig, OptimConfig, UpdateConfig
from grpo.phases import Announce, silent
from grpo.rollout.base import SamplingParams
from grpo.runtime.devices import check_offload
from grpo.runtime.distributed import Ranks
from grpo.runtime.optim import build_optimizer, learning_rate_at, offload_states, set_learning_rate
from grpo.runtime.out_of_memory import cause_of, is_out_of_memory
from grpo.runtime.policy import Policy, dropout_off
from grpo.update.beta import BetaController, FixedBeta
from grpo.update.combination import named_cosines, named_norms
from grpo.update.entropy import EntropyBonus
from grpo.update.forward import replay_of, try_prompt_sharing
from grpo.update.gradients import GradientWindow
from grpo.update.host_memory import PinnedHost
from grpo.update.non_finite import NOWHERE, first_non_finite_module
from grpo.update.out_of_memory import Shortage, halved_budget
from grpo.update.statistics import WindowStatistics
from grpo.update.window_loss import MicroBatchWork, Weighing, WindowLoss

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFiniteStep:
    """Why a step was skipped. The parameters are as they were before the window in which it happened."""

    cause: str
    """What was not finite, and the first module that made it so."""
    micro_batch: int | None
    """Place of the one at fault in this rank's batch; None where it was another's, or only the summed gradient's."""
    in_a_row: int
    """Steps skipped without a good one in between, this one included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStats:
    """What the windows over one batch did; over all ranks."""

    means: Mapping[str, float]
    """Metric name -> mean over the loss tokens, or over the objective's; absent where nothing counted."""
    grad_norm: float | None
    """Of the last window's gradient, before clipping; None where it was not finite."""
    learning_rate: float
    """That the steps were taken with."""
    sampler_ratio_p99: float | None
    """99th percentile of the ratio between policy and sampler, either way, before any truncation; None where the first
    window was skipped."""
    sampler_ratio_max: float | None
    """The largest."""
    kl_max: Mapping[str, float]
    """Objective -> largest per-token k3."""
    betas: Mapping[str, float]
    """Objective -> the beta that the first window used."""
    entropy_coefficient: float | None
    """That the first window used; None without a bonus."""
    num_tokens: int
    """Loss tokens of the batch."""
    num_forced: int
    """Sampled tokens that the replayed filter would have dropped."""
    num_idle_tokens: int = 0
    """Of the loss tokens: those of idle rows. No pass was spent on them, so that entropy, KL, ratios and the sampler's
    figures are means over the others; the losses are over all."""
    cosines: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Pair of objectives -> cosine of their gradients, where they were taken apart."""
    gradient_norms: Mapping[str, float] = field(default_factory=dict)
    """Objective -> norm of its gradient, where they were taken apart."""
    skipped: NonFiniteStep | None = None
    num_halvings: int = 0
    """Times that the micro-batches were halved for want of memory, and the window redone."""
    shortage: str = ""
    """The allocator's message at the last of them; empty without one."""
    micro_batch_tokens: int | None = None
    """Budget that the next batch should be cut by; None where no window was taken."""


class Updater:
    """Takes optimizer steps. Owns the optimizer, the window's gradient, the beta controllers and the entropy bonus."""

    def __init__(
        self,
        policy: Policy,
        controllers: Mapping[str, BetaController],
        *,
        observed: Mapping[str, str],
        params: SamplingParams,
        update: UpdateConfig,
        optim: OptimConfig,
        entropy_bonus: EntropyBonus | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Args: observed: objective -> "k3" or "penalty", what its controller looks at; params: the sampling law;
        ranks: this process alone where None."""
        self.policy = policy
        self.controllers = dict(controllers)
        self.entropy_bonus = entropy_bonus
        self.non_finite_in_a_row = 0
        self.micro_batch_tokens = update.micro_batch_tokens
        """Budget of a micro-batch: the recipe's, or what was left of it when memory ran out."""
        self.recipe_budget = update.micro_batch_tokens
        self._num_halvings, self._shortage = 0, ""
        self._update, self._optim, self._params = update, optim, params
        self._ranks = ranks or Ranks(use_cpu=policy.device.type == "cpu")
        check_offload(policy.device, update_offload=update.offload, optim_offload=optim.offload)
        host = PinnedHost(policy.device) if update.offload == "activations" else None
        self._loss = WindowLoss(policy, observed=observed, params=params, update=update, host=host)
        parameters = policy.trainable_parameters()
        self.gradients = GradientWindow(parameters)
        self.optimizer = build_optimizer(parameters, optim)
        if optim.offload == "states":
            offload_states(self.optimizer)

    @property
    def idle_when_flat(self) -> frozenset[str]:
        """Objectives that give a group without differences no gradient: no KL, no entropy, no loss of one's own. For
        `build_batch`, which spends no pass on such groups. A beta or a bonus that moves may be 0 only for now."""
        if self.entropy_bonus is not None or isinstance(self._update.loss, CustomLossConfig):
            return frozenset()
        fixed = {name: each.value for name, each in self.controllers.items() if isinstance(each, FixedBeta)}
        return frozenset(name for name, beta in fixed.items() if beta == 0)

    def step(
        self, batch: TrainBatch, *, step: int = 0, steps: int = 1, seed: int = 0, announce: Announce = silent
    ) -> UpdateStats:
        """mu windows over one batch; in each: zero once, add every micro-batch's gradient, clip once, step once.

        A loss or gradient that is not finite on any rank ends the windows before the optimizer steps. Where a rank has
        no memory for a micro-batch, the window is redone on all of them with half the budget: the same gradient.

        Args:
            step: number of the step, from 0; of `steps`. What the learning-rate schedule goes by.
            seed: of the orders in which PCGrad projects; another in each step.
            announce: is told when the backward passes and when the optimizer's own step begin.
        Raises:
            ValueError: no rank has a loss token.
            OutOfMemory: the smallest micro-batches do not fit either.
        """
        self._num_halvings, self._shortage = 0, ""
        statistics = WindowStatistics()
        betas = {name: controller.value for name, controller in self.controllers.items()}
        coefficient = self.entropy_bonus.value if self.entropy_bonus else None
        # the denominators, before any backward pass
        counts = (batch.num_tokens, batch.num_rows, batch.num_idle_tokens)
        num_tokens, num_rows, num_idle_tokens = (int(self._ranks.sum(count)) for count in counts)
        if num_tokens == 0:
            raise ValueError("a batch without a loss token on any rank: there is nothing to step on")
        work = self._work(batch)
        learning_rate = learning_rate_at(self._optim, step=step, steps=steps)
        set_learning_rate(self.optimizer, learning_rate)
        is_apart = self._takes_objectives_apart(step, batch.objectives)
        gram: Tensor | None = None
        grad_norm: float | None = None
        skipped: NonFiniteStep | None = None
        with dropout_off(self.policy.model):
            self._try_prompt_sharing(work)
            for iteration in range(self._update.iterations):
                announce("backward")
                weighing = self._weighing(num_tokens, num_rows)
                work, window, skipped = self._accumulate_in_memory(work, batch, weighing, is_apart=is_apart)
                if skipped is None:
                    self.gradients.reduce(self._ranks.all_reduce)
                    skipped = self._check_gradients(work, batch, weighing)
                if skipped is not None:
                    grad_norm = None
                    break
                if is_apart:
                    gram = self.gradients.combine(self._update.gradients.method, seed=seed + iteration)
                grad_norm = self.gradients.clip(self._optim.max_grad_norm)
                if not math.isfinite(grad_norm):  # the squares overflowed, and clipping made every entry 0
                    skipped, grad_norm = self._overflown(), None
                    break
                announce("optimizer")
                self.optimizer.step()
                window = window.merged(self._ranks)
                self._observe(window)
                statistics.include(window)
        self.non_finite_in_a_row = 0 if skipped is None else skipped.in_a_row
        return UpdateStats(
            means=statistics.means.means(),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            sampler_ratio_p99=statistics.sampler_ratio(0.99),
            sampler_ratio_max=statistics.sampler_ratio(1.0),
            kl_max=statistics.kl_max,
            betas=betas,
            entropy_coefficient=coefficient,
            num_tokens=num_tokens,
            num_forced=statistics.num_forced,
            num_idle_tokens=num_idle_tokens,
            cosines=named_cosines(gram, batch.objectives),
            gradient_norms=named_norms(gram, batch.objectives),
            skipped=skipped,
            num_halvings=self._num_halvings,
            shortage=self._shortage,
            micro_batch_tokens=self.micro_batch_tokens,
        )

    def _try_prompt_sharing(self, work: Sequence[MicroBatchWork]) -> None:
        """On the first batch of a run, before its windows."""
        if self.policy.shares_prompts is not None or not work:
            return
        try:
            obstacle = try_prompt_sharing(self.policy, work[0].batch)
        except (RuntimeError, MemoryError) as exc:
            if not is_out_of_memory(exc):
                raise
            self.policy.shares_prompts = None  # the window's own passes want more, and know what to do
            return
        if obstacle is not None:
            name = type(self.policy.causal_lm).__name__
            logger.warning("%s is given whole rows in the update, each with its prompt: %s", name, obstacle)

    def stand_still(self, *, step: int, steps: int) -> UpdateStats:
        """The figures of a step that takes no window: nothing changes, no controller observes anything."""
        return UpdateStats(
            means={},
            grad_norm=None,
            learning_rate=learning_rate_at(self._optim, step=step, steps=steps),
            sampler_ratio_p99=None,
            sampler_ratio_max=None,
            kl_max={},
            betas={name: controller.value for name, controller in self.controllers.items()},
            entropy_coefficient=self.entropy_bonus.value if self.entropy_bonus else None,
            num_tokens=0,
            num_forced=0,
        )

    def _takes_objectives_apart(self, step: int, objectives: Sequence[str]) -> bool:
        """Whether this step takes a backward pass for each objective: the method needs it, or its cosines are due."""
        gradients = self._update.gradients
        is_due = gradients.cosine_every > 0 and step % gradients.cosine_every == 0
        return len(objectives) > 1 and (gradients.method != "sum" or is_due)

    def _weighing(self, num_tokens: int, num_rows: int) -> Weighing:
        """Denominators and coefficients, constant in a window."""
        return Weighing(
            num_tokens=num_tokens,
            num_rows=num_rows,
            betas={name: controller.value for name, controller in self.controllers.items()},
            entropy_coefficient=self.entropy_bonus.value if self.entropy_bonus else 0.0,
        )

    def _work(self, batch: TrainBatch) -> list[MicroBatchWork]:
        """The batch's micro-batches, where nothing is fixed yet."""
        remembers = self._update.iterations > 1
        return [
            MicroBatchWork(batch=own, replay=replay_of(own, self._params, remembers=remembers), place=place)
            for place, own in enumerate(micro_batch.to(self.policy.device) for micro_batch in batch.micro_batches)
        ]

    def _accumulate_in_memory(
        self, work: list[MicroBatchWork], whole: TrainBatch, weighing: Weighing, *, is_apart: bool
    ) -> tuple[list[MicroBatchWork], WindowStatistics, NonFiniteStep | None]:
        """`_accumulate` until memory suffices, each time in smaller micro-batches: those it came to, and what they say.

        Raises:
            OutOfMemory: no size of them does.
        """
        is_first = all(item.fixed is None for item in work)
        while True:
            window = WindowStatistics()
            window.add_idle(whole.num_idle_tokens)
            self.gradients.start_window(num_objectives=len(whole.objectives) if is_apart else 0)
            outcome = self._accumulate(work, whole, weighing, window, is_apart=is_apart)
            if not isinstance(outcome, list):
                return work, window, outcome
            self.micro_batch_tokens = halved_budget(self.micro_batch_tokens, outcome, num_halvings=self._num_halvings)
            self._num_halvings, self._shortage = self._num_halvings + 1, outcome[0].cause
            # a first window begins anew, for what it records of the sampler is in the statistics that are dropped
            whole_again = self._work(whole) if is_first else work
            remembers = self._update.iterations > 1
            work = [
                part
                for item in whole_again
                for part in item.parts(self.micro_batch_tokens, self._params, remembers=remembers)
            ]
            if self.policy.device.type == "cuda":
                torch.cuda.empty_cache()  # blocks of the larger sizes are of no use to the smaller ones

    def _accumulate(
        self,
        work: Sequence[MicroBatchWork],
        whole: TrainBatch,
        weighing: Weighing,
        window: WindowStatistics,
        *,
        is_apart: bool,
    ) -> NonFiniteStep | list[Shortage] | None:
        """Add every micro-batch's gradient. Where one does not fit into some rank's memory, or a loss is not finite,
        says so on every rank."""
        bad: int | None = None
        shortage: Shortage | None = None
        for place, item in enumerate(work):
            try:
                is_finite = self._add(item, whole, weighing, window, is_apart=is_apart)
            except (RuntimeError, MemoryError) as exc:  # kept no longer than this: it holds on to the tensors
                if not is_out_of_memory(exc):
                    raise
                shortage = Shortage(
                    cause=cause_of(exc),
                    num_rows=len(item.batch.prompt_of_row),
                    largest_tokens=max(each.batch.padded_tokens for each in work),
                )
                break  # the other ranks are told at the window's end
            if not is_finite:
                bad = place
                break
        told = self._ranks.gather([(bad is not None, shortage)])
        shortages = [each for _, each in told if each is not None]
        if shortages or not any(is_bad for is_bad, _ in told):
            return shortages or None
        cause = ""
        if bad is not None:
            found = [self._culprit(work[bad], whole, weighing)]
            if given := work[bad].not_finite():
                found = [f"what it is given: {', '.join(given)}", *(one for one in found if one != NOWHERE)]
            cause = f"the loss of a micro-batch of {work[bad].batch.num_tokens} tokens is not finite; first in "
            cause += "; then in ".join(found)
        causes = [text for text in self._ranks.gather([cause]) if text]
        return NonFiniteStep(
            cause="; ".join(causes),
            micro_batch=None if bad is None else work[bad].place,
            in_a_row=self.non_finite_in_a_row + 1,
        )

    def _add(
        self,
        item: MicroBatchWork,
        whole: TrainBatch,
        weighing: Weighing,
        window: WindowStatistics,
        *,
        is_apart: bool,
    ) -> bool:
        """Add one micro-batch's gradient, unless its loss is not finite; says whether it is."""
        parts = self._loss.parts(item, whole, weighing, window, is_apart=is_apart)
        if not all(bool(torch.isfinite(loss)) for _, loss in parts):
            return False
        for number, (objective, loss) in enumerate(parts):
            self.gradients.add(loss, objective=objective, keep_graph=number + 1 < len(parts))
        return True

    def _check_gradients(
        self, work: Sequence[MicroBatchWork], whole: TrainBatch, weighing: Weighing
    ) -> NonFiniteStep | None:
        name = self.gradients.first_non_finite()  # of the reduced gradient: the same on every rank
        if name is None:
            return None
        found = [(item.place, self._culprit(item, whole, weighing)) for item in work]
        place, module = next((pair for pair in found if pair[1] != NOWHERE), (None, NOWHERE))
        modules = [other for other in self._ranks.gather([module]) if other != NOWHERE]
        return NonFiniteStep(
            cause=f"the gradient of {name} is not finite; first in {modules[0] if modules else NOWHERE}",
            micro_batch=place,
            in_a_row=self.non_finite_in_a_row + 1,
        )

    def _overflown(self) -> NonFiniteStep:
        return NonFiniteStep(
            cause="every entry of the gradient is finite, but its norm is not: they are above 1e19. Look at the scores",
            micro_batch=None,
            in_a_row=self.non_finite_in_a_row + 1,
        )

    def _culprit(self, item: MicroBatchWork, whole: TrainBatch, weighing: Weighing) -> str:
        """The module where a micro-batch's numbers first fail."""

        def again() -> Tensor:
            parts = self._loss.parts(item, whole, weighing, WindowStatistics())
            return torch.stack([loss for _, loss in parts]).sum()

        return first_non_finite_module(self.policy.model, again)

    def _observe(self, window: WindowStatistics) -> None:
        observed = window.observed.means()
        for name, controller in self.controllers.items():
            if name in observed:
                controller.observe(observed[name], rows=window.num_scored_rows[name])
        entropy = window.means.means().get(names.ENTROPY)
        if self.entropy_bonus is not None and entropy is not None:
            self.entropy_bonus.observe(entropy)
