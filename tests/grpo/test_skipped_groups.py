"""Groups that teach nothing: where the loss has the policy's term alone, no pass is spent on them, at no difference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_batch, make_group, make_policy, make_prompt, make_updater
from run_builders import Runs, completions_of, make_objective, metrics_of

from grpo.batching import TrainBatch
from grpo.config import (
    CispoLossConfig,
    ClippedLossConfig,
    CustomLossConfig,
    GradientsConfig,
    KlConfig,
    RolloutCorrectionConfig,
    SapoLossConfig,
    UpdateConfig,
)
from grpo.runtime.policy import Policy
from grpo.types import ScoredGroup
from grpo.update.beta import BandBeta, BetaController, FixedBeta
from grpo.update.entropy import AdaptiveEntropyBonus, EntropyBonus, FixedEntropyBonus
from grpo.update.losses import LossInput, LossOutput
from grpo.update.step import Updater, UpdateStats

GROUPS = [
    make_group([{"a": 1.0}, {"a": 0.0}, {"a": 0.0}], lengths=[3, 7, 2], seed=1),
    make_group([{"a": 1.0}, {"a": 1.0}, {"a": 1.0}], lengths=[9, 4, 6], prompt_length=8, seed=2),
    make_group([{"a": 0.2}, {"a": 0.9}, {"a": None}], lengths=[5, 6, 4], seed=3),
    make_group([{"a": 0.0}, {"a": 0.0}, {"a": None}], lengths=[1, 8, 4], prompt_length=3, seed=4),
]
"""The second and the fourth teach nothing: 19 and 9 of the 51 loss tokens."""
IDLE_TOKENS, NUM_TOKENS = 19 + 9, 12 + 19 + 11 + 9


def own_loss(inputs: LossInput) -> LossOutput:
    """Learns whatever the advantages are."""
    return LossOutput(token_loss=-inputs.logprobs, metrics={})


class Passes:
    """Counts the tokens that go through a policy's model."""

    def __init__(self, policy: Policy) -> None:
        self.num_tokens = 0
        policy.causal_lm.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: object, arguments: Any, named: dict[str, Any]) -> None:
        self.num_tokens += named["input_ids"].numel()


def taken(
    model_dir: Path, groups: Sequence[ScoredGroup], update: UpdateConfig, *, skips: bool
) -> tuple[list[UpdateStats], dict[str, torch.Tensor], int]:
    """Two steps, so that LoRA's A learns too and Adam has moments: what they say, the weights, the tokens computed."""
    policy = make_policy(model_dir)
    updater = make_updater(policy, beta=0.0, update=update)
    policy.shares_prompts = True  # as found out on a run's first batch, by passes of its own
    passes = Passes(policy)
    idle = updater.idle_when_flat if skips else ()
    # one group fits, two do not: the others' padding is the same with and without the flat ones
    batch = make_batch(groups, budget=35, idle_when_flat=idle)
    stats = [updater.step(batch, step=step, steps=2) for step in range(2)]
    return stats, {name: p.detach().clone() for name, p in policy.trainable_parameters().items()}, passes.num_tokens


@pytest.mark.parametrize(
    "update",
    [
        *(UpdateConfig(loss=ClippedLossConfig(type=name)) for name in ("dapo", "grpo", "bnpo", "dr_grpo", "gspo")),
        UpdateConfig(loss=CispoLossConfig(type="cispo")),
        UpdateConfig(loss=SapoLossConfig(type="sapo")),
        UpdateConfig(iterations=2, correction=RolloutCorrectionConfig()),
        UpdateConfig(kl=KlConfig(estimator="k1", kl_in="reward")),
    ],
    ids=["dapo", "grpo", "bnpo", "dr_grpo", "gspo", "cispo", "sapo", "two windows, corrected", "KL in the reward"],
)
def test_without_a_pass_on_flat_groups_the_weights_are_the_same_bit_for_bit(
    tiny_model_dir: Path, update: UpdateConfig
) -> None:
    stats, weights, num_computed = taken(tiny_model_dir, GROUPS, update, skips=True)
    expected, expected_weights, num_all = taken(tiny_model_dir, GROUPS, update, skips=False)
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())
    assert num_computed < 0.6 * num_all  # 28 of 51 loss tokens, and two prompts of four
    for one, other in zip(stats, expected, strict=True):
        assert (one.num_tokens, one.num_idle_tokens) == (NUM_TOKENS, IDLE_TOKENS)
        assert (other.num_tokens, other.num_idle_tokens) == (NUM_TOKENS, 0)
        assert one.grad_norm == other.grad_norm
        for name in ("loss/policy", "loss/kl"):  # over all loss tokens, those without a pass included
            assert one.means[name] == pytest.approx(other.means[name], rel=1e-6, abs=1e-9)


def test_entropy_kl_and_the_samplers_ratios_are_those_of_the_groups_that_were_computed(tiny_model_dir: Path) -> None:
    stats, _, _ = taken(tiny_model_dir, GROUPS, UpdateConfig(), skips=True)
    alone, _, _ = taken(tiny_model_dir, [GROUPS[0], GROUPS[2]], UpdateConfig(), skips=False)
    one, other = stats[0], alone[0]
    for name in ("entropy", "kl/a", "kl/a/penalty", "kl/clamped_frac", "clip/low_frac", "clip/high_frac"):
        assert one.means[name] == pytest.approx(other.means[name], rel=1e-6, abs=1e-9), name
    assert one.sampler_ratio_p99 == other.sampler_ratio_p99
    assert one.sampler_ratio_max == other.sampler_ratio_max


def test_a_step_of_flat_groups_alone_computes_nothing_and_moves_the_weights_by_their_momentum_as_ever(
    tiny_model_dir: Path,
) -> None:
    def after(*, skips: bool) -> tuple[UpdateStats, dict[str, torch.Tensor], int]:
        policy = make_policy(tiny_model_dir)
        updater = make_updater(policy, beta=0.0)
        updater.step(make_batch(GROUPS))
        passes = Passes(policy)
        idle = updater.idle_when_flat if skips else ()
        stats = updater.step(make_batch([GROUPS[1], GROUPS[3]], idle_when_flat=idle))
        return stats, {name: p.detach().clone() for name, p in policy.trainable_parameters().items()}, passes.num_tokens

    stats, weights, num_computed = after(skips=True)
    expected, expected_weights, num_all = after(skips=False)
    assert (num_computed, num_all > 0) == (0, True)
    assert stats.grad_norm == expected.grad_norm == 0.0
    assert stats.means == {"loss/policy": 0.0, "loss/kl": 0.0}
    assert stats.sampler_ratio_p99 is None
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())


def test_gradients_of_objectives_kept_apart_are_the_same_too(tiny_model_dir: Path) -> None:
    both = [
        make_group([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.5}], lengths=[3, 7], seed=1),
        make_group([{"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 0.5}], lengths=[9, 4], seed=2),
    ]

    def step(*, skips: bool) -> UpdateStats:
        updater = make_updater(
            make_policy(tiny_model_dir),
            beta=0.0,
            objectives=("a", "b"),
            update=UpdateConfig(gradients=GradientsConfig(cosine_every=1)),
        )
        return updater.step(make_batch(both, budget=25, idle_when_flat=updater.idle_when_flat if skips else ()))

    one, other = step(skips=True), step(skips=False)
    assert one.num_idle_tokens == 13
    assert (one.cosines, one.gradient_norms, one.grad_norm) == (other.cosines, other.gradient_norms, other.grad_norm)


# When nothing may be skipped


def updater_of(
    model_dir: Path,
    betas: dict[str, BetaController],
    *,
    update: UpdateConfig | None = None,
    bonus: EntropyBonus | None = None,
) -> Updater:
    policy = make_policy(model_dir)
    plain = make_updater(policy, objectives=tuple(betas), update=update, entropy_bonus=bonus)
    plain.controllers = betas
    return plain


def test_a_kl_or_entropy_term_or_a_loss_of_ones_own_needs_every_group(tiny_model_dir: Path) -> None:
    off = FixedBeta(value=0.0)
    band = BandBeta(initial=0.05, low=0.01, high=0.02)
    custom = UpdateConfig(loss=CustomLossConfig(type="custom", path=f"{__name__}:own_loss"))
    resting = AdaptiveEntropyBonus(target=0.1)
    resting.observe(2.0)
    assert resting.value == 0.0  # and looks at the entropy all the same
    assert updater_of(tiny_model_dir, {"a": off}).idle_when_flat == {"a"}
    assert updater_of(tiny_model_dir, {"a": off, "b": FixedBeta(value=0.02)}).idle_when_flat == {"a"}
    assert updater_of(tiny_model_dir, {"a": band}).idle_when_flat == set()
    assert updater_of(tiny_model_dir, {"a": off}, bonus=FixedEntropyBonus(coefficient=0.01)).idle_when_flat == set()
    assert updater_of(tiny_model_dir, {"a": off}, bonus=resting).idle_when_flat == set()
    assert updater_of(tiny_model_dir, {"a": off}, update=custom).idle_when_flat == set()


def rows_in(batch: TrainBatch) -> int:
    return sum(len(micro.prompt_of_row) for micro in batch.micro_batches)


def test_a_group_is_idle_only_where_none_of_its_objectives_has_another_term() -> None:
    flat: list[dict[str, float | None]] = [{"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 0.5}]
    groups = [
        make_group(flat, prompt=make_prompt("both", objectives=("a", "b")), lengths=[3, 4]),
        make_group(flat, prompt=make_prompt("a", objectives=("a",)), lengths=[5, 6]),
    ]
    weights = {"a": 1.0, "b": 1.0}
    for idle, num_rows, num_idle in ((("a",), 2, 11), (("a", "b"), 0, 18), (("b",), 4, 0), ((), 4, 0)):
        batch = make_batch(groups, weights=weights, idle_when_flat=idle)
        assert (rows_in(batch), batch.num_idle_tokens) == (num_rows, num_idle)
        assert (batch.num_tokens, batch.num_rows) == (18, 4)


def test_opposite_shares_that_cancel_in_the_sum_are_no_flat_group() -> None:
    group = make_group([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}], lengths=[3, 4])
    batch = make_batch([group], idle_when_flat=("a", "b"))
    (micro,) = batch.micro_batches
    assert micro.advantages.tolist() == [0.0, 0.0]
    assert micro.shares.abs().min() > 0
    assert batch.num_idle_tokens == 0


def test_flat_groups_that_leave_the_update_are_not_counted_as_idle() -> None:
    batch = make_batch(GROUPS, drops_flat_groups=True, idle_when_flat=("a",))
    assert (batch.num_tokens, batch.num_idle_tokens) == (NUM_TOKENS - IDLE_TOKENS, 0)


# In a run


def test_a_run_without_kl_tells_how_many_tokens_it_spent_no_pass_on(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    runs.prepare()
    flat = ["p0", "p2", "p4", "p6"]  # all prompts of the objective "short"
    without = {"short": make_objective(flat=flat, type="fixed", value=0.0), "long": make_objective(flat=flat)}
    run_dir = runs.run("without", objectives=without)
    for row in metrics_of(run_dir):
        lines = [line for line in completions_of(run_dir) if line["step"] == row["step"]]
        assert row["tokens/idle"] == sum(line["num_tokens"] for line in lines if line["prompt_id"] in flat) > 0
    with_kl = runs.run("with", objectives={**without, "short": make_objective(flat=flat)})
    assert [row["tokens/idle"] for row in metrics_of(with_kl)] == [0, 0]
