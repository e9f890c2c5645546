"""The checks on the tiny model's real run: intact, with a wrong loss, with engines that do not do as they are told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cut_models import cut_at
from verify_subjects import make_config, open_subject, scored_groups, state_of

from grpo.diagnostics.checks.agreement import check_agreement
from grpo.diagnostics.checks.gradient import check_gradient_flow
from grpo.diagnostics.checks.learning import check_learning, step_effect
from grpo.diagnostics.checks.subject import Subject
from grpo.diagnostics.findings import Finding
from grpo.diagnostics.verify import verify_parts, without_traces
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import RolloutEngine, SamplingParams
from grpo.runtime.policy import Policy, dropout_off
from grpo.types import RolloutGroup


@pytest.fixture(scope="module")
def subject(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with open_subject(tiny_model_dir, tmp_path_factory.mktemp("subject")) as subject:
        yield subject


def of_status(findings: Sequence[Finding], status: str) -> list[str]:
    return [finding.what for finding in findings if finding.status == status]


# --- the whole


def test_verify_leaves_weights_optimizer_and_betas_as_they_were_to_the_bit(subject: Subject) -> None:
    before = state_of(subject.parts)
    findings = verify_parts(subject.config, subject.parts)
    assert of_status(findings, "failed") == []
    order = ["gradient flow", "scope", "accumulation", "it learns", "numbers", "KL penalty"]
    order += ["engine and trainer", "signal"]
    assert list(dict.fromkeys(finding.check for finding in findings)) == order
    after = state_of(subject.parts)
    assert before["weights"].keys() == after["weights"].keys()
    assert all(torch.equal(before["weights"][name], value) for name, value in after["weights"].items())
    assert before["optimizer"] == after["optimizer"] == {}
    assert before["betas"] == after["betas"]
    assert before["gradients"] == after["gradients"]


def test_caches_of_judges_trackers_and_evaluation_are_left_out(tiny_model_dir: Path, tmp_path: Path) -> None:
    judge = {"name": "judged", "params": {"url": "http://127.0.0.1:9/v1", "model": "m", "cache": "cache.sqlite"}}
    beta = {"type": "fixed", "value": 0.1}
    objectives = {"fairness": {"rewards": [judge], "beta": beta}}
    config = make_config(tiny_model_dir, tmp_path, objectives=objectives, eval={"before": True})
    looked_at = without_traces(config)
    assert dict(looked_at.objectives["fairness"].rewards[0].params) == {"url": "http://127.0.0.1:9/v1", "model": "m"}
    assert (looked_at.eval.before, looked_at.eval.after) == (False, False)


# --- gradient flow


def test_a_cut_in_the_policy_is_found_with_the_recipes_own_loss(subject: Subject) -> None:
    place = "model.layers.1.mlp"
    with dropout_off(subject.parts.policy.model), cut_at(subject.parts.policy.causal_lm.get_submodule(place), "detach"):
        findings = list(check_gradient_flow(subject))
    assert [finding.status for finding in findings] == ["failed", "failed"]
    assert "no gradient in 6 of 28 tensors" in findings[0].what  # A and B of gate, up and down
    assert findings[1].figures["module"] == f"base_model.model.{place}"
    assert findings[1].figures["kind"] == "detach"
    assert "detach()" in findings[1].remedy


def test_an_intact_policy_is_counted(subject: Subject) -> None:
    with dropout_off(subject.parts.policy.model):
        (finding,) = check_gradient_flow(subject)
    assert finding.status == "ok"
    # rank 2, hidden 32, inner 64, keys and values 16: q 128, k 96, v 96, o 128, gate, up, down 192 each, in 2 layers
    assert finding.what.startswith("trainable 2,048 = ")
    assert "model.layers: gradient in 28 of 28 tensors; 14 from the second step on" in finding.what


@pytest.mark.slow
def test_full_training_is_no_cut_where_rotary_embeddings_drop_their_inputs_gradient(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    with open_subject(tiny_model_dir, tmp_path, trainable={"type": "full"}) as full:
        (finding,) = check_gradient_flow(full)
    assert (finding.status, "every parameter learns" in finding.what) == ("ok", True)


def test_a_base_parameter_that_learns_beside_the_adapter_fails_by_name(subject: Subject) -> None:
    parameter = subject.parts.policy.causal_lm.get_parameter("model.layers.0.input_layernorm.weight")
    parameter.requires_grad_(True)
    with dropout_off(subject.parts.policy.model):
        findings = list(check_gradient_flow(subject))
    parameter.requires_grad_(False)
    assert ["model.layers.0.input_layernorm.weight learns" in text for text in of_status(findings, "failed")] == [True]


# --- it learns


def test_one_step_raises_what_was_rewarded_and_moves_away_from_the_reference(subject: Subject) -> None:
    effect = step_effect(subject)
    assert effect.num_moved == 14  # every B; A has no gradient yet
    assert effect.kl > 0
    assert effect.gain > 0
    assert effect.largest_move == pytest.approx(1e-2, rel=1e-3)  # AdamW's first step is the learning rate


def test_a_loss_with_the_wrong_sign_fails(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong_sign_loss.py").write_text(
        "from grpo.update.losses import LossOutput\n\n\n"
        "def wrong_sign(given):\n"
        "    ratio = (given.logprobs - given.old_logprobs.detach()).exp()\n"
        "    return LossOutput(token_loss=ratio * given.advantages[:, None], metrics={})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    loss = {"type": "custom", "path": "wrong_sign_loss:wrong_sign"}
    with open_subject(tiny_model_dir, tmp_path, update={"loss": loss}) as wrong:
        (finding, _) = check_learning(wrong)
        (flow,) = check_gradient_flow(wrong)
    assert finding.status == "failed"
    assert flow.status == "ok"  # gradient arrives everywhere, only that it is the wrong one
    assert "less likely" in finding.meaning


@pytest.mark.slow
def test_a_batch_without_any_signal_is_tried_with_made_up_scores(tiny_model_dir: Path, tmp_path: Path) -> None:
    with open_subject(tiny_model_dir, tmp_path, groups=scored_groups(is_flat=True)) as flat:
        assert flat.has_made_up_scores
        (finding, _) = check_learning(flat)
    assert finding.status == "ok"
    assert finding.what.startswith("one step, with made-up scores: 14 of 28 tensors moved")


# --- engine and trainer


class Disobedient:
    """An engine that samples by another law than it is told, or from the first weights for ever."""

    def __init__(self, engine: RolloutEngine, *, forgets: str) -> None:
        self._engine, self._forgets = engine, forgets

    def sample(
        self, prompts: Sequence[EncodedPrompt], num_samples: int, *, params: SamplingParams, seed: int
    ) -> Iterator[RolloutGroup]:
        if self._forgets == "temperature":
            params = replace(params, temperature=1.0)
        elif self._forgets == "penalties":
            params = replace(params, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0)
        return self._engine.sample(prompts, num_samples, params=params, seed=seed)

    def load_weights(self, policy: Policy) -> None:
        if self._forgets != "weights":
            self._engine.load_weights(policy)

    def close(self) -> None:
        self._engine.close()


def agreement_with(subject: Subject, forgets: str) -> list[Finding]:
    engine = Disobedient(subject.parts.engine, forgets=forgets)
    parts = replace(subject.parts, engine=engine)
    prompts = parts.encode(parts.prompts.batch(1))
    groups = list(engine.sample(prompts, 4, params=parts.params, seed=0))
    scored = tuple(replace(one, rollout=group) for one, group in zip(subject.groups, groups, strict=True))
    return list(check_agreement(replace(subject, parts=parts, groups=scored)))


@pytest.mark.slow
def test_an_engine_that_does_as_it_is_told_agrees_with_the_trainer(subject: Subject) -> None:
    assert of_status(agreement_with(subject, ""), "failed") == []


@pytest.mark.parametrize(
    ("forgets", "words"),
    [
        ("temperature", ["at temperature 0.5 differ", "at temperature 1.5 differ"]),
        pytest.param("penalties", ["under penalties differ"], marks=pytest.mark.slow),
        ("weights", ["does not follow the policy"]),
    ],
)
def test_an_engine_that_forgets_what_it_is_told_is_found(forgets: str, words: list[str], subject: Subject) -> None:
    failed = of_status(agreement_with(subject, forgets), "failed")
    assert [[word in text for text in failed].count(True) for word in words] == [1] * len(words), failed
