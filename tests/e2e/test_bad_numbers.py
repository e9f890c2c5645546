"""NaN or infinity, wherever it comes from: no optimizer step is taken on it, and it is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_batch, make_group, make_policy, make_updater
from run_builders import Runs, metrics_of, tensors_of
from torch import Tensor

from grpo.batching import TrainBatch
from grpo.config import GradientsConfig, KlConfig, RolloutCorrectionConfig, UpdateConfig
from grpo.errors import TooFewVerdicts
from grpo.runtime.optim import named_state
from grpo.runtime.policy import Policy, language_model_head
from grpo.update.beta import BandBeta
from grpo.update.step import Updater

BAD = {"NaN": math.nan, "+inf": math.inf, "-inf": -math.inf}
Poison = Callable[[Policy, TrainBatch, float], AbstractContextManager[TrainBatch]]
"""Makes one number bad for the duration of a block; gives the batch to step on."""


@contextmanager
def logits(policy: Policy, batch: TrainBatch, value: float) -> Iterator[TrainBatch]:
    """The logit of one token that was sampled, at every position: by the head's frozen row for it."""
    weight = language_model_head(policy.causal_lm).weight
    token = int(batch.micro_batches[-1].completion_ids[0, 0])
    before = weight[token].clone()
    with torch.no_grad():
        weight[token, 0] = value
    yield batch
    with torch.no_grad():
        weight[token] = before


@contextmanager
def hidden_states(policy: Policy, batch: TrainBatch, value: float) -> Iterator[TrainBatch]:
    with _poisoned_output(policy, "layers.1.mlp", value, is_policy=True):
        yield batch


@contextmanager
def reference(policy: Policy, batch: TrainBatch, value: float) -> Iterator[TrainBatch]:
    """The reference's pass alone: it has no gradient, the policy's has."""
    with _poisoned_output(policy, "norm", value, is_policy=False):
        yield batch


@contextmanager
def _poisoned_output(policy: Policy, module: str, value: float, *, is_policy: bool) -> Iterator[None]:
    def poison(_: object, __: object, output: Tensor) -> Tensor:
        if torch.is_grad_enabled() != is_policy:
            return output
        spoilt = output.clone()
        spoilt[0, -2, 0] = value
        return spoilt

    handle = policy.causal_lm.base_model.get_submodule(module).register_forward_hook(poison)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def advantages(policy: Policy, batch: TrainBatch, value: float) -> Iterator[TrainBatch]:
    """Of one row of the last micro-batch; those before it have added their gradients."""
    *others, last = batch.micro_batches
    spoilt, shares = last.advantages.clone(), last.shares.clone()
    spoilt[0], shares[0] = value, value
    yield replace(batch, micro_batches=(*others, replace(last, advantages=spoilt, shares=shares)))


@contextmanager
def sampler(policy: Policy, batch: TrainBatch, value: float) -> Iterator[TrainBatch]:
    *others, last = batch.micro_batches
    spoilt = last.sampler_logprobs.clone()
    spoilt[0, 0] = value
    yield replace(batch, micro_batches=(*others, replace(last, sampler_logprobs=spoilt)))


@contextmanager
def gradients(policy: Policy, batch: TrainBatch, value: float) -> Iterator[TrainBatch]:
    """One entry of one gradient, behind a loss that is finite."""

    def poison(gradient: Tensor) -> Tensor:
        spoilt = gradient.clone()
        spoilt[0, 0, 0] = value
        return spoilt

    def watch(_: object, __: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(poison)

    handle = policy.causal_lm.base_model.get_submodule("layers.0.self_attn.o_proj").register_forward_hook(watch)
    try:
        yield batch
    finally:
        handle.remove()


PLACES: dict[str, tuple[Poison, str]] = {
    "logits": (logits, "lm_head.weight (the weight itself)"),
    "hidden states": (hidden_states, "layers.1.mlp (its output)"),
    "reference": (reference, "what it is given: the reference's log-probabilities"),
    "advantages": (advantages, "what it is given: the advantages"),
    "gradients": (gradients, "layers.0.self_attn.o_proj"),
}
"""Where -> how, and the words that name it."""
SETTINGS: dict[str, UpdateConfig] = {
    "plain": UpdateConfig(),
    "objectives apart": UpdateConfig(gradients=GradientsConfig(method="pcgrad")),
    "KL in the reward": UpdateConfig(kl=KlConfig(kl_in="reward", estimator="k1", kl_correction="none")),
}


def prepared(model_dir: Path, update: UpdateConfig) -> tuple[Policy, Updater, TrainBatch]:
    """An updater with momentum, a beta that moves, and a window of two micro-batches."""
    policy = make_policy(model_dir)
    updater = make_updater(policy, objectives=("a", "b"), update=update)
    updater.controllers["a"] = BandBeta(initial=0.02, low=0.01, high=0.02)
    groups = [make_group([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.5}], seed=seed) for seed in (1, 2)]
    batch = make_batch(groups, budget=1)
    assert len(batch.micro_batches) > 1
    updater.step(batch)
    return policy, updater, batch


def all_state(updater: Updater) -> dict[str, Any]:
    """Every number that a step could change."""
    weights = {name: value.detach().clone() for name, value in updater.policy.model.state_dict().items()}
    optimizer = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in named_state(updater.optimizer).items()
    }
    betas = {name: controller.state_dict() for name, controller in updater.controllers.items()}
    return {**weights, **optimizer, **betas}


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    assert before.keys() == after.keys()
    return [
        name
        for name, value in before.items()
        if not (torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name])
    ]


def _cases() -> Iterator[Any]:
    """All of them; the default run takes each place and each setting."""
    for bad, place, setting in product(BAD, PLACES, SETTINGS):
        is_short = setting == "plain" if bad == "NaN" else place == "logits" and bad == "+inf"
        yield pytest.param(bad, place, setting, marks=() if is_short else pytest.mark.slow)


@pytest.mark.parametrize(("bad", "place", "setting"), list(_cases()))
def test_no_optimizer_step_is_taken_on_a_bad_number_and_its_place_is_named(
    bad: str, place: str, setting: str, tiny_model_dir: Path
) -> None:
    policy, updater, batch = prepared(tiny_model_dir, SETTINGS[setting])
    before = all_state(updater)
    poison, words = PLACES[place]
    with poison(policy, batch, BAD[bad]) as poisoned:
        skipped = updater.step(poisoned, step=1, steps=3).skipped
    assert changed(before, all_state(updater)) == []
    assert skipped is not None
    assert words in skipped.cause
    assert updater.step(batch, step=1, steps=3).skipped is None  # it came from outside, and leaves nothing behind
    assert changed(before, all_state(updater)) != []


@pytest.mark.parametrize("bad", BAD)
def test_what_the_sampler_reported_reaches_the_loss_only_where_it_is_corrected_for(
    bad: str, tiny_model_dir: Path
) -> None:
    _, updater, batch = prepared(tiny_model_dir, UpdateConfig(correction=RolloutCorrectionConfig()))
    before = all_state(updater)
    with sampler(updater.policy, batch, BAD[bad]) as poisoned:
        skipped = updater.step(poisoned, step=1, steps=3).skipped
    if skipped is None:  # infinity's weight is bounded or 0, as that of any other far-off sampler's
        assert all(bool(torch.isfinite(value).all()) for value in policy_weights(updater).values())
        assert bad != "NaN"
    else:
        assert changed(before, all_state(updater)) == []
        assert "what it is given: the sampler's log-probabilities" in skipped.cause


def policy_weights(updater: Updater) -> dict[str, Tensor]:
    return dict(updater.policy.trainable_parameters())


# --- scores, in a run

SCORES = '''
"""All completions of some prompts get the value that a file names."""

import math
from pathlib import Path

HERE = Path(__file__).parent


def letters(inputs):
    value = float((HERE / "value").read_text())
    return [value if index == 0 else len(one.completion) / 10 for index, one in enumerate(inputs)]


def always(inputs):
    return [float((HERE / "value").read_text()) for _ in inputs]
'''


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    place = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    place.prepare()
    (tmp_path / "run_rewards.py").write_text(SCORES)
    return place


def objective(reward: str) -> dict[str, Any]:
    return {"rewards": [{"name": f"run_rewards:{reward}"}], "beta": {"type": "fixed", "value": 0.05}}


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_a_score_that_is_no_number_is_a_missing_verdict_and_moves_nothing(bad: str, runs: Runs) -> None:
    (runs.folder / "value").write_text(bad)
    reward = {"short": objective("letters"), "long": objective("letters")}
    run_dir = runs.run("run", objectives=reward, checkpoint={"every": 1})
    assert all(bool(torch.isfinite(value).all()) for value in tensors_of(run_dir).values())
    for line in metrics_of(run_dir):
        assert {value for name, value in line.items() if name.endswith("/unscored_frac")} == {0.25}  # one of four
    rows = [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]
    for row in rows:
        (verdict,) = row["verdicts"].values()
        assert (verdict["value"] is None) == (row["index"] == 0)
        assert row["advantage"] == 0.0 if row["index"] == 0 else math.isfinite(row["advantage"])
    reasons = {next(iter(row["verdicts"].values()))["reason"] for row in rows if row["index"] == 0}
    assert reasons == {f"run_rewards:letters: the reward answered {bad}, expected a finite number"}


def test_where_no_score_is_a_number_the_run_stops_before_its_first_optimizer_step(runs: Runs) -> None:
    (runs.folder / "value").write_text("nan")
    reward = {"short": objective("always"), "long": objective("always")}
    with pytest.raises(TooFewVerdicts, match=r"step 1: objective \w+: .* Last cause: .*answered nan") as caught:
        runs.run("run", objectives=reward)
    assert "Saved after step 0" in caught.value.__notes__[0]
    tensors = tensors_of(runs.folder / "run")
    assert [name for name in tensors if name.endswith("/step")] == []  # the optimizer has never stepped
    assert all(not value.any() for name, value in tensors.items() if "lora_B" in name)
