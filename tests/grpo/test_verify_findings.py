"""What the checks make of figures: scope, signal, the step's effect, end tokens, temperatures. Worked by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from builders import make_group
from verify_subjects import make_config

from grpo.diagnostics.checks.agreement import Gap, judge_ends, judge_gap, judge_temperatures
from grpo.diagnostics.checks.learning import StepEffect, judge_effect
from grpo.diagnostics.checks.penalty import judge_penalty
from grpo.diagnostics.checks.scope import judge_scope
from grpo.diagnostics.checks.signal import judge_spread, judge_steadiness
from grpo.diagnostics.findings import Finding, findings_as_json, worst_status
from grpo.rollout.base import SamplingParams

# --- scope

QFORMER = {f"qformer.encoder.layer.{n}.attention.{part}": 100 for n in range(2) for part in ("query", "value")}
LANGUAGE_MODEL = {f"language_model.layers.{n}.attention.{part}": 1000 for n in range(3) for part in ("query", "value")}


def test_a_pattern_meant_for_one_part_that_hits_another_too_is_told_with_what_each_costs() -> None:
    (finding,) = judge_scope({**QFORMER, **LANGUAGE_MODEL}, ["query", "value"][:1], cost="")
    assert finding.status == "warning"
    assert "2 modules in qformer.encoder.layer" in finding.what
    assert "3 modules in language_model.layers" in finding.what
    figures = finding.figures["patterns"]["query"]
    assert figures["qformer.encoder.layer"] == {"modules": 2, "parameters": 200}
    assert figures["language_model.layers"] == {"modules": 3, "parameters": 3000}


def test_patterns_of_one_part_are_counted_and_one_that_hits_nothing_fails() -> None:
    (finding,) = judge_scope(QFORMER, ["query", "value"], cost="400 parameters")
    assert (finding.status, finding.what) == (
        "ok",
        "modules: query 2, value 2, in qformer.encoder.layer; 400 parameters",
    )
    (failed,) = judge_scope(QFORMER, ["query", "key"], cost="")
    assert (failed.status, failed.what) == ("failed", "trainable.modules 'key' matches no module")
    assert "qformer.encoder.layer.0.attention.query" in failed.remedy


def test_bytes_are_those_of_weight_two_gradients_and_two_moments() -> None:
    (finding,) = judge_scope(QFORMER, ["all-linear"], cost="")
    assert finding.figures["bytes"] == 400 * 5 * 4


# --- signal


def test_spread_is_within_groups_and_flat_groups_are_counted() -> None:
    # groups 1, 0 (deviation 0.5), 2, 2 (0) and 3, 1 (1): mean of the deviations 0.5
    finding = judge_spread("style", [[1.0, 0.0], [2.0, 2.0], [3.0, 1.0]])
    assert finding.status == "ok"
    assert finding.what == "style: mean 1.50, spread within a group 0.50; 1 of 3 groups without any"


def test_an_objective_without_any_variance_fails_once_there_are_enough_completions() -> None:
    assert judge_spread("style", [[0.0] * 8] * 4).status == "failed"
    assert judge_spread("style", [[0.0] * 8] * 3).status == "warning"  # a rare success may just not have come up


def test_missing_verdicts_are_no_zeros() -> None:
    finding = judge_spread("style", [[None, 1.0, 0.0], [1.0, 0.0, 0.5]])
    assert finding.status == "warning"  # 1 of 6
    assert finding.what.startswith("style: mean 0.50,")
    assert finding.what.endswith("1 of 6 without a verdict")
    assert judge_spread("style", [[None, None], [None, None]]).what.startswith("style: no verdict at all")


def test_a_judge_that_changes_its_mind_by_as_much_as_it_tells_apart_is_a_warning() -> None:
    # deviation within the group 0.5; the second asking moves two of four scores by 1: 0.5 on average
    unsteady = judge_steadiness("style", [([1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0])])
    assert unsteady.status == "warning"
    assert unsteady.what.startswith("style: scored twice, 2 of 4 scores the same; 0.5 apart on average")
    steady = judge_steadiness("style", [([1.0, 0.0, 1.0, 0.0], [0.9, 0.0, 1.0, 0.0])])
    assert (steady.status, steady.figures["agreement"]) == ("ok", 0.75)
    assert judge_steadiness("style", [([1.0, None], [None, 0.0])]).figures["scored_twice"] == 0


# --- the step's effect

EFFECT = StepEffect(
    num_moved=2,
    num_tensors=4,
    largest_move=1e-3,
    lost_in_bfloat16=0.5,
    kl=1e-4,
    gain=1e-3,
    gain_if_larger=1e-2,
    gain_if_smaller=1e-4,
    skipped="",
)


@pytest.mark.parametrize(
    ("effect", "status", "words"),
    [
        (EFFECT, "ok", "2 of 4 tensors moved"),
        (replace(EFFECT, gain=-1e-3, gain_if_larger=-1e-2, gain_if_smaller=-1e-4), "failed", "-1.0e-03 nats"),
        (replace(EFFECT, gain=-1e-3, gain_if_larger=-1e-2), "warning", "+1.0e-04 with a step 0.1 times as large"),
        (replace(EFFECT, gain=-1e-6), "warning", "+1.0e-02 with a step 10 times as large"),
        (replace(EFFECT, num_moved=0), "failed", "moved no parameter"),
        (replace(EFFECT, kl=0.0, gain=0.0), "failed", "KL 0.0e+00"),
        (replace(EFFECT, skipped="the loss is not finite"), "failed", "no step could be taken: the loss is not finite"),
    ],
)
def test_a_step_is_judged_by_what_it_does_to_the_log_probabilities(effect: StepEffect, status: str, words: str) -> None:
    finding = judge_effect(effect, has_made_up_scores=False)
    assert finding.status == status
    assert words in finding.what


# --- the KL penalty


def judged_penalty(estimator: str, beta: dict[str, object]) -> Finding:
    update = {"kl": {"estimator": estimator}}
    objective = {"rewards": [{"name": "length", "params": {"target_tokens": 4}}], "beta": beta}
    config = make_config(Path("model"), Path("."), objectives={"fair": objective}, update=update)
    return judge_penalty(config, num_tokens=1000)


def test_an_exponential_penalty_under_a_fixed_beta_is_a_warning_with_what_one_token_does() -> None:
    # a token at 1/1000: 1000 - ln(1000) - 1 = 992.1 nats of 1000 tokens; its slope is bounded to 20
    finding = judged_penalty("k3", {"type": "fixed", "value": 0.02})
    assert finding.status == "warning"
    assert "k3: one token of 1000 at 0.1% of its reference's probability adds 0.992 nats" in finding.what
    assert finding.what.endswith("a slope of 20; beta is fixed for fair (0.02)")
    assert "clamped" in finding.remedy


@pytest.mark.parametrize(
    ("estimator", "beta", "words"),
    [
        (
            "clamped",
            {"type": "fixed", "value": 0.02},
            "0.007 nats to the KL, and is pulled back with a slope of 1",
        ),
        ("k3+", {"type": "fixed", "value": 0.02}, "adds 0.992 nats to the KL, and is pulled back with a slope of 7"),
        ("k3", {"type": "band", "low": 0.02, "high": 0.06}, "adds 0.992 nats"),
        ("k3", {"type": "fixed", "value": 0.0}, "beta is 0"),
    ],
)
def test_a_linear_pull_a_beta_that_moves_or_none_at_all_is_no_warning(
    estimator: str, beta: dict[str, object], words: str
) -> None:
    finding = judged_penalty(estimator, beta)
    assert (finding.status, words in finding.what) == ("ok", True)


# --- engine and trainer

GAP = Gap(mean=1e-5, largest=1e-4, entropy=1.0, surprise=1.0, num_tokens=100, num_forced=0)


def test_a_gap_is_rounding_noise_or_another_distribution() -> None:
    assert judge_gap("", GAP, 1e-3).status == "ok"
    assert judge_gap("", replace(GAP, mean=2e-3), 1e-3).status == "warning"
    assert judge_gap("", replace(GAP, mean=0.2), 1e-3).status == "failed"
    assert judge_gap("", replace(GAP, mean=float("nan")), 1e-3).status == "failed"
    assert "2 tokens lie outside" in judge_gap("", replace(GAP, num_forced=2), 1e-3).what


def test_an_engine_that_is_as_random_cold_as_hot_ignores_the_temperature() -> None:
    cold, hot = replace(GAP, entropy=1.0, surprise=1.1), replace(GAP, entropy=4.0, surprise=3.9)
    assert judge_temperatures(cold, hot).status == "ok"
    assert judge_temperatures(replace(cold, surprise=3.0), replace(hot, surprise=3.1)).status == "failed"


def test_a_completion_past_its_end_token_fails_and_one_that_never_ends_warns() -> None:
    params = SamplingParams(end_token_ids=(2,), max_new_tokens=16)
    group = make_group([{"a": 1.0}, {"a": 0.0}])  # both end with token 2
    (finding,) = judge_ends([group], params)
    assert (finding.status, finding.figures["ended"]) == ("ok", 2)
    (other,) = judge_ends([group], replace(params, end_token_ids=(1,)))
    assert other.status == "failed"
    assert other.what == "0 completions go on after an end token, 2 ended without one"
    completions = tuple(replace(one, token_ids=(2, 5, 5), finish_reason="length") for one in group.rollout.completions)
    early = replace(group, rollout=replace(group.rollout, completions=completions))
    (finding,) = judge_ends([early], params)
    assert finding.what == "2 completions go on after an end token, 0 ended without one"
    endless = tuple(replace(one, token_ids=(5, 5), finish_reason="length") for one in completions)
    (finding,) = judge_ends([replace(early, rollout=replace(early.rollout, completions=endless))], params)
    assert finding.status == "warning"


# --- the verdict


def test_the_verdict_is_the_worst_finding_and_a_fault_needs_a_remedy() -> None:
    ok = Finding(check="a", status="ok", what="fine")
    bad = Finding(check="b", status="failed", what="x", meaning="y", remedy="z")
    assert worst_status([ok, bad]) == "failed"
    assert findings_as_json([ok])["verdict"] == "ok"
    with pytest.raises(AssertionError, match="without its remedy"):
        Finding(check="b", status="warning", what="x", meaning="y")
