"""The law of FORMULAS 6 on the real update: no cut, order or padding of a window changes its gradient."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import END, make_batch, make_group, make_policy, make_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from grpo.batching import MicroBatch, TrainBatch
from grpo.config import LoraTrainable, OptimConfig, UpdateConfig
from grpo.rollout.base import SamplingParams
from grpo.runtime.policy import Policy
from grpo.types import ScoredGroup
from grpo.update.beta import FixedBeta
from grpo.update.entropy import FixedEntropyBonus
from grpo.update.forward import replay_of
from grpo.update.gradients import GradientWindow
from grpo.update.losses import LossInput, LossOutput
from grpo.update.statistics import WindowStatistics
from grpo.update.step import Updater, UpdateStats
from grpo.update.window_loss import MicroBatchWork, Weighing, WindowLoss

BETAS = {"a": 0.3, "b": 0.7}
WEIGHTS = {"a": 1.0, "b": 0.5}
ENTROPY_COEFFICIENT = 0.1
CLIP = 0.05
"""Narrow, so that a second window clips on both sides."""
PARAMS = SamplingParams(end_token_ids=(END,), max_new_tokens=16)
REPLAYED = replace(PARAMS, temperature=0.8, top_p=0.9, min_p=0.01, presence_penalty=0.4, frequency_penalty=0.2)


def squared_ratio_loss(given: LossInput, *, scale: float = 1.0) -> LossOutput:
    """A loss of one's own: the squared ratio, so that it is not one of ours under another name."""
    ratio = (given.logprobs - given.old_logprobs).masked_fill(~given.mask, 0.0).exp()
    return LossOutput(token_loss=-scale * ratio.square() * given.advantages[:, None], metrics={})


def update_of(loss: Mapping[str, Any] | str = "dapo", **options: Any) -> UpdateConfig:
    settings_of_loss = {"type": loss} if isinstance(loss, str) else loss
    return UpdateConfig.model_validate({"loss": settings_of_loss, **options})


CASES: dict[str, tuple[UpdateConfig, SamplingParams]] = {
    "dapo, clamped": (update_of(), PARAMS),
    "grpo, k2": (update_of("grpo", kl={"estimator": "k2"}), PARAMS),
    "bnpo, k3": (update_of("bnpo", kl={"estimator": "k3"}), PARAMS),
    "dr_grpo, abs": (update_of("dr_grpo", kl={"estimator": "abs"}), PARAMS),
    "gspo, k3+": (update_of("gspo", kl={"estimator": "k3+"}), PARAMS),
    "cispo, k3 times the ratio": (update_of("cispo", kl={"estimator": "k3", "kl_correction": "ratio"}), PARAMS),
    "sapo, k1 times the ratio": (update_of("sapo", kl={"estimator": "k1", "kl_correction": "ratio"}), PARAMS),
    "two-sided": (update_of({"type": "dapo", "clip_low": 0.1, "clip_high": 0.1, "delta": 1.2}), PARAMS),
    "k1 in the reward": (update_of("grpo", kl={"estimator": "k1", "kl_in": "reward"}), PARAMS),
    "a loss of one's own over rows": (
        update_of({"type": "custom", "path": f"{__name__}:squared_ratio_loss", "reduction": "rows"}),
        PARAMS,
    ),
    "a loss of one's own over tokens": (
        update_of({"type": "custom", "path": f"{__name__}:squared_ratio_loss", "params": {"scale": 0.5}}),
        PARAMS,
    ),
    "token weights truncated": (update_of("dapo", correction={"level": "token", "mode": "truncate"}), PARAMS),
    "token weights masked": (update_of("grpo", correction={"level": "token", "mode": "mask"}), PARAMS),
    "row weights truncated": (update_of("sapo", correction={"level": "sequence", "mode": "truncate"}), PARAMS),
    "row weights masked": (
        update_of("dr_grpo", correction={"level": "sequence", "mode": "mask", "low": 0.9, "high": 1.2}),
        PARAMS,
    ),
    "filters and penalties": (update_of("dapo", kl={"estimator": "k3"}), REPLAYED),
    "filters, row weights by their sum": (
        update_of("gspo", correction={"level": "sequence", "mode": "mask", "sequence_log_ratio": "sum"}),
        REPLAYED,
    ),
    "summed scores": (update_of("cispo", combine="summed"), PARAMS),
    "objectives apart": (update_of("dapo", gradients={"method": "pcgrad"}), PARAMS),
    "objectives apart, k1 in the reward": (
        update_of("grpo", kl={"estimator": "k1", "kl_in": "reward"}, gradients={"method": "mgda"}),
        PARAMS,
    ),
}


def scored_groups() -> list[ScoredGroup]:
    """Rows of one objective, of the other, of both; a missing verdict, a flat group, ragged K and ragged lengths."""
    only_a = make_group([{"a": 1.0}, {"a": 0.0}, {"a": 0.3}], lengths=[5, 9, 1], prompt_length=6, seed=1)
    only_b = make_group([{"b": 0.0}, {"b": None}, {"b": 1.0}, {"b": 0.0}], lengths=[4, 3, 7, 2], seed=2)
    both = make_group(
        [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, {"a": None, "b": 0.5}],
        lengths=[6, 3, 8],
        prompt_length=3,
        prompt=make_prompt("both", objectives=("a", "b")),
        seed=3,
    )
    flat = make_group([{"a": 1.0}, {"a": 1.0}], lengths=[4, 2], prompt_length=2, seed=4)
    return [with_sampler_noise(group, seed) for seed, group in enumerate((only_a, only_b, both, flat))]


def with_sampler_noise(group: ScoredGroup, seed: int) -> ScoredGroup:
    """An engine that disagrees: near the random model's log(1 / 320) = -5.8, by 0.8 nats."""
    rng = random.Random(seed)
    completions = tuple(
        replace(completion, sampler_logprobs=tuple(rng.gauss(-5.8, 0.8) for _ in completion.token_ids))
        for completion in group.rollout.completions
    )
    return replace(group, rollout=replace(group.rollout, completions=completions))


def window_of(update: UpdateConfig, *, budget: int = 8192) -> TrainBatch:
    return make_batch(scored_groups(), weights=WEIGHTS, budget=budget, combine=update.combine, scale=update.score_scale)


def moved_policy(model_dir: Path) -> Policy:
    return moved(make_policy(model_dir))


def moved(policy: Policy) -> Policy:
    """Away from its reference, so that every KL term pulls, and no parameter's gradient is 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return policy


def make_law_updater(
    policy: Policy,
    update: UpdateConfig,
    *,
    params: SamplingParams = PARAMS,
    learning_rate: float = 3e-3,
    eps: float = 1e-3,
) -> Updater:
    """No clipping of the gradient, and Adam with a large eps: its first step would turn noise into a sign."""
    return Updater(
        policy,
        {name: FixedBeta(value=beta) for name, beta in BETAS.items()},
        observed=dict.fromkeys(BETAS, "k3"),
        params=params,
        update=update,
        optim=OptimConfig(learning_rate=learning_rate, eps=eps, max_grad_norm=1e9),
        entropy_bonus=FixedEntropyBonus(coefficient=ENTROPY_COEFFICIENT),
    )


def flat_gradient(policy: Policy) -> Tensor:
    return torch.cat([p.grad.flatten() for p in policy.trainable_parameters().values() if p.grad is not None])


def flat_weights(policy: Policy) -> Tensor:
    return torch.cat([p.detach().flatten() for p in policy.trainable_parameters().values()])


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def windows_of(updater: Updater, batch: TrainBatch) -> tuple[list[Tensor], UpdateStats]:
    """The gradient that each optimizer step of one update was taken with."""
    found: list[Tensor] = []
    handle = updater.optimizer.register_step_pre_hook(lambda *_: found.append(flat_gradient(updater.policy)))
    stats = updater.step(batch)
    handle.remove()
    return found, stats


def rows_of(batch: TrainBatch) -> list[tuple[MicroBatch, int]]:
    return [(micro, row) for micro in batch.micro_batches for row in range(len(micro.prompt_of_row))]


def recut(batch: TrainBatch, rng: random.Random, *, num_parts: int) -> TrainBatch:
    """The same rows, shuffled, cut anywhere, each part with padding that nobody needs and rubbish in it."""
    rows = rows_of(batch)
    rng.shuffle(rows)
    cuts = sorted(rng.sample(range(1, len(rows)), num_parts - 1))
    parts = [rows[start:end] for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    return replace(batch, micro_batches=tuple(collated(part, rng) for part in parts))


def collated(rows: Sequence[tuple[MicroBatch, int]], rng: random.Random) -> MicroBatch:
    prompts: list[list[int]] = []
    prompt_of_row: list[int] = []
    for micro, row in rows:
        group = int(micro.prompt_of_row[row])
        prompt = micro.prompt_ids[group, : int(micro.prompt_mask[group].sum())].tolist()
        if prompt not in prompts or rng.random() < 0.3:  # a prompt may go through the model twice
            prompts.append(prompt)
        prompt_of_row.append(len(prompts) - 1 - prompts[::-1].index(prompt))
    lengths = [int(micro.completion_mask[row].sum()) for micro, row in rows]
    width = max(lengths) + rng.randint(0, 3)

    def padded(values: Tensor, length: int, size: int, rubbish: float) -> Tensor:
        return torch.cat([values[:length], torch.full((size - length,), rubbish, dtype=values.dtype)])

    prompt_width = max(map(len, prompts)) + rng.randint(0, 3)
    return MicroBatch(
        prompt_ids=torch.stack([padded(torch.tensor(p), len(p), prompt_width, rng.randint(0, 300)) for p in prompts]),
        prompt_mask=torch.stack([(torch.arange(prompt_width) < len(p)).long() for p in prompts]),
        prompt_of_row=torch.tensor(prompt_of_row),
        completion_ids=torch.stack(
            [
                padded(m.completion_ids[r], n, width, rng.randint(0, 300))
                for (m, r), n in zip(rows, lengths, strict=True)
            ]
        ),
        completion_mask=torch.arange(width) < torch.tensor(lengths)[:, None],
        sampler_logprobs=torch.stack(
            [padded(m.sampler_logprobs[r], n, width, -3.0) for (m, r), n in zip(rows, lengths, strict=True)]
        ),
        advantages=torch.stack([micro.advantages[row] for micro, row in rows]),
        shares=torch.stack([micro.shares[row] for micro, row in rows]),
        is_scored=torch.stack([micro.is_scored[row] for micro, row in rows]),
    )


@pytest.mark.parametrize("case", CASES)
def test_no_cut_order_or_padding_changes_the_gradient_of_any_of_three_windows(tiny_model_dir: Path, case: str) -> None:
    update, params = CASES[case]
    update = update.model_copy(update={"iterations": 3})
    whole = window_of(update)
    assert len(whole.micro_batches) == 1
    policy = moved_policy(tiny_model_dir)
    expected, expected_stats = windows_of(make_law_updater(policy, update, params=params), whole)
    assert relative(expected[1], expected[0]) > 1e-2  # the windows are different problems
    assert relative(expected[2], expected[1]) > 1e-2
    for cut in (window_of(update, budget=50), recut(whole, random.Random(case), num_parts=3)):
        assert len(cut.micro_batches) > 2
        other = moved_policy(tiny_model_dir)
        got, stats = windows_of(make_law_updater(other, update, params=params), cut)
        assert len(got) == 3
        assert [relative(*pair) < 1e-5 for pair in zip(got, expected, strict=True)] == [True] * 3
        assert float((flat_weights(other) - flat_weights(policy)).abs().max()) < 1e-6
        assert stats.means == pytest.approx(dict(expected_stats.means), rel=1e-4, abs=1e-6)
        assert stats.kl_max == pytest.approx(dict(expected_stats.kl_max), rel=1e-4)
        assert stats.sampler_ratio_p99 == pytest.approx(expected_stats.sampler_ratio_p99, rel=1e-4)
        assert stats.num_forced == expected_stats.num_forced


@pytest.mark.parametrize("case", ["dapo, clamped", "gspo, k3+", "filters and penalties"])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32), num_parts=st.integers(1, 11))
def test_the_law_holds_for_any_cut_of_a_single_window(
    tiny_model_dir: Path, case: str, seed: int, num_parts: int
) -> None:
    update, params = CASES[case]
    whole = window_of(update)
    (expected,), _ = windows_of(make_law_updater(moved_policy(tiny_model_dir), update, params=params), whole)
    cut = recut(whole, random.Random(seed), num_parts=num_parts)
    (got,), _ = windows_of(make_law_updater(moved_policy(tiny_model_dir), update, params=params), cut)
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("case", [name for name in CASES if "apart" not in name])
def test_in_float64_the_law_holds_to_1e10(case: str) -> None:
    """The optimizer keeps to float32, so loss and window are taken without it, the old policy moved by hand.

    Llama's norms and softmax are float32 whatever the weights are; GPT-2's are not.
    """
    update, params = CASES[case]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=32, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
        )
        policy = moved(Policy(GPT2LMHeadModel(config), LoraTrainable(rank=4, alpha=8), seed=0))
    policy.model.double()
    loss = WindowLoss(policy, observed=dict.fromkeys(BETAS, "k3"), params=params, update=update)
    window = GradientWindow(policy.trainable_parameters())

    def gradient(batch: TrainBatch) -> Tensor:
        weighing = Weighing(
            num_tokens=batch.num_tokens, num_rows=batch.num_rows, betas=BETAS, entropy_coefficient=ENTROPY_COEFFICIENT
        )
        window.start_window()
        for micro in batch.micro_batches:
            work = MicroBatchWork(batch=micro, replay=replay_of(micro, params))
            with torch.no_grad():
                loss.parts(work, batch, weighing, WindowStatistics())  # fixes what the first window fixes
            assert work.fixed is not None
            moved = work.fixed.old_logprobs + 0.3 * torch.sin(37 * work.fixed.old_logprobs)
            work.fixed = replace(work.fixed, old_logprobs=moved)
            parts = loss.parts(work, batch, weighing, WindowStatistics())
            for number, (_, part) in enumerate(parts):
                window.add(part, keep_graph=number + 1 < len(parts))
        return flat_gradient(policy)

    whole = window_of(update)
    expected = gradient(whole)
    assert expected.dtype == torch.float64
    assert relative(gradient(recut(whole, random.Random(case), num_parts=3)), expected) < 1e-10


# The slow twin: whole rows, no padding, no cache; FORMULAS 3, 5 and 6 token by token in float64.


def slow_logprobs(model: Any, micro: MicroBatch, row: int) -> tuple[Tensor, Tensor]:
    """[T] log-probabilities of the row's completion and [T] entropies, from the logits of the whole row."""
    group = int(micro.prompt_of_row[row])
    prompt, length = int(micro.prompt_mask[group].sum()), int(micro.completion_mask[row].sum())
    ids = torch.cat([micro.prompt_ids[group, :prompt], micro.completion_ids[row, :length]])
    law = model(ids[None]).logits[0].double().log_softmax(-1)  # [L, V]
    places = range(prompt - 1, prompt + length - 1)
    chosen = torch.stack([law[place, ids[place + 1]] for place in places])
    return chosen, torch.stack([-(law[place].exp() * law[place]).sum() for place in places])


def slow_clipped(ratio: Tensor, advantage: float) -> Tensor:
    bounded = min(max(float(ratio.detach()), 1 - CLIP), 1 + CLIP)
    plain = ratio * advantage
    return -plain if float(plain.detach()) <= bounded * advantage else torch.tensor(-bounded * advantage).double()


def slow_policy_token(variant: str, new: Tensor, old: Tensor, row_gap: Tensor, advantage: float) -> Tensor:
    if variant == "gspo":
        return slow_clipped(row_gap.exp(), advantage)
    ratio = (new - old).exp()
    if variant == "cispo":
        return -min(float(ratio.detach()), 5.0) * advantage * new
    if variant == "sapo":
        temperature = 1.0 if advantage > 0 else 1.05
        return -4 / temperature / (1 + (-temperature * (ratio - 1)).exp()) * advantage
    return slow_clipped(ratio, advantage)


def slow_k3(d: Tensor) -> Tensor:
    return (-d).exp() + d - 1


def slow_below(d: Tensor) -> Tensor:
    return -d if float(d.detach()) < 0 else 0 * d


def slow_gradient(
    policy: Policy, batch: TrainBatch, old: Sequence[Tensor], *, variant: str, penalty: Callable[[Tensor], Tensor]
) -> Tensor:
    """Args: old: each row's [T] log-probabilities before the first optimizer step."""
    total, num_tokens, num_rows = torch.zeros((), dtype=torch.float64), 0, 0
    sums: list[Tensor] = []
    means: list[Tensor] = []
    entropies: list[Tensor] = []
    for (micro, row), was in zip(rows_of(batch), old, strict=True):
        new, entropy = slow_logprobs(policy.causal_lm, micro, row)
        with policy.reference() as reference:
            ref, _ = slow_logprobs(reference, micro, row)
        length = len(new)
        beta = sum(
            WEIGHTS[name] * BETAS[name] for o, name in enumerate(batch.objectives) if bool(micro.is_scored[row, o])
        )
        row_gap = sum((new[t] - was[t] for t in range(length)), start=total) / length
        row_sum = torch.zeros((), dtype=torch.float64)
        for t in range(length):
            row_sum = row_sum + slow_policy_token(variant, new[t], was[t], row_gap, float(micro.advantages[row]))
            row_sum = row_sum + beta * penalty(new[t] - ref[t])
        sums.append(row_sum)
        means.append(row_sum / length)
        entropies.extend(entropy)
        num_tokens, num_rows = num_tokens + length, num_rows + 1
    if variant in ("grpo", "gspo", "sapo"):
        loss = sum(means, start=total) / num_rows
    elif variant == "dr_grpo":
        loss = sum(sums, start=total) / (num_rows * 16)
    else:
        loss = sum(sums, start=total) / num_tokens
    loss = loss - ENTROPY_COEFFICIENT * sum(entropies, start=total) / num_tokens
    learning = list(policy.trainable_parameters().values())
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, learning)])


@pytest.mark.parametrize(
    ("variant", "estimator", "penalty"),
    [
        ("dapo", "k3", slow_k3),
        ("grpo", "clamped", slow_below),
        ("gspo", "k2", lambda d: d * d / 2),
        ("cispo", "abs", lambda d: d if float(d.detach()) > 0 else -d),
        ("sapo", "k3", slow_k3),
        ("dr_grpo", "clamped", slow_below),
    ],
)
def test_the_second_windows_gradient_is_that_of_the_loss_written_out_token_by_token(
    tiny_model_dir: Path, variant: str, estimator: str, penalty: Callable[[Tensor], Tensor]
) -> None:
    has_clip = variant not in ("cispo", "sapo")
    loss = {"type": variant, "clip_low": CLIP, "clip_high": CLIP} if has_clip else variant
    update = update_of(loss, kl={"estimator": estimator}, iterations=2)
    batch = window_of(update, budget=40)
    policy = moved_policy(tiny_model_dir)
    updater = make_law_updater(policy, update, learning_rate=2e-2, eps=1e-8)  # far enough for the clip to act
    with torch.no_grad():
        old = [slow_logprobs(policy.causal_lm, micro, row)[0] for micro, row in rows_of(batch)]
    expected: list[Tensor] = []
    handle = updater.optimizer.register_step_pre_hook(
        lambda *_: expected.append(slow_gradient(policy, batch, old, variant=variant, penalty=penalty))
    )
    got, stats = windows_of(updater, batch)
    handle.remove()
    assert [relative(*pair) for pair in zip(got, expected, strict=True)] == pytest.approx([0.0, 0.0], abs=1e-5)
    assert not math.isclose(float(got[0].norm()), float(got[1].norm()), rel_tol=1e-2)
    if has_clip:
        assert stats.means["clip/low_frac"] > 0
        assert stats.means["clip/high_frac"] > 0
