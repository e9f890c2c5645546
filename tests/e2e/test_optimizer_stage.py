"""Every option of the optimizer stage through whole runs on the tiny model: it trains, is logged, and resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from run_builders import Notebook, Runs, completions_of, make_objective, metrics_of, tensors_of, write_rows

from grpo.checkpoint import list_checkpoints

LOSSES = '''
"""Losses beside their recipe."""

from grpo.update.losses import LossInput, LossOutput

NUMBER = 3


def reinforce(inputs: LossInput, *, scale: float = 1.0) -> LossOutput:
    token_loss = -scale * inputs.advantages[:, None] * inputs.logprobs
    return LossOutput(token_loss=token_loss, metrics={"surprise": -inputs.logprobs.detach()})
'''


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    place = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    place.prepare()
    return place


def check_all_finite(row: Mapping[str, Any]) -> None:
    assert [name for name, value in row.items() if value is None] == []  # NaN is written as null
    assert row["update/skipped"] == 0


# --- betas and entropy


BETAS = {
    "band": {"type": "band", "low": 0.01, "high": 0.02, "initial": 0.1},
    "proportional": {"type": "proportional", "target": 1e-4, "horizon": 20, "initial": 0.1},
    "dual": {"type": "dual", "target": 1e-3, "rate": 0.02, "initial": 0.1, "observe": "penalty"},
}


@pytest.mark.parametrize("kind", BETAS)
def test_every_adaptive_beta_moves_and_its_run_resumes_bit_for_bit(kind: str, runs: Runs) -> None:
    whole = runs.run_in_two_parts(objectives={"short": make_objective(**BETAS[kind]), "long": make_objective()})
    rows = metrics_of(whole)
    assert rows[0]["beta/short"] == 0.1
    assert len({row["beta/short"] for row in rows}) == len(rows)
    assert {row["beta/long"] for row in rows} == {0.05}


def test_a_beta_that_has_long_been_powerless_is_told_with_what_to_try(runs: Runs) -> None:
    beta = {"type": "band", "low": 0.0, "high": 1e-9, "initial": 0.1, "maximum": 0.1, "alarm_after": 2}
    told = Notebook()
    objectives = {"short": make_objective(**beta), "long": make_objective()}
    runs.run("run", steps=4, observer=told, objectives=objectives, optim={"learning_rate": 1e-3})
    # the KL of the first step is 0, so steps 2 and 3 are the two windows
    (text,) = told.warnings  # behind step 3; step 4 does not say it again
    assert "beta of short has been at its maximum for 2 windows" in text
    assert "k3+" in text


def test_an_adaptive_entropy_bonus_grows_below_its_target_and_resumes_bit_for_bit(runs: Runs) -> None:
    entropy = {"type": "adaptive", "target": 100.0, "step": 1e-2, "initial": 1e-2, "maximum": 0.03}
    whole = runs.run_in_two_parts(steps=4, update={"entropy": entropy})
    # ln 320 = 5.8 nats is all that there can be: the entropy is always below 100
    assert [row["entropy/coefficient"] for row in metrics_of(whole)] == pytest.approx([0.01, 0.02, 0.03, 0.03])


def test_an_adaptive_entropy_bonus_rests_above_its_target(runs: Runs) -> None:
    entropy = {"type": "adaptive", "target": 1e-3, "initial": 0.03}
    assert [row["entropy/coefficient"] for row in metrics_of(runs.run("run", update={"entropy": entropy}))] == [0.03, 0]


# --- losses


def test_two_iterations_take_two_optimizer_steps_over_one_batch_and_resume_bit_for_bit(runs: Runs) -> None:
    objectives = {"short": make_objective(**BETAS["band"]), "long": make_objective()}
    twice = runs.run_in_two_parts(update={"iterations": 2}, objectives=objectives)
    once = runs.run("once", steps=3, objectives=objectives)
    taken = [
        {float(value) for name, value in tensors_of(run_dir).items() if name.endswith("/step")}
        for run_dir in (twice, once)
    ]
    assert taken == [{6.0}, {3.0}]  # 3 steps
    # the second window sees the policy that the first one moved
    assert metrics_of(twice)[0]["kl/short"] > 0
    assert metrics_of(once)[0]["kl/short"] == 0


LOSS_CASES: dict[str, dict[str, Any]] = {
    **{kind: {"type": kind} for kind in ("dapo", "grpo", "bnpo", "dr_grpo", "gspo", "cispo", "sapo")},
    "delta": {"type": "dapo", "clip_high": 0.2, "delta": 1.5},
    "custom": {"type": "custom", "path": "run_losses:reinforce", "params": {"scale": 2.0}, "reduction": "rows"},
}


@pytest.mark.parametrize("case", LOSS_CASES)
def test_every_loss_trains_and_logs_finite_figures(case: str, runs: Runs) -> None:
    (runs.folder / "run_losses.py").write_text(LOSSES)
    rows = metrics_of(runs.run("run", update={"loss": LOSS_CASES[case], "iterations": 2}))
    assert len(rows) == 2
    for row in rows:
        check_all_finite(row)
        assert row["grad_norm"] > 0
    has_clip = LOSS_CASES[case]["type"] not in ("cispo", "sapo", "custom")
    assert ("clip/low_frac" in rows[0]) == has_clip
    assert ("loss/surprise" in rows[0]) == (case == "custom")


@pytest.mark.parametrize(
    "kl", [{"estimator": "k1", "kl_in": "reward"}, {"estimator": "k3", "kl_correction": "ratio"}], ids=str
)
def test_a_kl_in_the_reward_leaves_the_loss_and_one_with_the_ratio_stays_there(kl: dict[str, str], runs: Runs) -> None:
    rows = metrics_of(runs.run("run", update={"kl": kl, "iterations": 2}))
    for row in rows:
        check_all_finite(row)
    assert (rows[-1]["loss/kl"] == 0) == ("kl_in" in kl)


# --- gradients of the objectives


SHARED: dict[str, Any] = {
    "prompts": {"type": "file", "path": "train.jsonl", "per_step": 2, "objectives": ["short", "vowels"]},
    "objectives": {
        "short": make_objective(),
        "vowels": {"rewards": [{"name": "run_rewards:vowels"}], "beta": {"type": "fixed", "value": 0.05}},
    },
}
"""Two objectives that score every prompt."""
COSINE = "gradients/cosine/short/vowels"


def test_cosines_are_logged_every_so_many_steps_and_taking_gradients_apart_changes_nothing(runs: Runs) -> None:
    plain = runs.run("plain", steps=3, **SHARED)
    apart = runs.run("apart", steps=3, update={"gradients": {"cosine_every": 2}}, **SHARED)
    rows = metrics_of(apart)
    assert [COSINE in row for row in rows] == [True, False, True]
    for row in (rows[0], rows[2]):
        assert -1 <= row[COSINE] < 0.999
        norms = [row[f"gradients/norm/{objective}"] for objective in ("short", "vowels")]
        # |a + b|^2 = |a|^2 + |b|^2 + 2 |a| |b| cos: with `sum`, the window's gradient is their sum
        squared = norms[0] ** 2 + norms[1] ** 2 + 2 * norms[0] * norms[1] * row[COSINE]
        assert row["grad_norm"] ** 2 == pytest.approx(squared, rel=1e-4)
    ours, theirs = tensors_of(apart), tensors_of(plain)
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-5
    assert not any(COSINE in row for row in metrics_of(plain))


@pytest.mark.parametrize("method", ["pcgrad", "cagrad", "mgda"])
def test_a_method_that_needs_the_gradients_apart_logs_their_cosine_in_every_step(method: str, runs: Runs) -> None:
    for row in metrics_of(runs.run("run", update={"gradients": {"method": method}}, **SHARED)):
        check_all_finite(row)
        assert -1 <= row[COSINE] < 0.999


# --- a loss of one's own


def test_a_loss_beside_the_recipe_is_found_from_anywhere_and_also_by_an_evaluation(
    runs: Runs, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (runs.folder / "run_losses.py").write_text(LOSSES)
    recipe = runs.write_recipe("run", steps=1, update={"loss": LOSS_CASES["custom"]})
    runs.monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    for command in (["train", str(recipe)], ["eval", str(runs.folder / "run")]):
        code, _, stderr = runs.command(*command)
        assert (code, stderr) == (0, "")
    assert metrics_of(runs.folder / "run")[0]["loss/surprise"] > 0


WRONG_LOSSES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "no such module": ("no_such_losses:reinforce", {}, ["update.loss.path", "No module named 'no_such_losses'"]),
    "no such name": ("run_losses:reinforced", {}, ["run_losses holds nothing named reinforced"]),
    "no function": ("run_losses:NUMBER", {}, ["is a int; expected a function of LossInput"]),
    "module does not run": ("run_broken:reinforce", {}, ["run_broken:reinforce", "ZeroDivisionError"]),
    "module does not parse": ("run_unparsed:reinforce", {}, ["run_unparsed:reinforce", "SyntaxError"]),
    "unknown parameter": ("run_losses:reinforce", {"scael": 2}, ["update.loss.params", "scael", "scale: "]),
    "no path": ("reinforce", {}, ["update.loss.path is 'reinforce'; expected package.module:name"]),
}


@pytest.mark.parametrize("case", WRONG_LOSSES)
def test_a_loss_that_cannot_be_used_is_refused_before_anything_is_written(case: str, runs: Runs) -> None:
    (runs.folder / "run_losses.py").write_text(LOSSES)
    (runs.folder / "run_broken.py").write_text("1 / 0\n")
    (runs.folder / "run_unparsed.py").write_text("def reinforce(:\n")
    path, params, words = WRONG_LOSSES[case]
    runs.check_refused(words, update={"loss": {"type": "custom", "path": path, "params": params}})


# --- truncated completions, filters, rollout correction

ENDS_SOON = {"group_size": 8, "max_new_tokens": 8, "end_tokens": list(range(3, 60))}
"""57 of 320 tokens end a completion: about one in five of the tiny model's goes to its eighth."""


def test_truncated_completions_are_kept_masked_or_penalised_and_the_reward_stays_as_it_was(runs: Runs) -> None:
    def lines(name: str, **truncated: Any) -> list[dict[str, Any]]:
        run_dir = runs.run(name, steps=1, rollout=ENDS_SOON, update={"truncated": truncated})
        check_all_finite(metrics_of(run_dir)[0])
        return completions_of(run_dir)

    kept, masked = lines("kept", type="keep"), lines("masked", type="mask")
    alone = lines("alone", type="mask", in_baseline=False)
    penalised = lines("penalised", type="penalty", buffer_tokens=1, weight=50.0)
    is_cut = [line["finish_reason"] == "length" for line in kept]
    assert 0 < sum(is_cut) < len(kept)
    without = [[{**line, "advantage": None} for line in some] for some in (kept, masked, alone, penalised)]
    assert without[0] == without[1] == without[2] == without[3]  # the same completions and verdicts
    assert masked == kept  # in the baseline: their groups' advantages are as before
    assert {line["advantage"] for line, cut in zip(alone, is_cut, strict=True) if cut} == {0.0}
    # -50 on scores between -1.x and 0: the cut ones are the worst of their group
    for line, cut in zip(penalised, is_cut, strict=True):
        rest = [other for other, c in zip(penalised, is_cut, strict=True) if other["prompt_id"] == line["prompt_id"]]
        if cut and any(other["finish_reason"] == "stop" for other in rest):
            assert line["advantage"] < 0
    weights = [tensors_of(runs.folder / name) for name in ("kept", "masked", "alone", "penalised")]
    key = next(name for name in weights[0] if name.startswith("policy/") and "lora_B" in name)
    assert len({tuple(tensors[key].flatten().tolist()) for tensors in weights}) == 4


def test_min_p_reaches_the_engine_and_is_replayed_by_the_trainer(runs: Runs) -> None:
    rows = {
        name: metrics_of(runs.run(name, steps=2, rollout={"group_size": 4, "max_new_tokens": 8, "min_p": min_p}))
        for name, min_p in (("filtered", 0.9), ("whole", 0.0))
    }
    for row in (*rows["filtered"], *rows["whole"]):
        assert row["sampler/ratio_p99"] == pytest.approx(1.0, abs=1e-4)
        assert row["sampler/kept_set_miss_frac"] == 0
    # of nearly even odds, few tokens have 0.9 of the likeliest's; were only one side filtered, the ratio would tell
    assert rows["filtered"][0]["entropy"] < rows["whole"][0]["entropy"] - 1


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_rollout_correction_logs_its_weights_which_are_1_where_engine_and_trainer_agree(
    level: str, mode: str, runs: Runs
) -> None:
    (row,) = metrics_of(runs.run("run", steps=1, update={"correction": {"level": level, "mode": mode}}))
    check_all_finite(row)
    assert row["sampler/correction_mean"] == pytest.approx(1.0, abs=1e-4)
    assert row["sampler/correction_masked_frac"] == 0


# --- the supervised warm-up

WARMUP = {"path": "examples.jsonl", "steps": 3, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-2}
EXAMPLES = [{"prompt": f"Add {n} and 1.", "completion": f"The answer is {n + 1}."} for n in range(4)]


class Killed(Exception):
    """Stands for a kill: nothing of ours catches it."""


def kill() -> None:
    raise Killed


def test_a_warm_up_comes_before_the_first_step_is_the_reference_and_is_not_done_again(runs: Runs) -> None:
    write_rows(runs.folder / "examples.jsonl", EXAMPLES)
    options: dict[str, Any] = {
        "warmup": WARMUP,
        "steps": 2,
        "checkpoint": {"every": 1, "keep": 5},
        "eval": {"before": True, "after": False, "num_prompts": 2},
    }
    told = Notebook()
    whole = runs.run("whole", observer=told, **options)
    assert sum("supervised warm-up: 3 steps" in note for note in told.notes) == 1
    assert [checkpoint.step for checkpoint in list_checkpoints(whole)] == [0, 1, 2]
    first, second = metrics_of(whole)
    kls = [[row[name] for name in ("kl/short", "kl/long") if name in row] for row in (first, second)]
    assert set(kls[0]) == {0}  # measured from the warmed-up policy
    assert min(kls[1]) > 0
    # "before" is before the warm-up too
    plain = runs.run("plain", **{**options, "warmup": None, "steps": 1})
    before = [json.loads((run_dir / "eval.json").read_text())["answers"]["before"] for run_dir in (whole, plain)]
    assert before[0] == before[1]
    assert completions_of(whole)[:8] != completions_of(plain)[:8]
    # ended behind the warm-up, and resumed
    with pytest.raises(Killed):
        runs.run("killed", observer=Notebook(at={"supervised warm-up": kill}), **options)
    assert [checkpoint.step for checkpoint in list_checkpoints(runs.folder / "killed")] == [0]
    again = Notebook()
    killed = runs.run("killed", resume=True, observer=again, **options)
    assert not any("warm-up" in note for note in again.notes)
    assert completions_of(killed) == completions_of(whole)
    ours, theirs = tensors_of(killed), tensors_of(whole)
    assert [name for name in theirs if not ours[name].equal(theirs[name])] == []


def test_an_evaluation_that_is_asked_for_behind_the_warm_up_is_not_called_before_training(runs: Runs) -> None:
    write_rows(runs.folder / "examples.jsonl", EXAMPLES)
    options: dict[str, Any] = {"warmup": WARMUP, "steps": 1}
    with pytest.raises(Killed):
        runs.run("run", observer=Notebook(at={"supervised warm-up": kill}), **options)
    told = Notebook()
    runs.run("run", resume=True, observer=told, **options, eval={"before": True, "after": False, "num_prompts": 2})
    assert any("eval.before was not made before this run was interrupted" in note for note in told.notes)
    assert not (runs.folder / "run" / "eval.json").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (None, ["warmup.path", "examples.jsonl is no file"]),
        ([], ["examples.jsonl is empty"]),
        ([{"prompt": "Who?", "answer": "Ann."}], ["row 1 has no column 'completion'", "warmup.completion_column"]),
        ([{"prompt": "word " * 300, "completion": "x"}], ["row 1: the prompt has", "warmup.max_tokens"]),
    ],
    ids=["missing", "empty", "no column", "too long"],
)
def test_a_warm_up_file_that_cannot_be_used_is_refused_before_anything_is_written(
    rows: list[dict[str, str]] | None, words: list[str], runs: Runs
) -> None:
    if rows is not None:
        write_rows(runs.folder / "examples.jsonl", rows)
    runs.check_refused(words, warmup=WARMUP)
