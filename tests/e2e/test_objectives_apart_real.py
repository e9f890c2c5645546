"""Objectives apart on the real 135M LoRA model: each method's `.grad`, and the sum, over uneven micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from builders import make_batch, make_group, make_policy, make_prompt, make_updater
from rank_processes import RankPair
from torch import Tensor

from grpo.batching import TrainBatch
from grpo.config import UpdateConfig
from grpo.runtime.distributed import Ranks
from grpo.runtime.policy import Policy
from grpo.update.gradients import combine_gradients

pytestmark = pytest.mark.long

METHODS: tuple[Literal["pcgrad", "cagrad", "mgda"], ...] = ("pcgrad", "cagrad", "mgda")


@pytest.fixture(scope="module")
def policy(smollm_dir: Path) -> Policy:
    return adapted(smollm_dir)


def adapted(model_dir: Path) -> Policy:
    """In float32, with an adapter that is away from its reference."""
    policy = make_policy(model_dir)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    return policy


def window(own: Sequence[int] | None = None) -> TrainBatch:
    names = ("fairness", "grounding")
    groups = [
        make_group(
            [{"fairness": 1.0, "grounding": 0.1}, {"fairness": 0.0, "grounding": 0.9}],
            lengths=[7, 4],
            prompt=make_prompt("shared", objectives=names),
            prompt_length=8,
            seed=1,
        ),
        make_group([{"grounding": 1.0}, {"grounding": 0.0}], lengths=[3, 2], seed=2),
    ]
    if own is not None:
        return make_batch(groups, budget=30, own=own)
    batch = make_batch(groups, budget=30)
    assert [micro.num_tokens for micro in batch.micro_batches] == [11, 5]  # uneven
    return batch


def gradient(
    policy: Policy, batch: TrainBatch, *, method: Literal["sum", "pcgrad", "cagrad", "mgda"], cosine_every: int = 0
) -> Tensor:
    """[D] of one window; the weights are put back."""
    start = {name: parameter.detach().clone() for name, parameter in policy.trainable_parameters().items()}
    update = UpdateConfig.model_validate({"gradients": {"method": method, "cosine_every": cosine_every}})
    updater = make_updater(policy, objectives=batch.objectives, beta=0.0, update=update, max_grad_norm=1e9)
    assert updater.step(batch).skipped is None
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            parameter.copy_(start[name])
    return torch.cat([p.grad.flatten() for p in policy.trainable_parameters().values() if p.grad is not None])


def test_each_methods_gradient_is_the_function_of_the_separately_computed_ones(policy: Policy) -> None:
    batch = window()

    def alone(o: int) -> TrainBatch:
        micros = tuple(replace(micro, advantages=micro.shares[:, o].clone()) for micro in batch.micro_batches)
        return replace(batch, micro_batches=micros)

    rows = torch.stack([gradient(policy, alone(o), method="sum") for o in range(2)])
    assert float(rows[0] @ rows[1]) < 0
    plain = gradient(policy, batch, method="sum")
    apart = gradient(policy, batch, method="sum", cosine_every=1)
    # float32 through 30 layers, and what conflicts cancels in the sum: 3e-6 here, 1e-6 holds on the tiny model
    assert float((apart - plain).norm() / plain.norm()) < 1e-5
    for method in METHODS:
        expected = combine_gradients(rows, method=method)
        got = gradient(policy, batch, method=method)
        assert float((got - expected).norm() / expected.norm()) < 1e-5


def gradients_of_this_rank(model_dir: Path) -> list[Tensor]:
    """Each method's `.grad`, of a window whose larger group is rank 0's and whose smaller one is rank 1's."""
    policy, own = adapted(model_dir), Ranks(use_cpu=True).own(range(2))
    return [gradient(policy, window(own), method=method) for method in METHODS]


def test_two_ranks_with_uneven_shares_come_to_one_processs_gradient(
    policy: Policy, smollm_dir: Path, tmp_path: Path
) -> None:
    with RankPair(tmp_path) as ranks:
        first, second = ranks.run(gradients_of_this_rank, smollm_dir)
    for method, one, other in zip(METHODS, first, second, strict=True):
        expected = gradient(policy, window(), method=method)
        assert torch.equal(one, other)
        assert float((one - expected).norm() / expected.norm()) < 1e-5
