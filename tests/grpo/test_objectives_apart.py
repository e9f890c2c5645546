"""Objectives' gradients taken apart (FORMULAS 7): their sum is the plain gradient, and each window is combined once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from builders import END, make_batch, make_group, make_policy, make_prompt
from torch import Tensor

from grpo.batching import MicroBatch, TrainBatch
from grpo.config import OptimConfig, UpdateConfig
from grpo.rollout.base import SamplingParams
from grpo.runtime.policy import Policy
from grpo.types import ScoredGroup
from grpo.update.beta import FixedBeta
from grpo.update.entropy import EntropyBonus, FixedEntropyBonus
from grpo.update.gradients import combine_gradients
from grpo.update.step import Updater, UpdateStats

Method = Literal["sum", "pcgrad", "cagrad", "mgda"]

PARAMS = SamplingParams(end_token_ids=(END,), max_new_tokens=16)
WEIGHTS = {"a": 1.0, "b": 0.8, "c": 0.5}
BETAS = {"a": 0.3, "b": 0.6, "c": 0.1}
VARIANTS = ("dapo", "grpo", "bnpo", "dr_grpo", "gspo", "cispo", "sapo")


def separate_groups() -> list[ScoredGroup]:
    """Each objective has prompts of its own."""
    return [
        make_group([{"a": 1.0}, {"a": 0.0}, {"a": 0.5}], lengths=[5, 3, 8], seed=1),
        make_group([{"b": 0.0}, {"b": 1.0}, {"b": None}], lengths=[2, 6, 4], seed=2),
    ]


def shared_groups() -> list[ScoredGroup]:
    """Both score the same rows and disagree; in the first group they cancel, and one row misses a verdict."""
    both = ("a", "b")
    return [
        make_group(
            [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}],
            lengths=[4, 6],
            prompt=make_prompt("cancels", objectives=both),
            seed=3,
        ),
        make_group(
            [{"a": 1.0, "b": 0.2}, {"a": 0.0, "b": 0.1}, {"a": 0.3, "b": 0.9}, {"a": 0.9, "b": None}],
            lengths=[3, 7, 5, 2],
            prompt=make_prompt("shared", objectives=both),
            prompt_length=3,
            seed=4,
        ),
    ]


def three_objectives() -> list[ScoredGroup]:
    names = ("a", "b", "c")
    scores: list[dict[str, float | None]] = [
        {"a": 1.0, "b": 0.0, "c": 0.2},
        {"a": 0.0, "b": 1.0, "c": 0.1},
        {"a": 0.3, "b": 0.4, "c": 1.0},
    ]
    return [
        make_group(scores, lengths=[4, 6, 3], prompt=make_prompt("three", objectives=names), seed=5),
        *separate_groups(),
    ]


GROUPS: dict[str, list[ScoredGroup]] = {
    "separate rows": separate_groups(),
    "shared rows": shared_groups(),
    "both": [*separate_groups(), *shared_groups()],
}


def update_of(loss: str = "dapo", **options: Any) -> UpdateConfig:
    return UpdateConfig.model_validate({"loss": {"type": loss}, **options})


def window_of(groups: Sequence[ScoredGroup], update: UpdateConfig, *, budget: int = 8192) -> TrainBatch:
    weights = {name: WEIGHTS[name] for name in WEIGHTS if any(name in g.rollout.prompt.objectives for g in groups)}
    return make_batch(groups, weights=weights, budget=budget, combine=update.combine, scale=update.score_scale)


def moved_policy(model_dir: Path) -> Policy:
    """Away from its reference, so that every KL term pulls."""
    policy = make_policy(model_dir)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return policy


def make_apart_updater(
    policy: Policy,
    batch: TrainBatch,
    update: UpdateConfig,
    *,
    betas: Mapping[str, float] = BETAS,
    bonus: EntropyBonus | None = None,
) -> Updater:
    return Updater(
        policy,
        {name: FixedBeta(value=betas[name]) for name in batch.objectives},
        observed=dict.fromkeys(batch.objectives, "k3"),
        params=PARAMS,
        update=update,
        optim=OptimConfig(learning_rate=1e-2, eps=1e-3, max_grad_norm=1e9),
        entropy_bonus=bonus,
    )


def flat_gradient(policy: Policy) -> Tensor:
    return torch.cat([p.grad.flatten() for p in policy.trainable_parameters().values() if p.grad is not None])


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def gradients_of(updater: Updater, batch: TrainBatch, *, seed: int = 0) -> tuple[list[Tensor], UpdateStats]:
    """The gradient that each optimizer step of one update was taken with."""
    found: list[Tensor] = []
    handle = updater.optimizer.register_step_pre_hook(lambda *_: found.append(flat_gradient(updater.policy)))
    stats = updater.step(batch, seed=seed)
    handle.remove()
    return found, stats


def share_alone(batch: TrainBatch, o: int) -> TrainBatch:
    """The same rows and denominators, with objective o's share for an advantage and the other shares gone."""

    def alone(micro: MicroBatch) -> MicroBatch:
        only = torch.zeros_like(micro.shares)
        only[:, o] = micro.shares[:, o]
        return replace(micro, advantages=micro.shares[:, o].clone(), shares=only)

    return replace(batch, micro_batches=tuple(alone(micro) for micro in batch.micro_batches))


def separate_gradients(
    model_dir: Path, batch: TrainBatch, update: UpdateConfig, *, coefficient: float = 0.0
) -> tuple[Tensor, Tensor]:
    """[O, D] each objective's window gradient and [D] that of the entropy bonus, by plain updates without the others.

    In a first window every ratio is 1, so nothing is clipped and the sign of the advantage decides nothing.
    """
    plain = update.model_copy(update={"gradients": UpdateConfig().gradients, "iterations": 1})

    def gradient(part: TrainBatch, betas: Mapping[str, float], bonus: EntropyBonus | None = None) -> Tensor:
        updater = make_apart_updater(moved_policy(model_dir), part, plain, betas=betas, bonus=bonus)
        return gradients_of(updater, part)[0][0]

    rows = [
        gradient(share_alone(batch, o), {other: BETAS[other] * (other == name) for other in batch.objectives})
        for o, name in enumerate(batch.objectives)
    ]
    silent = replace(
        batch,
        micro_batches=tuple(
            replace(m, advantages=torch.zeros_like(m.advantages), shares=torch.zeros_like(m.shares))
            for m in batch.micro_batches
        ),
    )
    none = dict.fromkeys(batch.objectives, 0.0)
    bonus = FixedEntropyBonus(coefficient=coefficient)
    return torch.stack(rows), gradient(silent, none, bonus)


@pytest.mark.parametrize("rows", GROUPS)
@pytest.mark.parametrize(
    ("variant", "combine", "kl"),
    [
        ("dapo", "decoupled", {"estimator": "k3"}),
        ("grpo", "summed", {"estimator": "clamped"}),
        ("dr_grpo", "decoupled", {"estimator": "k1", "kl_in": "reward"}),
        ("gspo", "decoupled", {"estimator": "k2"}),
        ("cispo", "summed", {"estimator": "k3", "kl_correction": "ratio"}),
        ("sapo", "decoupled", {"estimator": "abs"}),
    ],
)
def test_the_objectives_gradients_add_up_to_the_plain_one_in_both_windows(
    tiny_model_dir: Path, rows: str, variant: str, combine: str, kl: dict[str, str]
) -> None:
    found: list[list[Tensor]] = []
    stats: list[UpdateStats] = []
    for cosine_every in (0, 1):
        update = update_of(
            variant, combine=combine, kl=kl, iterations=2, gradients={"method": "sum", "cosine_every": cosine_every}
        )
        batch = window_of(GROUPS[rows], update, budget=40)
        bonus = FixedEntropyBonus(coefficient=0.1)
        windows, said = gradients_of(
            make_apart_updater(moved_policy(tiny_model_dir), batch, update, bonus=bonus), batch
        )
        found.append(windows)
        stats.append(said)
    plain, apart = found
    assert len(batch.micro_batches) > 1
    assert relative(apart[0], plain[0]) < 1e-6
    assert relative(apart[1], plain[1]) < 5e-6  # after one optimizer step of its own
    assert (stats[0].cosines, stats[0].gradient_norms) == ({}, {})
    assert set(stats[1].cosines) == {("a", "b")}
    assert stats[1].means == pytest.approx(dict(stats[0].means), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_objectives_gradient_is_that_of_a_plain_update_without_the_others(
    tiny_model_dir: Path, variant: str
) -> None:
    update = update_of(variant, gradients={"method": "sum", "cosine_every": 1})
    batch = window_of(GROUPS["both"], update, budget=40)
    rows, _ = separate_gradients(tiny_model_dir, batch, update)
    (got,), stats = gradients_of(make_apart_updater(moved_policy(tiny_model_dir), batch, update), batch)
    assert relative(got, rows.sum(dim=0)) < 2e-6
    assert stats.gradient_norms == pytest.approx({"a": float(rows[0].norm()), "b": float(rows[1].norm())}, rel=1e-5)
    cosine = float(torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0))
    assert stats.cosines == {("a", "b"): pytest.approx(cosine, abs=1e-5)}


@pytest.mark.parametrize("method", ["pcgrad", "cagrad", "mgda"])
@pytest.mark.parametrize("budget", [8192, 40, 1])
def test_the_gradient_is_the_methods_combination_of_the_separately_computed_ones(
    tiny_model_dir: Path, method: Method, budget: int
) -> None:
    update = update_of("dapo", kl={"estimator": "k3"}, gradients={"method": method})
    batch = window_of(GROUPS["shared rows"], update, budget=budget)
    rows, entropy = separate_gradients(tiny_model_dir, batch, update, coefficient=1.0)
    assert float(rows[0] @ rows[1]) < 0  # they conflict, so every method has something to do
    bonus = FixedEntropyBonus(coefficient=1.0)
    (got,), _ = gradients_of(make_apart_updater(moved_policy(tiny_model_dir), batch, update, bonus=bonus), batch)
    expected = combine_gradients(rows, method=method) + entropy
    assert relative(got, expected) < 1e-5
    assert relative(rows.sum(dim=0) + entropy, expected) > 1e-2  # not the plain sum
    # the entropy belongs to no objective: it is added after the combination, not to each gradient before it
    assert relative(combine_gradients(rows + entropy / 2, method=method), expected) > 1e-3


@pytest.mark.parametrize("method", ["pcgrad", "cagrad", "mgda"])
def test_three_objectives_are_combined_with_the_steps_own_order(tiny_model_dir: Path, method: Method) -> None:
    update = update_of("grpo", gradients={"method": method})
    batch = window_of(three_objectives(), update, budget=40)
    assert batch.objectives == ("a", "b", "c")
    rows, _ = separate_gradients(tiny_model_dir, batch, update)
    (got,), stats = gradients_of(make_apart_updater(moved_policy(tiny_model_dir), batch, update), batch, seed=7)
    assert relative(got, combine_gradients(rows, method=method, seed=7)) < 1e-5
    assert set(stats.cosines) == {("a", "b"), ("a", "c"), ("b", "c")}


@pytest.mark.parametrize("method", ["pcgrad", "cagrad", "mgda"])
def test_combining_each_micro_batch_would_have_given_another_gradient(tiny_model_dir: Path, method: Method) -> None:
    update = update_of("dapo", gradients={"method": method})
    batch = window_of(GROUPS["both"], update, budget=40)
    assert len({micro.num_tokens for micro in batch.micro_batches}) > 1  # uneven
    (got,), _ = gradients_of(make_apart_updater(moved_policy(tiny_model_dir), batch, update), batch)
    each = [
        separate_gradients(tiny_model_dir, replace(batch, micro_batches=(micro,)), update)[0]
        for micro in batch.micro_batches
    ]  # the denominators stay the window's
    assert relative(combine_gradients(torch.stack(each).sum(dim=0), method=method), got) < 1e-5
    wrong = torch.stack([combine_gradients(rows, method=method) for rows in each]).sum(dim=0)
    assert relative(wrong, got) > 1e-2


@pytest.mark.parametrize("method", ["sum", "pcgrad", "cagrad", "mgda"])
def test_rows_whose_shares_cancel_still_give_each_objective_its_gradient(tiny_model_dir: Path, method: Method) -> None:
    """On such rows `combined` is 0: whoever skipped them would see no gradient at all."""
    update = update_of("dapo", kl={"estimator": "k3"}, gradients={"method": method, "cosine_every": 1})
    equal = {"a": 1.0, "b": 1.0}
    # in summed mode the sum is flat and is taken as such; decoupled, each objective keeps its own advantage
    batch = make_batch([shared_groups()[0], separate_groups()[0]], weights=equal)
    cancelling = torch.cat([m.advantages[(m.shares != 0).all(dim=1)] for m in batch.micro_batches])
    assert cancelling.tolist() == [0.0, 0.0]
    _, stats = gradients_of(make_apart_updater(moved_policy(tiny_model_dir), batch, update), batch)
    without = make_batch([separate_groups()[0]], weights=equal)
    assert stats.gradient_norms["b"] > 0
    assert sum(float((m.shares[:, 1] != 0).sum()) for m in without.micro_batches) == 0


def test_the_cosines_are_taken_every_so_many_steps(tiny_model_dir: Path) -> None:
    update = update_of("dapo", gradients={"method": "sum", "cosine_every": 3})
    batch = window_of(GROUPS["both"], update)
    updater = make_apart_updater(moved_policy(tiny_model_dir), batch, update)
    assert [bool(updater.step(batch, step=step).cosines) for step in range(5)] == [True, False, False, True, False]


def test_one_objective_is_never_taken_apart(tiny_model_dir: Path) -> None:
    update = update_of("dapo", gradients={"method": "pcgrad", "cosine_every": 1})
    batch = window_of([separate_groups()[0]], update)
    got, stats = gradients_of(make_apart_updater(moved_policy(tiny_model_dir), batch, update), batch)
    plain = update_of("dapo")
    expected, _ = gradients_of(make_apart_updater(moved_policy(tiny_model_dir), batch, plain), batch)
    assert torch.equal(got[0], expected[0])
    assert stats.cosines == {}


@pytest.mark.parametrize("method", ["sum", "pcgrad", "cagrad", "mgda"])
def test_the_combined_gradient_is_clipped_once_after_the_combination(tiny_model_dir: Path, method: Method) -> None:
    update = update_of("dapo", gradients={"method": method, "cosine_every": 1})
    batch = window_of(GROUPS["both"], update)
    (free,), _ = gradients_of(make_apart_updater(moved_policy(tiny_model_dir), batch, update), batch)
    limit = float(free.norm()) / 4
    policy = moved_policy(tiny_model_dir)
    updater = Updater(
        policy,
        {name: FixedBeta(value=BETAS[name]) for name in batch.objectives},
        observed=dict.fromkeys(batch.objectives, "k3"),
        params=PARAMS,
        update=update,
        optim=OptimConfig(learning_rate=1e-2, max_grad_norm=limit),
    )
    (clipped,), stats = gradients_of(updater, batch)
    assert stats.grad_norm == pytest.approx(4 * limit, rel=1e-5)
    assert relative(clipped, free / 4) < 1e-5
