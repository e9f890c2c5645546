"""What the checks of `grpo verify` look at: a run's parts, a scored batch, and its loss micro-batch by micro-batch.

Whatever a check does to the weights or the optimizer's state is undone here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo.batching import TrainBatch, build_batch, teaches_something
from grpo.config import RunConfig
from grpo.run_parts import RunParts
from grpo.types import ScoredGroup, Verdict
from grpo.update.forward import replay_of
from grpo.update.statistics import WindowStatistics
from grpo.update.step import Updater
from grpo.update.window_loss import MicroBatchWork, Weighing, WindowLoss

NUM_TEACHING = 2
"""Groups that go through the model: enough for several micro-batches and two objectives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A run before its first step, with what it sampled."""

    config: RunConfig
    parts: RunParts
    groups: tuple[ScoredGroup, ...]
    """[P] of the first step's prompts, scored."""
    teaching: tuple[ScoredGroup, ...]
    """At most NUM_TEACHING whose scores differ; groups with made-up scores where none does."""
    has_made_up_scores: bool

    def batch(
        self,
        groups: Sequence[ScoredGroup],
        *,
        micro_batch_tokens: int | None = None,
        objectives: Sequence[str] = (),
        keeps_truncated: bool = False,
    ) -> TrainBatch:
        """The batch that the trainer would build of them.

        Args:
            micro_batch_tokens: the recipe's where None.
            objectives: these only; all where empty.
            keeps_truncated: whatever the recipe makes of completions that were cut.
        """
        update = self.config.update
        names = objectives or tuple(self.config.objectives)
        return build_batch(
            groups,
            {name: self.config.objectives[name].weight for name in names},
            combine=update.combine,
            scale=update.score_scale,
            micro_batch_tokens=micro_batch_tokens or update.micro_batch_tokens,
            max_new_tokens=self.config.rollout.max_new_tokens,
            truncated=None if keeps_truncated else update.truncated,
            images=self.parts.images_of(groups),
        )

    def losses(self, batch: TrainBatch) -> list[Callable[[], Tensor]]:
        """Each micro-batch's part of the window's loss, as often as it is called, under the weights of that time.

        The old policy is the one of a micro-batch's first call.
        """
        window_loss = WindowLoss(
            self.parts.policy,
            observed={name: one.beta.observed for name, one in self.config.objectives.items()},
            params=self.parts.params,
            update=self.config.update,
        )
        updater = self.parts.updater
        weighing = Weighing(
            num_tokens=batch.num_tokens,
            num_rows=batch.num_rows,
            betas={name: controller.value for name, controller in updater.controllers.items()},
            entropy_coefficient=updater.entropy_bonus.value if updater.entropy_bonus else 0.0,
        )

        def loss_of(work: MicroBatchWork) -> Callable[[], Tensor]:
            def loss() -> Tensor:
                parts = window_loss.parts(work, batch, weighing, WindowStatistics())
                return torch.stack([part for _, part in parts]).sum()

            return loss

        device = self.parts.policy.device
        own = [micro_batch.to(device) for micro_batch in batch.micro_batches]
        return [loss_of(MicroBatchWork(batch=one, replay=replay_of(one, self.parts.params))) for one in own]


def make_subject(config: RunConfig, parts: RunParts, groups: Sequence[ScoredGroup]) -> Subject:
    """Args: groups: of the first step's prompts, scored."""
    teaching = _one_of_each_objective([group for group in groups if teaches_something(group)])
    made_up = () if teaching else tuple(with_made_up_scores(group) for group in groups[:NUM_TEACHING])
    return Subject(
        config=config,
        parts=parts,
        groups=tuple(groups),
        teaching=(*teaching, *made_up),
        has_made_up_scores=not teaching,
    )


def _one_of_each_objective(groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    chosen: list[ScoredGroup] = []
    for group in groups:
        seen = {name for other in chosen for name in other.rollout.prompt.objectives}
        if len(chosen) < NUM_TEACHING and not seen.issuperset(group.rollout.prompt.objectives):
            chosen.append(group)
    others = [group for group in groups if group not in chosen]
    return [*chosen, *others[: NUM_TEACHING - len(chosen)]]


def with_made_up_scores(group: ScoredGroup) -> ScoredGroup:
    """Every second of its different completions is the better one: what is tried out does not depend on the reward."""
    completions = group.rollout.completions
    ranks = {token_ids: rank for rank, token_ids in enumerate(sorted({one.token_ids for one in completions}))}
    verdicts = tuple(
        {name: Verdict(value=float(ranks[one.token_ids] % 2), parts={}) for name in group.rollout.prompt.objectives}
        for one in completions
    )
    return replace(group, verdicts=verdicts)


@contextlib.contextmanager
def undone(updater: Updater) -> Iterator[None]:
    """Steps within the block leave no trace: not in weights, optimizer, betas or the entropy bonus, to the bit."""
    assert not updater.optimizer.state, "only before a run's first step"
    parameters = updater.policy.trainable_parameters()
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    states = {name: controller.state_dict() for name, controller in updater.controllers.items()}
    bonus = updater.entropy_bonus.state_dict() if updater.entropy_bonus else None
    rates = [group["lr"] for group in updater.optimizer.param_groups]
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
                parameter.grad = gradients[name]
        updater.optimizer.state.clear()
        updater.non_finite_in_a_row = 0
        for group, rate in zip(updater.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for name, controller in updater.controllers.items():
            controller.load_state_dict(states[name])
        if updater.entropy_bonus is not None and bonus is not None:
            updater.entropy_bonus.load_state_dict(bonus)
