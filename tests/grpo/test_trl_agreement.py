"""Our losses and advantages against TRL's own code, called with the same numbers.

`GivenLogprobs` and `GivenScores` stand in for a `GRPOTrainer`: they hold the attributes that its `_compute_loss` and
`_generate_and_score_completions` read, and answer the model's part (log-probabilities, completions, scores) with what
a test gives. The methods themselves are TRL's, unbound. Where the two sides agree, the inputs lie inside our clamps;
where they differ on purpose, a test of its own shows by how much, and says why.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from grpo.advantages import group_advantages
from grpo.update.kl import Estimator, kl_penalty
from grpo.update.losses import REDUCTIONS, Variant, policy_loss, policy_ratio, reduce_loss
from grpo.update.rollout_correction import correction_weights

BETA = 0.3
MAX_NEW_TOKENS = 11

Kl = Literal["none", "plain", "corrected"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A micro-batch."""

    logprobs: Tensor
    """[B, T] with gradient."""
    old_logprobs: Tensor
    """[B, T]"""
    ref_logprobs: Tensor
    """[B, T]"""
    advantages: Tensor
    """[B]"""
    mask: Tensor
    """[B, T] bool, at least one token a row."""


def make_rows(seed: int, *, rows: int = 5, width: int = 7, dtype: torch.dtype = torch.float64) -> Rows:
    """Ratios from 0.3 to 3.3, on both sides of every clip; log(policy/reference) within +-2.5, where k3 is free."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).mul(high - low).add(low).to(dtype)

    old = uniform(-8.0, -4.0, rows, width)
    logprobs = old + uniform(-1.2, 1.2, rows, width)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    return Rows(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=old,
        ref_logprobs=logprobs.detach() - uniform(-2.5, 2.5, rows, width),
        advantages=uniform(-2.0, 2.0, rows),
        mask=torch.arange(width) < lengths,
    )


class GivenLogprobs:
    """What `GRPOTrainer._compute_loss` reads of a trainer, for one loss type."""

    def __init__(self, logprobs: Tensor, *, loss_type: str, kl: Kl, **options: Any) -> None:
        """Args: options: epsilon_low, epsilon_high, delta, level, micro_batches."""
        self.logprobs = logprobs
        self.loss_type = loss_type
        self.importance_sampling_level = options.get("level", "token")
        self.epsilon_low, self.epsilon_high = options.get("epsilon_low", 0.2), options.get("epsilon_high", 0.2)
        self.beta = 0.0 if kl == "none" else BETA
        self.max_completion_length = MAX_NEW_TOKENS
        self.current_gradient_accumulation_steps = options.get("micro_batches", 1)
        self.args = SimpleNamespace(
            use_bias_correction_kl=kl == "corrected",
            delta=options.get("delta"),
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            steps_per_generation=options.get("micro_batches", 1),
        )
        self.model = SimpleNamespace(training=True)
        self.accelerator = SimpleNamespace(
            num_processes=1, gather=lambda values: values, reduce=lambda values, reduction: values
        )
        self.use_vllm = self.vllm_importance_sampling_correction = options.get("is_corrected", False)
        self.aux_loss_enabled = self._entropy_bonus_enabled = False
        self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
        self._metrics = {"train": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, *_: object, **__: object) -> tuple[Tensor, Tensor, None]:
        return self.logprobs, torch.zeros_like(self.logprobs), None


def trl_loss(
    rows: Rows, *, loss_type: str, kl: Kl, num_tokens: int | None = None, weights: Tensor | None = None, **options: Any
) -> Tensor:
    """TRL's loss of a micro-batch, from `GRPOTrainer._compute_loss` itself."""
    trainer = GivenLogprobs(rows.logprobs, loss_type=loss_type, kl=kl, is_corrected=weights is not None, **options)
    ids = torch.zeros_like(rows.mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": rows.mask.long(),
        "advantages": rows.advantages,
        "old_per_token_logps": rows.old_logprobs,
        "ref_per_token_logps": rows.ref_logprobs,
        "importance_sampling_ratio": weights,
        "num_items_in_batch": torch.tensor(num_tokens or int(rows.mask.sum())),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)  # pyright: ignore[reportArgumentType]


def our_loss(
    rows: Rows,
    *,
    variant: Variant,
    kl: Kl,
    estimator: Estimator = "k3",
    num_tokens: int | None = None,
    num_rows: int | None = None,
    weights: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Our loss of the same micro-batch: policy term + beta * penalty, reduced."""
    token_loss = policy_loss(
        rows.logprobs, rows.old_logprobs, rows.advantages, rows.mask, variant=variant, **options
    )  # [B, T]
    if weights is not None:
        token_loss = token_loss * weights
    if kl != "none":
        penalty = kl_penalty(rows.logprobs, rows.ref_logprobs, estimator=estimator, mask=rows.mask)
        if kl == "corrected":
            level = "sequence" if variant == "gspo" else "token"
            penalty = penalty * policy_ratio(rows.logprobs, rows.old_logprobs, rows.mask, level=level)
        token_loss = token_loss + BETA * penalty
    return reduce_loss(
        token_loss,
        rows.mask,
        num_tokens=num_tokens or int(rows.mask.sum()),
        reduction=REDUCTIONS[variant],
        num_rows=num_rows or len(rows.mask),
        max_new_tokens=MAX_NEW_TOKENS,
    )


def gradient(loss: Tensor, rows: Rows) -> Tensor:
    return torch.autograd.grad(loss, rows.logprobs)[0]


def assert_agree(ours: Tensor, theirs: Tensor, rows: Rows, *, tolerance: float) -> None:
    """Loss and gradient to the log-probabilities."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient(ours, rows), gradient(theirs, rows), rtol=tolerance, atol=tolerance)


CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}
TRL_CLIP: dict[str, Any] = {"epsilon_low": 0.2, "epsilon_high": 0.28}
PAIRS: list[tuple[Variant, dict[str, Any], dict[str, Any]]] = [
    ("grpo", CLIP, {"loss_type": "grpo", **TRL_CLIP}),
    ("bnpo", CLIP, {"loss_type": "bnpo", **TRL_CLIP}),
    ("dr_grpo", CLIP, {"loss_type": "dr_grpo", **TRL_CLIP}),
    ("dapo", CLIP, {"loss_type": "dapo", **TRL_CLIP}),
    ("grpo", {**CLIP, "delta": 1.5}, {"loss_type": "grpo", **TRL_CLIP, "delta": 1.5}),
    ("dapo", {**CLIP, "delta": 2.0}, {"loss_type": "dapo", **TRL_CLIP, "delta": 2.0}),
    ("cispo", {"max_ratio": 1.7}, {"loss_type": "cispo", "epsilon_high": 1.7}),  # TRL's epsilon_high is the bound here
    ("sapo", {}, {"loss_type": "sapo"}),
    ("gspo", CLIP, {"loss_type": "grpo", **TRL_CLIP, "level": "sequence"}),
    ("gspo", {**CLIP, "delta": 1.35}, {"loss_type": "grpo", **TRL_CLIP, "level": "sequence", "delta": 1.35}),
]
"""Our variant and options, and TRL's."""
NAMES = ["grpo", "bnpo", "dr_grpo", "dapo", "grpo-delta", "dapo-delta", "cispo", "sapo", "gspo", "gspo-delta"]


@pytest.mark.parametrize("kl", ["none", "plain", "corrected"])
@pytest.mark.parametrize(("variant", "options", "trl_options"), PAIRS, ids=NAMES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 6), width=st.integers(1, 8))
def test_losses_and_gradients_agree_with_trl(
    variant: Variant, options: dict[str, Any], trl_options: dict[str, Any], kl: Kl, seed: int, rows: int, width: int
) -> None:
    # TRL holds SAPO's temperatures in float32, where 1.05 is rounded
    for dtype, tolerance in ((torch.float64, 1e-6 if variant == "sapo" else 1e-12), (torch.float32, 1e-6)):
        given_rows = make_rows(seed, rows=rows, width=width, dtype=dtype)
        ours = our_loss(given_rows, variant=variant, kl=kl, **options)
        assert_agree(ours, trl_loss(given_rows, kl=kl, **trl_options), given_rows, tolerance=tolerance)


def test_the_drawn_rows_reach_every_branch_of_the_clip() -> None:
    rows = make_rows(0)
    ratio = policy_ratio(rows.logprobs, rows.old_logprobs, rows.mask)
    for is_branch in (ratio < 0.8, ratio > 1.28, ratio > 2.0):
        for is_side in (rows.advantages > 0, rows.advantages < 0):
            assert bool((is_branch & is_side[:, None] & rows.mask).any())


@pytest.mark.parametrize(
    ("variant", "options", "trl_options"), [pair for pair in PAIRS if pair[0] != "bnpo"]
)  # bnpo differs on purpose, see the next test
def test_a_window_of_equal_micro_batches_agrees_with_trls_accumulation(
    variant: Variant, options: dict[str, Any], trl_options: dict[str, Any]
) -> None:
    first, second = make_rows(1), make_rows(2)
    num_tokens = int(first.mask.sum() + second.mask.sum())
    for rows in (first, second):
        ours = our_loss(rows, variant=variant, kl="plain", num_tokens=num_tokens, num_rows=10, **options)
        theirs = trl_loss(rows, kl="plain", num_tokens=num_tokens, micro_batches=2, **trl_options)
        assert_agree(ours, theirs, rows, tolerance=1e-6 if variant == "sapo" else 1e-12)


def test_bnpo_differs_where_micro_batches_are_uneven() -> None:
    # on purpose: TRL averages over each micro-batch, so how a window is split decides how much a token counts
    rows = make_rows(3)
    short = torch.arange(7) < torch.tensor([[1], [1], [1], [7], [7]])  # 3 tokens, then 14
    window = Rows(
        logprobs=rows.logprobs,
        old_logprobs=rows.old_logprobs,
        ref_logprobs=rows.ref_logprobs,
        advantages=rows.advantages,
        mask=short,
    )

    def part(start: int, end: int) -> Rows:
        return Rows(
            logprobs=rows.logprobs[start:end],
            old_logprobs=rows.old_logprobs[start:end],
            ref_logprobs=rows.ref_logprobs[start:end],
            advantages=rows.advantages[start:end],
            mask=short[start:end],
        )

    parts = [part(0, 3), part(3, 5)]
    ours = sum(gradient(our_loss(p, variant="bnpo", kl="none", num_tokens=17), rows) for p in parts)
    theirs = sum(gradient(trl_loss(p, loss_type="bnpo", kl="none", micro_batches=2), rows) for p in parts)
    whole = gradient(our_loss(window, variant="bnpo", kl="none"), rows)
    assert isinstance(ours, Tensor)
    assert isinstance(theirs, Tensor)
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-14)
    # a token of the first part: 1/17 of the window's loss with us, 1/3 * 1/2 with TRL
    torch.testing.assert_close(theirs[:3], whole[:3] * 17 / 6, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(theirs[3:], whole[3:] * 17 / 28, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kl", ["none", "plain", "corrected"])
def test_a_rollout_correction_weighs_the_policy_term_alone_as_in_trl(kl: Kl) -> None:
    rows = make_rows(4)
    sampler_logprobs = rows.old_logprobs - 0.5 * (make_rows(5).old_logprobs + 6)  # gaps within one nat
    weights = correction_weights(rows.old_logprobs, sampler_logprobs, rows.mask)
    ours = our_loss(rows, variant="dapo", kl=kl, weights=weights, **CLIP)
    theirs = trl_loss(rows, loss_type="dapo", kl=kl, weights=weights, **TRL_CLIP)
    assert_agree(ours, theirs, rows, tolerance=1e-12)


@pytest.mark.parametrize(("estimator", "value", "slope"), [("k3", math.exp(10) - 11, -1.0), ("clamped", 10.0, -1.0)])
def test_a_token_40_nats_from_its_reference_explodes_in_trl_and_not_here(
    estimator: Estimator, value: float, slope: float
) -> None:
    # on purpose: one token that the reference finds likely and the policy all but impossible would decide the step
    logprobs = torch.tensor([[-41.0]], dtype=torch.float64, requires_grad=True)
    rows = Rows(
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),
        ref_logprobs=torch.tensor([[-1.0]], dtype=torch.float64),
        advantages=torch.zeros(1, dtype=torch.float64),
        mask=torch.ones(1, 1, dtype=torch.bool),
    )
    theirs = trl_loss(rows, loss_type="dapo", kl="plain")
    assert theirs.item() == pytest.approx(BETA * (math.exp(40) - 41))  # 7e16
    assert gradient(theirs, rows).item() == pytest.approx(BETA * (1 - math.exp(40)))
    ours = our_loss(rows, variant="dapo", kl="plain", estimator=estimator)
    assert ours.item() == pytest.approx(BETA * value)
    assert gradient(ours, rows).item() == pytest.approx(BETA * slope)


def test_the_default_penalty_differs_from_k3_where_both_are_tame() -> None:
    # on purpose: one-sided and linear. d = -1: 1 with slope -1, k3: e - 2 = 0.718 with slope 1 - e; d = 1: none at all
    difference = torch.tensor([[-1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    penalty = kl_penalty(difference, torch.zeros(1, 2, dtype=torch.float64))
    assert penalty.tolist() == [[1.0, 0.0]]
    assert torch.autograd.grad(penalty.sum(), difference)[0].tolist() == [[-1.0, 0.0]]


def test_a_log_ratio_beyond_20_is_bounded_here_and_overflows_in_trl() -> None:
    # on purpose: exp(100) is infinite in float32; a bad token would make the whole window's loss infinite
    old = torch.tensor([[-101.0]])
    rows = Rows(
        logprobs=torch.tensor([[-1.0]], requires_grad=True),
        old_logprobs=old,
        ref_logprobs=old,
        advantages=torch.tensor([-1.0]),
        mask=torch.ones(1, 1, dtype=torch.bool),
    )
    assert trl_loss(rows, loss_type="dapo", kl="none").item() == math.inf
    assert our_loss(rows, variant="dapo", kl="none").item() == pytest.approx(math.exp(20), rel=1e-6)


class GivenScores:
    """What `GRPOTrainer._generate_and_score_completions` reads of a trainer, for scores that are already there."""

    def __init__(self, scores: Tensor, weights: Tensor, aggregation: str) -> None:
        """Args: scores: [P, K, O], NaN where there is no verdict."""
        self.scores = scores
        self.num_generations = scores.shape[1]
        self.multi_objective_aggregation, self.scale_rewards = aggregation, "group"
        self.reward_weights = weights
        self.reward_funcs = self.reward_func_names = [f"o{o}" for o in range(scores.shape[2])]
        self.args = SimpleNamespace(
            per_device_train_batch_size=1,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        )
        self.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
        self.accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=0, gather=lambda values: values)
        self.num_iterations, self.beta, self.use_vllm = 1, 0.0, False
        self.environment_factories = self.environments = self.tools = self.pad_to_multiple_of = None
        self.mask_truncated_completions = self.log_multimodal = False
        self._tokenizer = SimpleNamespace(pad_token_id=0)
        self._metrics = {"train": defaultdict(list)}
        self._logs: dict[str, Any] = {"prompt": [], "completion": [], "advantages": []}
        self._logs |= {"rewards": defaultdict(list), "extra": defaultdict(list)}
        self._pending_extra_logs, self._pending_metrics = defaultdict(list), defaultdict(list)

    def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
        ids = [[1]] * len(prompts)
        return ids, ids, None, ["x"] * len(prompts), None, {}, None, None

    def _calculate_rewards(self, *_: object) -> Tensor:
        return self.scores.flatten(0, 1)  # [P * K, O]


def trl_advantages(scores: Tensor, weights: Tensor, aggregation: str = "normalize_then_sum") -> Tensor:
    """[P, K] TRL's advantages of scores [P, K, O]."""
    trainer = GivenScores(scores, weights, aggregation)
    inputs = [{"prompt": f"p{p}"} for p in range(scores.shape[0]) for _ in range(scores.shape[1])]
    output = GRPOTrainer._generate_and_score_completions(trainer, inputs)  # pyright: ignore[reportArgumentType]
    return output["advantages"].view(scores.shape[:2])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), groups=st.integers(1, 4), size=st.integers(2, 6), objectives=st.integers(2, 4))
def test_decoupled_advantages_are_trls_normalize_then_sum(seed: int, groups: int, size: int, objectives: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(groups, size, objectives, generator=generator, dtype=torch.float64) * 3
    weights = torch.rand(objectives, generator=generator, dtype=torch.float64) + 0.1
    ours = group_advantages(scores, weights, combine="decoupled")
    assert not bool(ours.is_flat.any())  # with a flat group we differ on purpose
    torch.testing.assert_close(ours.combined, trl_advantages(scores, weights), rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), groups=st.integers(1, 4), size=st.integers(2, 6), objectives=st.integers(1, 3))
def test_summed_advantages_are_trls_sum_then_normalize(seed: int, groups: int, size: int, objectives: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(groups, size, objectives, generator=generator, dtype=torch.float64) * 3
    weights = torch.rand(objectives, generator=generator, dtype=torch.float64) + 0.1
    ours = group_advantages(scores, weights, combine="summed")
    torch.testing.assert_close(
        ours.combined, trl_advantages(scores, weights, "sum_then_normalize"), rtol=1e-6, atol=1e-6
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), groups=st.integers(1, 4), size=st.integers(2, 6))
def test_missing_verdicts_of_the_decoupled_form_are_treated_alike(seed: int, groups: int, size: int) -> None:
    # both leave a missing verdict out of its group's mean and std, and a row without any out of the batch's
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(groups, size, 2, generator=generator, dtype=torch.float64)
    scores = scores.masked_fill(torch.rand(groups, size, 2, generator=generator) < 0.25, math.nan)
    ours = group_advantages(scores, torch.ones(2, dtype=torch.float64))
    if int(ours.valid.any(dim=-1).sum()) >= 2:  # for a single row, TRL warns of a std of nothing
        theirs = trl_advantages(scores, torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(ours.combined, theirs, rtol=1e-6, atol=1e-6)


def test_a_missing_verdict_is_a_zero_in_trls_sum_and_a_missing_row_here() -> None:
    # on purpose: a judge that timed out says nothing on the completion; TRL's nansum makes it the worst of its group
    scores = torch.tensor([[[1.0, 1.0], [0.0, math.nan], [1.0, 0.0], [0.0, 1.0]]])
    # TRL: r = [2, 0, 1, 1], mean 1, std sqrt(2/3): 1 / (0.8164966 + 1e-4) = 1.2245948
    theirs = trl_advantages(scores, torch.ones(2), "sum_then_normalize")
    assert theirs[0].tolist() == pytest.approx([1.2245948, -1.2245948, 0.0, 0.0], abs=1e-6)
    # ours: r = [2, missing, 1, 1], mean 4/3, std sqrt(1/3): (2/3) / (0.5773503 + 1e-4) = 1.1545005
    ours = group_advantages(scores, torch.ones(2), combine="summed").combined
    assert ours[0].tolist() == pytest.approx([1.1545005, 0.0, -0.5772502, -0.5772502], abs=1e-6)


def test_a_flat_group_of_large_scores_gets_an_advantage_from_trls_rounding_and_none_here() -> None:
    # on purpose: the float32 mean of K times 1000.1 is off by 6e-5, which 1 / (std + 1e-4) turns into a tenth and more
    noise: list[float] = []
    for size in (3, 6, 7, 9):
        generator = torch.Generator().manual_seed(size)
        scores = torch.stack([torch.full((size, 2), 1000.1), torch.rand(size, 2, generator=generator)])  # [2, K, 2]
        noise.append(trl_advantages(scores, torch.ones(2))[0].abs().max().item())
        assert group_advantages(scores, torch.ones(2)).combined[0].tolist() == [0.0] * size
    assert max(noise) > 0.1
