"""What each option of the update does to a window, on the tiny model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import END, make_batch, make_group, make_policy, make_prompt, make_updater
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.batching import MicroBatch, TrainBatch
from grpo.config import OptimConfig, UpdateConfig
from grpo.errors import ConfigError
from grpo.rollout.base import SamplingParams
from grpo.rollout.replay import Replay, kept_tokens
from grpo.runtime.policy import Policy
from grpo.update.beta import FixedBeta
from grpo.update.entropy import AdaptiveEntropyBonus, EntropyBonus, FixedEntropyBonus
from grpo.update.forward import policy_pass, reference_logprobs, replay_of
from grpo.update.losses import LossInput, LossOutput
from grpo.update.statistics import WindowStatistics
from grpo.update.step import Updater
from grpo.update.window_loss import MicroBatchWork, Weighing, WindowLoss

PARAMS = SamplingParams(end_token_ids=(END,), max_new_tokens=16)
GROUPS = [
    make_group([{"a": 1.0}, {"a": 0.0}, {"a": 0.0}, {"a": 1.0}], lengths=[3, 7, 2, 5], prompt_length=6, seed=1),
    make_group([{"a": 0.0}, {"a": 1.0}, {"a": 0.4}], lengths=[4, 1, 6], prompt_length=3, seed=2),
]

given_to_the_custom_loss: list[LossInput] = []


def recording_loss(given: LossInput, *, factor: float = 1.0) -> LossOutput:
    """REINFORCE; keeps what it was given."""
    given_to_the_custom_loss.append(given)
    token_loss = -factor * given.logprobs * given.advantages[:, None]
    row_number = torch.arange(len(given.advantages), dtype=torch.float32)
    return LossOutput(token_loss=token_loss, metrics={"chosen": given.logprobs, "row": row_number})


def detached_loss(given: LossInput) -> LossOutput:
    return LossOutput(token_loss=given.logprobs.detach(), metrics={})


def update_of(loss: Mapping[str, Any] | str = "dapo", **options: Any) -> UpdateConfig:
    settings_of_loss = {"type": loss} if isinstance(loss, str) else loss
    return UpdateConfig.model_validate({"loss": settings_of_loss, **options})


def moved_policy(model_dir: Path) -> Policy:
    """Away from its reference, so that every KL term pulls."""
    policy = make_policy(model_dir)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return policy


def flat_gradient(policy: Policy) -> Tensor:
    return torch.cat([p.grad.flatten() for p in policy.trainable_parameters().values() if p.grad is not None])


def gradient_of(
    model_dir: Path,
    batch: TrainBatch,
    update: UpdateConfig | None = None,
    *,
    betas: Mapping[str, float] | None = None,
    params: SamplingParams = PARAMS,
) -> Tensor:
    """[D] of one window, not clipped."""
    policy = moved_policy(model_dir)
    updater = Updater(
        policy,
        {name: FixedBeta(value=(betas or {}).get(name, 0.0)) for name in batch.objectives},
        observed=dict.fromkeys(batch.objectives, "k3"),
        params=params,
        update=update or UpdateConfig(),
        optim=OptimConfig(learning_rate=1e-3, max_grad_norm=1e9),
    )
    assert updater.step(batch).skipped is None
    return flat_gradient(policy)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def changed(batch: TrainBatch, change: Any) -> TrainBatch:
    """Args: change: MicroBatch -> MicroBatch."""
    return replace(batch, micro_batches=tuple(change(micro) for micro in batch.micro_batches))


def with_sampler_gaps(policy: Policy, batch: TrainBatch, gaps: Sequence[float]) -> TrainBatch:
    """The engine reported gaps[t mod n] nats less than the policy says, at every token t of a row."""

    def reported(micro: MicroBatch) -> MicroBatch:
        with torch.no_grad():
            own = policy_pass(policy, micro, PARAMS).logprobs
        gap = torch.tensor([gaps[t % len(gaps)] for t in range(own.shape[1])])
        return replace(micro, sampler_logprobs=(own - gap) * micro.completion_mask)

    return changed(batch, reported)


# mu windows


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_mu_windows_take_one_step_each_from_a_gradient_that_starts_at_zero(
    tiny_model_dir: Path, iterations: int
) -> None:
    batch = make_batch(GROUPS, budget=30)
    policy = moved_policy(tiny_model_dir)
    updater = make_updater(policy, update=update_of(iterations=iterations), max_grad_norm=1e9, learning_rate=1e-7)
    found: list[Tensor] = []
    updater.optimizer.register_step_pre_hook(lambda *_: found.append(flat_gradient(policy)))
    updater.step(batch)
    assert len(found) == iterations
    # hardly anything moves at this rate: every window has the first one's gradient, not a growing sum of them
    for gradient in found:
        assert relative(gradient, found[0]) < 1e-3
    first = next(iter(policy.trainable_parameters().values()))
    assert int(updater.optimizer.state[first]["step"]) == iterations


def test_the_old_policy_is_that_before_the_first_step_in_all_windows(tiny_model_dir: Path) -> None:
    path = f"{__name__}:recording_loss"
    batch = make_batch(GROUPS)
    policy = moved_policy(tiny_model_dir)
    with torch.no_grad():
        before = policy_pass(policy, batch.micro_batches[0], PARAMS).logprobs
    given_to_the_custom_loss.clear()
    make_updater(policy, update=update_of({"type": "custom", "path": path}, iterations=3)).step(batch)
    assert len(given_to_the_custom_loss) == 3
    for record in given_to_the_custom_loss:
        assert torch.equal(record.old_logprobs, before)
        assert not record.old_logprobs.requires_grad
    first, *later = given_to_the_custom_loss
    assert torch.equal(first.logprobs.detach(), first.old_logprobs)  # the ratio is exactly 1
    assert all(not torch.allclose(record.logprobs, before, atol=1e-3) for record in later)


def test_no_token_is_clipped_in_the_first_window_and_ever_more_are_in_later_ones(tiny_model_dir: Path) -> None:
    batch = make_batch(GROUPS)
    clipped = []
    for iterations in (1, 2, 8):
        updater = make_updater(
            moved_policy(tiny_model_dir), update=update_of(iterations=iterations), learning_rate=3e-2
        )
        means = updater.step(batch).means
        clipped.append((means["clip/low_frac"] + means["clip/high_frac"]) * iterations)  # the mean is over windows
    assert clipped[0] == 0.0
    assert clipped[1] > 0.0
    assert clipped[2] / 7 > clipped[1]  # per window after the first


def test_one_window_on_the_old_policy_is_plain_reinforce(tiny_model_dir: Path) -> None:
    batch = make_batch(GROUPS)
    own = gradient_of(tiny_model_dir, batch, update_of({"type": "custom", "path": f"{__name__}:recording_loss"}))
    assert relative(gradient_of(tiny_model_dir, batch, update_of("dapo")), own) < 1e-5


# The kept set


def test_the_filters_kept_set_is_that_of_the_first_window_under_later_weights_too(tiny_model_dir: Path) -> None:
    params = replace(PARAMS, top_p=0.5, temperature=0.7)
    micro = make_batch(GROUPS).micro_batches[0]
    policy = moved_policy(tiny_model_dir)
    remembering, forgetful = replay_of(micro, params, remembers=True), replay_of(micro, params, remembers=True)

    def kept_mass(replay: Replay) -> Tensor:
        """[B, T] log of the plain mass inside the kept set: the two laws' difference at the sampled token."""
        with torch.no_grad():
            forward = policy_pass(policy, micro, params, replay=replay)
        return forward.plain_logprobs - forward.logprobs

    before = kept_mass(remembering)
    forced = remembering.num_forced
    assert torch.equal(kept_mass(forgetful), before)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    after = kept_mass(remembering)
    anew = kept_mass(replay_of(micro, params))
    assert not torch.allclose(after, anew, atol=1e-3)  # other weights would keep another set
    assert remembering.num_forced == forced  # counted once, in the first pass
    # the slow twin: the set worked out under the old weights, on logits of the new ones
    logits = torch.randn(3, 13, generator=generator)
    ids = torch.tensor([[4, 5, 6]])
    replay = Replay(params, ids, torch.zeros(3, dtype=torch.int64), torch.arange(3), remembers=True)
    first = replay.process(logits, torch.arange(3))
    second = replay.process(logits.flip(1), torch.arange(3))
    assert torch.equal(first.isinf(), second.isinf())
    expected = kept_tokens(logits / 0.7, params).scatter(1, torch.tensor([[4], [5], [6]]), True)
    assert torch.equal(~second.isinf(), expected)
    assert torch.equal(second[expected], logits.flip(1)[expected])


@settings(max_examples=40, deadline=None)
@given(width=st.integers(2, 41), count=st.integers(1, 5), seed=st.integers(0, 2**32), top_p=st.floats(0.05, 0.99))
def test_a_remembered_set_comes_back_whole_whatever_the_vocabulary(
    width: int, count: int, seed: int, top_p: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = replace(PARAMS, top_p=top_p)
    logits = 3 * torch.randn(count, width, generator=generator)
    ids = torch.randint(0, width, (1, count), generator=generator)
    places = torch.arange(count)
    plain = Replay(params, ids, torch.zeros_like(places), places)
    remembering = Replay(params, ids, torch.zeros_like(places), places, remembers=True)
    expected = plain.process(logits, places)
    assert torch.equal(remembering.process(logits, places), expected)
    again = remembering.process(logits, places)  # from its packed form, eight tokens a byte
    assert torch.equal(again, expected)


def test_chunks_remember_a_set_each(tiny_model_dir: Path) -> None:
    params = replace(PARAMS, top_k=2)
    logits = torch.arange(20.0).view(4, 5)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    replay = Replay(params, ids, torch.zeros(4, dtype=torch.int64), torch.arange(4), remembers=True)
    for _ in range(2):
        for start in (0, 2):
            places = torch.arange(start, start + 2)
            kept = ~replay.process(logits[places] if start == 0 else -logits[places], places).isinf()
            # the two likeliest, and the sampled token 0, which the negative logits keep anyway
            assert (
                kept.tolist()
                == [[True, False, False, True, True] if start == 0 else [True, True, False, False, False]] * 2
            )
    assert replay.num_forced == 2


# Rollout correction


@pytest.mark.parametrize(
    ("correction", "gaps", "weights"),
    [
        ({"level": "token", "mode": "truncate"}, [math.log(1.5), math.log(4.0)], [1.5, 2.0]),
        ({"level": "token", "mode": "truncate", "high": 3.0}, [math.log(1.5), math.log(4.0)], [1.5, 3.0]),
        ({"level": "token", "mode": "mask"}, [math.log(1.5), math.log(0.4)], [1.5, 0.0]),
        ({"level": "token", "mode": "mask"}, [math.log(6.0), math.log(4.0)], [0.0, 4.0]),
    ],
)
def test_correction_weighs_the_policy_term_alone_and_keeps_the_denominators(
    tiny_model_dir: Path, correction: dict[str, Any], gaps: list[float], weights: list[float]
) -> None:
    batch = with_sampler_gaps(moved_policy(tiny_model_dir), make_batch(GROUPS), gaps)
    kl = {"estimator": "k3"}
    corrected = gradient_of(tiny_model_dir, batch, update_of(kl=kl, correction=correction), betas={"a": 0.5})
    # by hand: a loss of one's own whose token losses carry the weights, over the same number of tokens
    by_hand = update_of({"type": "custom", "path": f"{__name__}:weighted_loss", "params": {"weights": weights}}, kl=kl)
    assert relative(corrected, gradient_of(tiny_model_dir, batch, by_hand, betas={"a": 0.5})) < 1e-5
    plain = gradient_of(tiny_model_dir, batch, update_of(kl=kl), betas={"a": 0.5})
    assert relative(corrected, plain) > 1e-2


def weighted_loss(given: LossInput, *, weights: Sequence[float]) -> LossOutput:
    each = torch.tensor([weights[t % len(weights)] for t in range(given.mask.shape[1])])
    ratio = (given.logprobs - given.old_logprobs).exp()
    return LossOutput(token_loss=-each * ratio * given.advantages[:, None], metrics={})


def test_a_window_whose_tokens_are_all_masked_keeps_its_kl_term(tiny_model_dir: Path) -> None:
    batch = with_sampler_gaps(moved_policy(tiny_model_dir), make_batch(GROUPS), [math.log(100.0)])
    update = update_of(correction={"mode": "mask"})
    got = gradient_of(tiny_model_dir, batch, update, betas={"a": 0.5})
    silent = changed(batch, lambda micro: replace(micro, advantages=torch.zeros_like(micro.advantages)))
    assert relative(got, gradient_of(tiny_model_dir, silent, betas={"a": 0.5})) < 1e-6
    assert float(got.norm()) > 0


def test_what_correction_did_is_said_once_for_the_batch_and_the_tails_are_those_before_it(tiny_model_dir: Path) -> None:
    policy = moved_policy(tiny_model_dir)
    batch = with_sampler_gaps(policy, make_batch([GROUPS[0]]), [math.log(6.0), math.log(3.0)])
    # rows of 3, 7, 2 and 5 tokens: 2 + 4 + 1 + 3 = 10 of 17 tokens are at an even place and masked
    stats = make_updater(policy, update=update_of(correction={"mode": "mask"}, iterations=3)).step(batch)
    assert stats.means["sampler/correction_masked_frac"] == pytest.approx(10 / 17)
    assert stats.means["sampler/correction_mean"] == pytest.approx(3 * 7 / 17, rel=1e-4)
    assert stats.sampler_ratio_max == pytest.approx(6.0, rel=1e-4)


def test_a_rows_weight_is_the_mean_over_its_tokens_or_their_sum(tiny_model_dir: Path) -> None:
    policy = moved_policy(tiny_model_dir)
    batch = with_sampler_gaps(policy, make_batch([GROUPS[0]]), [0.1])
    found = {}
    for how in ("mean", "sum"):
        correction = {"level": "sequence", "sequence_log_ratio": how}
        stats = make_updater(moved_policy(tiny_model_dir), update=update_of(correction=correction)).step(batch)
        found[how] = stats.means["sampler/correction_mean"]
    assert found["mean"] == pytest.approx(math.exp(0.1), rel=1e-4)
    # rows of 3, 7, 2 and 5 tokens; truncated at 2, but e^0.7 = 2.014 only
    expected = (3 * math.exp(0.3) + 7 * 2.0 + 2 * math.exp(0.2) + 5 * math.exp(0.5)) / 17
    assert found["sum"] == pytest.approx(expected, rel=1e-4)


# Entropy


def test_the_bonus_raises_the_entropy_where_nothing_else_pulls(tiny_model_dir: Path) -> None:
    flat = [make_group([{"a": 1.0}, {"a": 1.0}], lengths=[6, 8], seed=3)]  # no advantage, and beta 0
    entropies = {}
    for coefficient in (0.0, 1.0):
        updater = make_updater(
            sharp_policy(tiny_model_dir), beta=0.0, entropy_bonus=FixedEntropyBonus(coefficient=coefficient)
        )
        entropies[coefficient] = [updater.step(make_batch(flat)).means["entropy"] for _ in range(5)]
    assert entropies[0.0] == pytest.approx([entropies[0.0][0]] * 5)
    assert entropies[1.0] == sorted(entropies[1.0])
    assert entropies[1.0][-1] > entropies[1.0][0] + 0.01


def sharp_policy(model_dir: Path) -> Policy:
    """Far from uniform, so that the entropy has somewhere to go."""
    policy = make_policy(model_dir)
    with torch.no_grad():
        policy.causal_lm.get_output_embeddings().weight.mul_(20)  # pyright: ignore[reportOptionalMemberAccess]
    return policy


def test_an_adaptive_coefficient_is_constant_in_a_window_and_moves_after_each(tiny_model_dir: Path) -> None:
    bonus = AdaptiveEntropyBonus(target=100.0, step=0.01, initial=0.02, maximum=0.045)  # never reached
    updater = make_updater(moved_policy(tiny_model_dir), update=update_of(iterations=2), entropy_bonus=bonus)
    stats = updater.step(make_batch(GROUPS, budget=30))
    assert stats.entropy_coefficient == 0.02  # the first window's
    assert bonus.value == pytest.approx(0.04)
    saved = bonus.state_dict()
    assert saved["entropy"] is not None
    updater.step(make_batch(GROUPS))
    assert bonus.value == 0.045
    resumed = AdaptiveEntropyBonus(target=100.0, step=0.01, maximum=0.045)
    resumed.load_state_dict(saved)
    assert resumed.value == pytest.approx(0.04)


def test_an_adaptive_bonus_above_its_target_leaves_the_gradient_alone(tiny_model_dir: Path) -> None:
    def second_gradient(bonus: EntropyBonus | None) -> Tensor:
        policy = moved_policy(tiny_model_dir)
        updater = make_updater(policy, entropy_bonus=bonus, max_grad_norm=1e9, learning_rate=1e-6)
        for _ in range(2):
            updater.step(make_batch(GROUPS))
        return flat_gradient(policy)

    resting = AdaptiveEntropyBonus(target=1e-3, initial=0.0, maximum=0.05)
    assert torch.equal(second_gradient(resting), second_gradient(None))
    acting = AdaptiveEntropyBonus(target=100.0, step=5.0, initial=0.0, maximum=10.0)
    assert relative(second_gradient(acting), second_gradient(None)) > 1e-3


# KL


def test_the_recipes_clamp_bounds_the_penalty_and_the_tokens_beyond_it_are_counted(tiny_model_dir: Path) -> None:
    batch, limit = make_batch(GROUPS), 0.02
    policy = moved_policy(tiny_model_dir)
    with torch.no_grad():
        differences = torch.cat(
            [
                (policy_pass(policy, micro, PARAMS).plain_logprobs - reference_logprobs(policy, micro, PARAMS))[
                    micro.completion_mask
                ]
                for micro in batch.micro_batches
            ]
        ).abs()  # [N]
    assert bool((differences > limit).any())
    assert bool((differences < limit).any())
    stats = make_updater(policy, update=update_of(kl={"estimator": "abs", "max_log_ratio": limit})).step(batch)
    assert stats.means["kl/clamped_frac"] == pytest.approx(float((differences > limit).float().mean()))
    assert stats.means["kl/a/penalty"] == pytest.approx(float(differences.clamp(max=limit).mean()), rel=1e-4)


def test_kl_in_the_reward_equals_taking_it_off_the_advantages_by_hand(tiny_model_dir: Path) -> None:
    groups = [
        make_group([{"a": 1.0}, {"a": 0.0}], lengths=[4, 6], seed=1),
        make_group([{"b": 0.0}, {"b": 1.0}, {"b": 0.2}], lengths=[5, 2, 3], seed=2),
        make_group(
            [{"a": 1.0, "b": 0.1}, {"a": 0.0, "b": None}], prompt=make_prompt("both", objectives=("a", "b")), seed=3
        ),
    ]
    weights, betas = {"a": 1.0, "b": 0.5}, {"a": 0.3, "b": 0.8}
    batch = make_batch(groups, weights=weights)
    got = gradient_of(tiny_model_dir, batch, update_of(kl={"estimator": "k1", "kl_in": "reward"}), betas=betas)
    policy = moved_policy(tiny_model_dir)

    def taken_off(micro: MicroBatch) -> MicroBatch:
        with torch.no_grad():
            own = policy_pass(policy, micro, PARAMS).logprobs
        d = own - reference_logprobs(policy, micro, PARAMS)  # [B, T]
        beta = micro.is_scored[:, 0] * 1.0 * 0.3 + micro.is_scored[:, 1] * 0.5 * 0.8  # [B]
        return replace(micro, advantages=micro.advantages[:, None] - beta[:, None] * d)

    by_hand = changed(batch, taken_off)
    assert relative(got, gradient_of(tiny_model_dir, by_hand)) < 1e-5
    assert relative(got, gradient_of(tiny_model_dir, batch)) > 1e-2


def test_each_objectives_beta_acts_on_the_rows_it_scored(tiny_model_dir: Path) -> None:
    groups = [
        make_group([{"a": 1.0}, {"a": 1.0}], lengths=[4, 6], seed=1),
        make_group([{"b": 1.0}, {"b": 1.0}, {"b": None}], lengths=[5, 2, 3], seed=2),
    ]
    batch = make_batch(groups, weights={"a": 1.0, "b": 0.5}, budget=20)
    kl = update_of(kl={"estimator": "k3"})
    only_a = gradient_of(tiny_model_dir, batch, kl, betas={"a": 0.4})
    only_b = gradient_of(tiny_model_dir, batch, kl, betas={"b": 0.4})
    both = gradient_of(tiny_model_dir, batch, kl, betas={"a": 0.8, "b": 0.1})
    assert relative(2 * only_a + 0.25 * only_b, both) < 1e-5
    # the rows of a alone, over their own 10 tokens and not over all 17
    alone = gradient_of(tiny_model_dir, make_batch(groups[:1], weights={"a": 1.0}), kl, betas={"a": 0.4})
    assert relative(only_a * 17 / 10, alone) < 1e-5


# A loss of one's own


def test_a_custom_loss_is_given_the_documented_record(tiny_model_dir: Path) -> None:
    params = replace(PARAMS, temperature=0.8, presence_penalty=0.5)
    batch = make_batch([GROUPS[0]])
    (micro,) = batch.micro_batches
    policy = moved_policy(tiny_model_dir)
    with torch.no_grad():
        forward = policy_pass(policy, micro, params)
    given_to_the_custom_loss.clear()
    path = f"{__name__}:recording_loss"
    update = update_of({"type": "custom", "path": path, "params": {"factor": 2.0}})
    make_updater(policy, update=update, params=params).step(batch)
    (record,) = given_to_the_custom_loss
    assert record.logprobs.requires_grad
    assert torch.equal(record.logprobs.detach(), forward.logprobs)
    assert torch.equal(record.ref_logprobs, reference_logprobs(make_policy(tiny_model_dir), micro, params))
    assert torch.equal(record.sampler_logprobs, micro.sampler_logprobs)
    assert torch.equal(record.advantages, micro.advantages)
    assert torch.equal(record.mask, micro.completion_mask)
    assert not torch.allclose(forward.logprobs, forward.plain_logprobs)


def test_a_custom_losss_params_reach_it_and_its_metrics_are_logged_over_the_whole_window(tiny_model_dir: Path) -> None:
    path = f"{__name__}:recording_loss"
    batch = make_batch([GROUPS[0]], budget=20)
    assert len(batch.micro_batches) > 1
    given_to_the_custom_loss.clear()
    one, two = (
        gradient_of(tiny_model_dir, batch, update_of({"type": "custom", "path": path, "params": {"factor": factor}}))
        for factor in (1.0, 2.0)
    )
    assert relative(2 * one, two) < 1e-6
    given_to_the_custom_loss.clear()
    stats = make_updater(moved_policy(tiny_model_dir), update=update_of({"type": "custom", "path": path})).step(batch)
    chosen = torch.cat([record.logprobs.detach()[record.mask] for record in given_to_the_custom_loss])
    assert len(chosen) == 17
    assert stats.means["loss/chosen"] == pytest.approx(float(chosen.mean()), rel=1e-5)
    numbers = [row for record in given_to_the_custom_loss for row in range(len(record.advantages))]
    assert stats.means["loss/row"] == pytest.approx(sum(numbers) / 4)


def test_the_share_of_tokens_whose_ratio_cispo_truncates_is_logged(tiny_model_dir: Path) -> None:
    update = update_of({"type": "cispo", "max_ratio": 1.001}, iterations=2)
    updater = make_updater(moved_policy(tiny_model_dir), update=update, learning_rate=0.05)
    share = updater.step(make_batch(GROUPS)).means["clip/high_frac"]
    assert 0 < share < 0.5  # of two windows, and in the first every ratio is 1


def test_the_share_of_bad_tokens_whose_ratio_delta_bounds_is_logged(tiny_model_dir: Path) -> None:
    def means_of(loss: dict[str, Any]) -> Mapping[str, float]:
        updater = make_updater(moved_policy(tiny_model_dir), update=update_of(loss, iterations=2), learning_rate=0.05)
        return updater.step(make_batch(GROUPS)).means

    given_to_the_custom_loss.clear()
    means_of({"type": "custom", "path": f"{__name__}:recording_loss"})  # at ratio 1 its gradient is dapo's
    first, second = given_to_the_custom_loss
    ratio = (second.logprobs - second.old_logprobs).exp()  # [B, T]
    is_bounded = (ratio > 1.25) & (second.advantages[:, None] < 0) & second.mask
    assert 0 < is_bounded.sum() < ((ratio > 1.25) & second.mask).sum()
    share = means_of({"type": "dapo", "delta": 1.25})["clip/delta_frac"]
    assert share == pytest.approx(float(is_bounded.sum() / (first.mask.sum() + second.mask.sum())))
    assert "clip/delta_frac" not in means_of({"type": "dapo"})


def test_a_detached_custom_loss_is_refused(tiny_model_dir: Path) -> None:
    update = update_of({"type": "custom", "path": f"{__name__}:detached_loss"})
    with pytest.raises(ConfigError, match=r"detached_loss: .* no grad_fn"):
        make_updater(moved_policy(tiny_model_dir), update=update).step(make_batch(GROUPS))


# Groups that teach nothing


def test_flat_groups_keep_their_kl_term_or_leave_the_update(tiny_model_dir: Path) -> None:
    flat = make_group([{"a": 1.0}, {"a": 1.0}], lengths=[4, 6], seed=8)
    kl_only = make_batch([GROUPS[0], flat])
    dropped = make_batch([GROUPS[0], flat], drops_flat_groups=True)
    assert (kl_only.num_tokens, dropped.num_tokens) == (27, 17)
    assert (kl_only.num_rows, dropped.num_rows) == (6, 4)
    update = update_of(kl={"estimator": "k3"})
    without = gradient_of(tiny_model_dir, make_batch([GROUPS[0]]), update, betas={"a": 0.5})
    assert torch.equal(gradient_of(tiny_model_dir, dropped, update, betas={"a": 0.5}), without)
    # its KL term: what its own window has, over the denominator of both
    own = gradient_of(tiny_model_dir, make_batch([flat]), update, betas={"a": 0.5})
    expected = without * 17 / 27 + own * 10 / 27
    assert relative(gradient_of(tiny_model_dir, kl_only, update, betas={"a": 0.5}), expected) < 1e-5


# Parts


def test_an_inference_pass_over_a_window_leaves_the_gradients_alone(tiny_model_dir: Path) -> None:
    policy = moved_policy(tiny_model_dir)
    batch = make_batch(GROUPS)
    loss = WindowLoss(policy, observed={"a": "k3"}, params=PARAMS, update=UpdateConfig())
    weighing = Weighing(num_tokens=28, num_rows=7, betas={"a": 0.1}, entropy_coefficient=0.0)
    statistics = WindowStatistics()
    work = MicroBatchWork(batch=batch.micro_batches[0], replay=replay_of(batch.micro_batches[0], PARAMS))
    ((place, value),) = loss.parts(work, batch, weighing, statistics)
    assert place is None
    assert value.requires_grad
    assert all(parameter.grad is None for parameter in policy.trainable_parameters().values())
    # on the old policy the policy term is minus the mean advantage over tokens; the KL is `clamped`
    micro = batch.micro_batches[0]
    mean_advantage = float((micro.advantages[:, None] * micro.completion_mask).sum()) / 28
    penalty = statistics.means.means()["kl/a/penalty"]
    assert float(value.detach()) == pytest.approx(-mean_advantage + 0.1 * penalty, rel=1e-4)
