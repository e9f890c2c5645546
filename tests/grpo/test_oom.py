"""Memory that runs out in an update: the window is redone in smaller micro-batches, with the same gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import END, make_batch, make_group, make_policy, make_updater
from run_builders import Notebook, Runs, metrics_of
from torch import nn

from grpo.batching import TrainBatch, parts_within
from grpo.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from grpo.config import GradientsConfig, KlConfig, RolloutCorrectionConfig, UpdateConfig
from grpo.errors import OutOfMemory
from grpo.rollout.base import SamplingParams
from grpo.runtime.out_of_memory import is_out_of_memory
from grpo.runtime.policy import Policy
from grpo.update.out_of_memory import MAX_HALVINGS, Shortage, halved_budget
from grpo.update.step import Updater, UpdateStats

GROUPS = [
    make_group([{"a": 1.0}, {"a": 0.0}, {"a": 0.0}, {"a": 1.0}], lengths=[3, 7, 2, 5], prompt_length=6, seed=1),
    make_group([{"a": 0.0}, {"a": 1.0}, {"a": None}, {"a": 0.0}], lengths=[4, 1, 6, 8], prompt_length=3, seed=2),
    make_group([{"a": 1.0}, {"a": 1.0}, {"a": 1.0}, {"a": 0.0}], lengths=[2, 2, 9, 3], prompt_length=9, seed=3),
]
NUCLEUS = SamplingParams(end_token_ids=(END,), max_new_tokens=16, top_p=0.8, presence_penalty=0.5)
Fails = Callable[[int], bool]
"""Rows of a pass -> whether there is no memory for it."""


def run_out() -> None:
    """What torch's CPU allocator raises, raised by it."""
    torch.empty(2**56, dtype=torch.uint8)


def fail_forward(policy: Policy, fails: Fails) -> None:
    """No memory for a pass where `fails`."""

    def before(module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        if fails(len(named["packed_row"].predicting)):
            run_out()

    policy.causal_lm.base_model.register_forward_pre_hook(before, with_kwargs=True)


def fail_backward(policy: Policy, fails: Fails) -> None:
    """The same on the way back, when the graph is there and other micro-batches have left their gradients."""

    def after(module: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad and fails(len(named["packed_row"].predicting)):
            states.register_hook(lambda gradient: run_out())

    policy.causal_lm.get_decoder().layers[0].register_forward_hook(after, with_kwargs=True)


class Once:
    """Fails at the nth pass of more than so many rows, and at no other."""

    def __init__(self, *, rows: int, at: int = 1) -> None:
        self.rows, self.left = rows, at

    def __call__(self, rows: int) -> bool:
        self.left -= rows > self.rows
        return rows > self.rows and self.left == 0


def batch_of(budget: int = 8192) -> TrainBatch:
    return make_batch(GROUPS, budget=budget)


def learned(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.trainable_parameters().items()}


def gradient_of(policy: Policy) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.trainable_parameters().values() if p.grad is not None])


def stepped(
    model_dir: Path,
    batch: TrainBatch,
    inject: Callable[[Policy], None] = lambda policy: None,
    *,
    update: UpdateConfig | None = None,
    params: SamplingParams | None = None,
) -> tuple[UpdateStats, Updater]:
    """Two steps, so that LoRA's A learns too."""
    policy = make_policy(model_dir)
    updater = make_updater(policy, update=update, params=params, max_grad_norm=1e6)
    updater.step(batch)
    inject(policy)
    return updater.step(batch), updater


def assert_same_step(found: tuple[UpdateStats, Updater], expected: tuple[UpdateStats, Updater]) -> None:
    """Gradient and parameters but for the order of sums, and what the step says of itself."""
    (stats, updater), (wanted, plain) = found, expected
    scale = float(gradient_of(plain.policy).abs().max())
    assert scale > 1e-4
    torch.testing.assert_close(gradient_of(updater.policy), gradient_of(plain.policy), rtol=0, atol=1e-5 * scale)
    for name, value in learned(plain.policy).items():
        # Adam's second step is close to lr * sign(gradient): a rounding of an entry near 0 moves it by some of the lr
        torch.testing.assert_close(learned(updater.policy)[name], value, rtol=0, atol=1e-2 * 1e-2)
    assert stats.means == pytest.approx(dict(wanted.means), rel=1e-4, abs=1e-6)
    assert stats.kl_max == pytest.approx(dict(wanted.kl_max), rel=1e-3, abs=1e-6)
    assert (stats.num_tokens, stats.num_forced) == (wanted.num_tokens, wanted.num_forced)
    assert stats.sampler_ratio_p99 == pytest.approx(wanted.sampler_ratio_p99, rel=1e-4)


@pytest.mark.parametrize("inject", [fail_forward, fail_backward], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "update",
    [
        UpdateConfig(),
        UpdateConfig(iterations=2, correction=RolloutCorrectionConfig(level="sequence")),
        UpdateConfig(kl=KlConfig(estimator="k1", kl_in="reward"), iterations=2),
        UpdateConfig(gradients=GradientsConfig(cosine_every=1)),
    ],
    ids=["plain", "two windows, corrected", "KL in the reward", "gradients apart"],
)
def test_weights_after_a_step_that_ran_out_of_memory_are_those_of_one_that_did_not(
    tiny_model_dir: Path, update: UpdateConfig, inject: Callable[[Policy, Fails], None]
) -> None:
    found = stepped(tiny_model_dir, batch_of(), lambda policy: inject(policy, lambda rows: rows > 3), update=update)
    assert found[0].num_halvings > 0
    assert_same_step(found, stepped(tiny_model_dir, batch_of(), update=update))


def test_the_redone_window_is_bit_for_bit_one_of_smaller_micro_batches(tiny_model_dir: Path) -> None:
    batch = batch_of()
    found = stepped(tiny_model_dir, batch, lambda policy: fail_forward(policy, Once(rows=6)))
    assert found[0].num_halvings == 1
    (whole,) = batch.micro_batches
    smaller = replace(
        batch,
        micro_batches=tuple(whole.rows(rows) for rows in parts_within(whole, found[1].micro_batch_tokens)),
    )
    policy = make_policy(tiny_model_dir)
    updater = make_updater(policy, max_grad_norm=1e6)
    updater.step(batch)
    updater.step(smaller)
    assert len(smaller.micro_batches) > 1
    assert all(torch.equal(learned(found[1].policy)[name], value) for name, value in learned(policy).items())


@pytest.mark.parametrize("at", [1, 2], ids=["first window", "second window"])
def test_what_the_first_window_fixed_outlives_a_failure_in_the_second(tiny_model_dir: Path, at: int) -> None:
    """Old log-probabilities and the sets that the filter kept are those of the weights before the step. Each window has
    two passes of all eleven rows, the first the reference's."""
    update = UpdateConfig(iterations=2)
    found = stepped(
        tiny_model_dir,
        batch_of(),
        lambda policy: fail_backward(policy, Once(rows=6, at=at)),
        update=update,
        params=NUCLEUS,
    )
    assert found[0].num_halvings == 1
    assert_same_step(found, stepped(tiny_model_dir, batch_of(), update=update, params=NUCLEUS))


def test_a_single_completion_that_does_not_fit_ends_the_run_and_changes_nothing(tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir)
    updater = make_updater(policy)
    before = learned(policy)
    fail_forward(policy, lambda rows: True)
    with pytest.raises(OutOfMemory, match=r"a single completion.*`grpo plan RECIPE`"):
        updater.step(batch_of())
    assert all(torch.equal(before[name], value) for name, value in learned(policy).items())
    assert not updater.optimizer.state_dict()["state"]


def test_halving_ends_after_eight_in_one_step() -> None:
    shortage = Shortage(cause="no memory", num_rows=64, largest_tokens=10**6)
    budget = 10**6
    for number in range(MAX_HALVINGS):
        budget = halved_budget(budget, [shortage], num_halvings=number)
    assert budget == 10**6 // 2**8
    with pytest.raises(OutOfMemory, match="8 halvings"):
        halved_budget(budget, [shortage], num_halvings=MAX_HALVINGS)


def test_a_budget_above_every_micro_batch_is_halved_from_the_largest() -> None:
    shortages = [Shortage(cause="", num_rows=4, largest_tokens=tokens) for tokens in (600, 400)]
    assert halved_budget(8192, shortages, num_halvings=0) == 200


@pytest.mark.parametrize("budget", [1, 20, 41, 60, 200])
def test_parts_hold_every_row_once_within_the_budget_or_alone(budget: int) -> None:
    (micro,) = batch_of().micro_batches
    parts = parts_within(micro, budget)
    assert torch.cat(parts).tolist() == list(range(11))
    for rows in parts:
        part = micro.rows(rows)
        assert len(rows) == 1 or part.padded_tokens <= budget
        assert part.prompt_ids.shape == (len(set(part.prompt_of_row.tolist())), int(part.prompt_mask.sum(1).max()))
        assert part.completion_ids.shape == (len(rows), int(part.completion_mask.sum(1).max()))
        for row, (number, of_prompt) in enumerate(zip(rows.tolist(), part.prompt_of_row.tolist(), strict=True)):
            length = int(micro.completion_mask[number].sum())
            assert part.completion_ids[row, :length].tolist() == micro.completion_ids[number, :length].tolist()
            whose = int(micro.prompt_of_row[number])
            prompt = micro.prompt_ids[whose][micro.prompt_mask[whose] == 1]
            assert part.prompt_ids[of_prompt][part.prompt_mask[of_prompt] == 1].tolist() == prompt.tolist()


def test_only_an_allocator_is_taken_for_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        run_out()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))


def test_another_error_is_not_taken_for_memory(tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir)

    def broken(*_: object) -> None:
        raise RuntimeError("the size of tensor a must match")

    policy.causal_lm.base_model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="must match"):
        make_updater(policy).step(batch_of())


def test_a_lowered_budget_is_in_the_checkpoint_and_a_changed_recipe_overrules_it(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    (_, updater) = stepped(tiny_model_dir, batch_of(), lambda policy: fail_forward(policy, lambda rows: rows > 3))
    assert updater.micro_batch_tokens < UpdateConfig().micro_batch_tokens
    save_checkpoint(tmp_path, updater, step=2, keep=1)
    for config, expected in ((UpdateConfig(), updater.micro_batch_tokens), (UpdateConfig(micro_batch_tokens=99), 99)):
        resumed = make_updater(make_policy(tiny_model_dir), update=config)
        load_checkpoint(latest_checkpoint(tmp_path), resumed)
        assert resumed.micro_batch_tokens == expected


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    place = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    place.prepare()
    (tmp_path / "run_losses.py").write_text(LOSSES)
    return place


LOSSES = '''
"""Has no memory for more than three rows, once."""

import torch

from grpo.update.losses import LossInput, LossOutput

left = [1]


def greedy(inputs: LossInput) -> LossOutput:
    if len(inputs.advantages) > 3 and left:
        left.pop()
        torch.empty(2**56, dtype=torch.uint8)
    return LossOutput(token_loss=-inputs.advantages[:, None] * inputs.logprobs, metrics={})
'''


def test_a_run_says_that_it_ran_out_of_memory_and_goes_on_with_half_the_budget(runs: Runs) -> None:
    notebook = Notebook()
    update = {"loss": {"type": "custom", "path": "run_losses:greedy"}}
    first, second = metrics_of(runs.run("short", observer=notebook, update=update))
    assert (first["update/out_of_memory"], second["update/out_of_memory"]) == (1, 0)
    (warning,) = [text for text in notebook.warnings if "memory" in text]
    assert "step 1 ran out of memory 1 time" in warning
    assert "can't allocate memory" in warning
    assert "with the same gradient" in warning
