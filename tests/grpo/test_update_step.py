"""One window: what an optimizer step changes, and that no way of cutting the window changes it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import END, full_training, make_batch, make_group, make_policy, make_updater
from transformers import MistralConfig, MistralForCausalLM

from grpo.batching import MicroBatch, TrainBatch
from grpo.config import KlConfig, UpdateConfig
from grpo.rollout.base import SamplingParams
from grpo.runtime.filling import filler
from grpo.runtime.policy import Policy, dropout_off
from grpo.types import ScoredGroup
from grpo.update.forward import policy_pass, reference_logprobs
from grpo.update.shared_prefix import can_share_prompts, predicting_states, whole_row_states

GROUPS = [
    make_group([{"a": 1.0}, {"a": 0.0}, {"a": 0.0}, {"a": 1.0}], lengths=[3, 7, 2, 5], prompt_length=6, seed=1),
    make_group([{"a": 0.0}, {"a": 1.0}, {"a": None}, {"a": 0.0}], lengths=[4, 1, 6, 8], prompt_length=3, seed=2),
    make_group([{"a": 1.0}, {"a": 1.0}, {"a": 1.0}, {"a": 1.0}], lengths=[2, 2, 9, 3], prompt_length=9, seed=3),
]


def batch_of(
    groups: Sequence[ScoredGroup] = GROUPS, *, budget: int = 8192, weights: dict[str, float] | None = None
) -> TrainBatch:
    return make_batch(groups, budget=budget, weights=weights)


def snapshot(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def row_of(micro: MicroBatch, row: int) -> tuple[torch.Tensor, int, int]:
    """[1, L] prompt and completion without padding, and both lengths."""
    group = int(micro.prompt_of_row[row])
    prompt, length = int(micro.prompt_mask[group].sum()), int(micro.completion_mask[row].sum())
    ids = torch.cat([micro.prompt_ids[group, :prompt], micro.completion_ids[row, :length]])
    return ids[None], prompt, length


def gradients(policy: Policy) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.trainable_parameters().values() if p.grad is not None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_changes_exactly_the_trainable_parameters(tiny_model_dir: Path, dtype: torch.dtype) -> None:
    policy = make_policy(tiny_model_dir, dtype=dtype)
    learning = set(policy.trainable_parameters())
    updater = make_updater(policy)
    start = snapshot(policy)
    updater.step(batch_of())
    after_one = {name for name, value in snapshot(policy).items() if not torch.equal(value, start[name])}
    # LoRA's B starts at 0, so A has gradient 0 in the first step and moves in the second
    assert after_one == {name for name in learning if "lora_B" in name}
    updater.step(batch_of())
    after_two = {name for name, value in snapshot(policy).items() if not torch.equal(value, start[name])}
    assert after_two == learning


def test_full_training_changes_every_parameter_and_not_its_reference(tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir, trainable=full_training())
    start = snapshot(policy)
    batch = batch_of()
    before = reference_logprobs(policy, batch.micro_batches[0], make_params())
    make_updater(policy).step(batch)
    changed = {name for name, value in snapshot(policy).items() if not torch.equal(value, start[name])}
    assert changed == set(start)
    assert torch.equal(reference_logprobs(policy, batch.micro_batches[0], make_params()), before)


def make_params(**changes: float) -> SamplingParams:
    return replace(SamplingParams(end_token_ids=(END,), max_new_tokens=16), **changes)


def test_kl_is_exactly_0_before_the_first_step_and_above_0_after(tiny_model_dir: Path) -> None:
    updater = make_updater(make_policy(tiny_model_dir))
    first = updater.step(batch_of())
    assert first.means["kl/a"] == 0.0
    assert first.means["kl/a/penalty"] == 0.0
    second = updater.step(batch_of())
    assert second.means["kl/a"] > 0.0
    assert second.kl_max["a"] >= second.means["kl/a"]


def test_a_step_makes_completions_with_positive_advantage_more_likely(tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir)
    batch = batch_of()
    micro = batch.micro_batches[0]
    updater = make_updater(policy)
    start = policy_pass(policy, micro, make_params()).logprobs.detach().sum(dim=1)
    for _ in range(3):
        updater.step(batch)
    moved = policy_pass(policy, micro, make_params()).logprobs.detach().sum(dim=1) - start  # [B]
    assert float((moved * micro.advantages).sum()) > 0
    assert float(moved[micro.advantages > 0].mean()) > float(moved[micro.advantages < 0].mean())


@pytest.mark.parametrize("budget", [1, 20, 40, 60])
def test_the_gradient_does_not_depend_on_how_the_window_is_cut(tiny_model_dir: Path, budget: int) -> None:
    whole, cut = make_policy(tiny_model_dir), make_policy(tiny_model_dir)
    for policy, tokens in ((whole, 8192), (cut, budget)):
        updater = make_updater(policy, learning_rate=1e-3)
        updater.step(batch_of(budget=8192))  # off the reference, so that the KL term pulls too
        parts = batch_of(budget=tokens)
        assert len(parts.micro_batches) == 1 if tokens == 8192 else len(parts.micro_batches) > 1
        updater.step(parts)
    difference = (gradients(whole) - gradients(cut)).norm() / gradients(whole).norm()
    assert float(difference) < 1e-5


def test_two_windows_with_different_splits_and_orders_give_the_same_weights(tiny_model_dir: Path) -> None:
    results = []
    for budget, order in ((8192, 0), (30, 1), (15, 2)):
        policy = make_policy(tiny_model_dir)
        updater = make_updater(policy, learning_rate=1e-3)
        for _ in range(2):
            batch = batch_of(budget=budget)
            micro = list(batch.micro_batches)
            random.Random(order).shuffle(micro)
            updater.step(replace(batch, micro_batches=tuple(micro)))
        results.append(torch.cat([p.detach().flatten() for p in policy.trainable_parameters().values()]))
    for other in results[1:]:
        assert torch.allclose(results[0], other, rtol=0, atol=1e-6)


def test_the_windows_gradient_is_that_of_the_slow_loss_written_out_token_by_token(tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir)
    updater = make_updater(policy, beta=0.5, update=UpdateConfig(kl=KlConfig(estimator="k3")), learning_rate=1e-3)
    updater.step(batch_of())  # away from the reference
    batch = batch_of(budget=30)
    expected = slow_gradient(policy, batch, beta=0.5)
    updater.step(batch)  # the norm is clipped to 1: compare directions and lengths separately
    got = gradients(policy)
    scale = min(1.0, 1.0 / float(expected.norm()))
    assert float((got - expected * scale).norm() / (expected * scale).norm()) < 1e-4


def slow_gradient(policy: Policy, batch: TrainBatch, *, beta: float) -> torch.Tensor:
    """Row by row without padding: logits of the whole row, log_softmax, the loss summed over its tokens in a loop."""
    total = torch.zeros(())
    count = 0
    model = policy.causal_lm
    for micro in batch.micro_batches:
        for row in range(len(micro.prompt_of_row)):
            ids, prompt, length = row_of(micro, row)
            logprobs = model(ids).logits[0].log_softmax(-1)
            with policy.reference() as reference:
                ref = reference(ids).logits[0].log_softmax(-1)
            for t in range(length):
                token = int(ids[0, prompt + t])
                new, old = logprobs[prompt + t - 1, token], logprobs[prompt + t - 1, token].detach()
                d = new - ref[prompt + t - 1, token]
                k3 = torch.exp(-d) + d - 1
                total = total - torch.exp(new - old) * micro.advantages[row] + beta * k3
                count += 1
    loss = total / count
    learning = list(policy.trainable_parameters().values())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, learning)])


def test_a_row_without_any_verdict_changes_nothing(tiny_model_dir: Path) -> None:
    with_row, without = make_policy(tiny_model_dir), make_policy(tiny_model_dir)
    group = make_group([{"a": 1.0}, {"a": 0.0}, {"a": None}], lengths=[3, 4, 5], seed=7)
    smaller = ScoredGroup(
        rollout=replace(group.rollout, completions=group.rollout.completions[:2]), verdicts=group.verdicts[:2]
    )
    make_updater(with_row).step(batch_of([group]))
    make_updater(without).step(batch_of([smaller]))
    assert torch.equal(gradients(with_row), gradients(without))


def test_prompt_tokens_get_no_gradient(tiny_model_dir: Path) -> None:
    """Only the last prompt token's state and those of the completion predict a completion token."""
    policy = make_policy(tiny_model_dir)
    micro = batch_of().micro_batches[0]
    (states,) = kept_outputs(policy, micro)
    touched = (states.grad.abs().sum(dim=-1) > 0)[0].tolist()
    expected: list[bool] = []
    for prompt_tokens in micro.prompt_mask.sum(dim=1).tolist():
        expected += [False] * (prompt_tokens - 1) + [True]
    expected += [True] * int((micro.completion_mask.sum(dim=1) - 1).sum())  # the last token predicts nothing
    assert touched == expected + [False] * filler(len(expected))  # nor does what fills up the row
    assert filler(len(expected)) > 0


def kept_outputs(policy: Policy, micro: MicroBatch) -> list[Any]:
    """What the model's last norm gave out, [1, N, H] of a packed row, with its gradient."""
    outputs: list[Any] = []

    def keep(_: object, __: object, output: torch.Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    norm: Any = policy.causal_lm.base_model.norm
    hook = norm.register_forward_hook(keep)
    policy_pass(policy, micro, make_params()).logprobs.sum().backward()
    hook.remove()
    return outputs


@pytest.mark.parametrize("budget", [1, 40, 8192])
def test_sharing_a_prompt_equals_whole_rows_in_value_and_gradient(tiny_model_dir: Path, budget: int) -> None:
    policy = make_policy(tiny_model_dir)
    make_updater(policy).step(batch_of())
    learning = list(policy.trainable_parameters().values())
    for micro in batch_of(budget=budget).micro_batches:
        found = []
        for states in (predicting_states, whole_row_states):
            chosen = states(policy.causal_lm, micro)[micro.completion_mask]  # [N, H]
            loss = (chosen * torch.linspace(-1, 1, chosen.numel()).view_as(chosen)).sum()
            grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, learning)])
            found.append((chosen.detach(), grad))
        (shared, shared_grad), (rows, rows_grad) = found
        assert torch.allclose(shared, rows, atol=1e-5)
        assert float((shared_grad - rows_grad).norm() / rows_grad.norm()) < 1e-5


def sliding_window_model() -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=4,
    )
    return MistralForCausalLM(config)


def test_a_model_with_a_sliding_window_is_given_whole_rows_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = Policy(sliding_window_model(), full_training(), seed=0)
    assert not can_share_prompts(policy.causal_lm)
    updater = make_updater(policy)
    for _ in range(2):
        updater.step(batch_of())
    (line,) = [record.getMessage() for record in caplog.records if "whole rows" in record.getMessage()]
    assert line.startswith("MistralForCausalLM is given whole rows")


def test_a_model_that_counts_positions_otherwise_is_found_on_the_first_batch_and_given_whole_rows(
    tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def learned(policy: Policy, *, breaks: bool) -> torch.Tensor:
        """Args: breaks: positions go on in a packed row, as in a model whose own code counts them so."""

        def begin_anew(_: torch.nn.Module, __: tuple[()], inputs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
            if breaks and "packed_row" in inputs:
                inputs["position_ids"] = torch.arange(inputs["position_ids"].shape[1])[None]
            return (), inputs

        with torch.no_grad():
            for name, parameter in policy.causal_lm.named_parameters():
                if name.endswith("base_layer.weight"):
                    parameter.mul_(20)  # random weights are small, and look at no position
        policy.causal_lm.base_model.register_forward_pre_hook(begin_anew, with_kwargs=True)
        make_updater(policy).step(batch_of())
        return torch.cat([parameter.detach().flatten() for parameter in policy.trainable_parameters().values()])

    broken, sound = make_policy(tiny_model_dir), make_policy(tiny_model_dir)
    in_rows = learned(broken, breaks=True)
    (line,) = [record.getMessage() for record in caplog.records if "whole rows" in record.getMessage()]
    assert "log-probabilities differ by" in line
    assert (broken.shares_prompts, sound.shares_prompts) == (False, None)
    torch.testing.assert_close(in_rows, learned(sound, breaks=False), rtol=0, atol=1e-5)
    assert sound.shares_prompts


def test_each_objective_pulls_its_own_rows_with_its_own_beta(tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir)
    groups = [make_group([{"a": 1.0}, {"a": 0.0}], seed=1), make_group([{"b": 1.0}, {"b": 0.0}], seed=2)]
    updater = make_updater(policy, objectives=("a", "b"))
    batch = batch_of(groups, weights={"a": 1.0, "b": 1.0})
    updater.step(batch)
    stats = updater.step(batch)
    assert set(stats.kl_max) == {"a", "b"}
    assert stats.means["kl/a"] != stats.means["kl/b"]


def test_a_non_finite_loss_takes_no_optimizer_step_and_is_counted(tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir)
    start = snapshot(policy)
    batch = batch_of()
    poisoned = replace(batch.micro_batches[0], advantages=torch.full_like(batch.micro_batches[0].advantages, math.nan))
    updater = make_updater(policy)
    for count in (1, 2):
        skipped = updater.step(replace(batch, micro_batches=(poisoned,))).skipped
        assert skipped is not None
        assert skipped.in_a_row == count
        assert "first in what it is given: the advantages" in skipped.cause
    assert all(torch.equal(value, start[name]) for name, value in snapshot(policy).items())
    assert updater.step(batch).skipped is None
    assert updater.non_finite_in_a_row == 0


@pytest.mark.parametrize("place", ["layers.0.mlp.down_proj", "layers.1.self_attn.o_proj"])
def test_a_skipped_step_names_the_first_module_whose_numbers_were_not_finite(tiny_model_dir: Path, place: str) -> None:
    policy = make_policy(tiny_model_dir)
    module = policy.causal_lm.base_model.get_submodule(place)

    def poison(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        return output * math.nan

    handle = module.register_forward_hook(poison)
    skipped = make_updater(policy).step(batch_of()).skipped
    handle.remove()
    assert skipped is not None
    assert f"{place} (its output)" in skipped.cause


def test_a_gradient_that_is_not_finite_skips_the_step_and_names_where_it_began(tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir)
    start = snapshot(policy)
    module = policy.causal_lm.base_model.get_submodule("layers.1.mlp")

    def poison(_: object, __: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)

    handle = module.register_forward_hook(poison)
    skipped = make_updater(policy).step(batch_of()).skipped
    handle.remove()
    assert skipped is not None
    assert skipped.micro_batch == 0
    assert "is not finite; first in" in skipped.cause
    assert "layers.1.mlp" in skipped.cause
    assert all(torch.equal(value, start[name]) for name, value in snapshot(policy).items())


def test_a_gradient_whose_norm_overflows_skips_the_step_instead_of_being_clipped_to_zero(tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir)
    updater = make_updater(policy)
    updater.step(batch_of())  # the optimizer has momentum: a gradient of zeros would move the weights
    start = snapshot(policy)
    batch = batch_of()
    huge = tuple(replace(micro, advantages=micro.advantages * 1e25) for micro in batch.micro_batches)
    stats = updater.step(replace(batch, micro_batches=huge))
    assert stats.skipped is not None
    assert "its norm is not" in stats.skipped.cause
    assert stats.grad_norm is None
    assert all(torch.equal(value, start[name]) for name, value in snapshot(policy).items())


def test_the_adapter_is_on_again_after_the_reference_pass_raised(tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir)
    updater = make_updater(policy)
    updater.step(batch_of())
    micro = batch_of().micro_batches[0]
    with torch.no_grad():
        adapted = policy_pass(policy, micro, make_params()).logprobs
    with pytest.raises(RuntimeError, match="on purpose"), policy.reference():
        raise RuntimeError("on purpose")
    with torch.no_grad():
        assert torch.equal(policy_pass(policy, micro, make_params()).logprobs, adapted)
    assert not torch.equal(reference_logprobs(policy, micro, make_params()), adapted)


def test_dropout_is_off_in_train_mode_and_restored_afterwards() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).train()
    model[0].attention_dropout = 0.25  # a rate kept as a number, as attention layers do
    with dropout_off(model):
        assert model.training
        assert (model[1].p, model[0].attention_dropout) == (0.0, 0.0)
    assert (model[1].p, model[0].attention_dropout) == (0.5, 0.25)


def test_the_temperature_and_the_penalties_of_the_sampling_law_are_replayed(tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir)
    micro = batch_of([make_group([{"a": 1.0}, {"a": 0.0}], lengths=[4, 6], seed=5)]).micro_batches[0]
    params = make_params(temperature=0.7, presence_penalty=0.5, frequency_penalty=0.25)
    with torch.no_grad():
        got = policy_pass(policy, micro, params)
    for row in range(2):
        ids, prompt, length = row_of(micro, row)
        with torch.no_grad():
            logits = policy.causal_lm(ids).logits[0].clone()
        for t in range(length):
            place = logits[prompt + t - 1].clone()
            plain = (place / 0.7).log_softmax(-1)
            for earlier in range(t):
                place[ids[0, prompt + earlier]] -= 0.25
            for token in {int(ids[0, prompt + earlier]) for earlier in range(t)}:
                place[token] -= 0.5
            token = int(ids[0, prompt + t])
            assert float(got.logprobs[row, t]) == pytest.approx(float((place / 0.7).log_softmax(-1)[token]), abs=1e-5)
            assert float(got.plain_logprobs[row, t]) == pytest.approx(float(plain[token]), abs=1e-5)


def test_each_step_is_taken_with_the_schedules_rate(tiny_model_dir: Path) -> None:
    updater = make_updater(make_policy(tiny_model_dir), learning_rate=0.4, schedule="linear")
    # the last of 4 steps: 1/4 of the rate is left
    assert updater.step(batch_of(), step=3, steps=4).learning_rate == pytest.approx(0.1)
    assert updater.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
