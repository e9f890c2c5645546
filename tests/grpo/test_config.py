"""What a recipe may say: bounds, kinds, tagged unions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo.config import BandBetaConfig, FullTrainable, LoraTrainable, RunConfig, TaskPrompts
from grpo.errors import ConfigError
from grpo.recipe_loader import parse_recipe


def make_values(**changes: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "steps": 2,
        "output_dir": "run",
        "prompts": {"type": "file", "path": "data.jsonl"},
        "objectives": {
            "brevity": {
                "rewards": [{"name": "length", "params": {"target_tokens": 4, "limit_tokens": 8}}],
                "beta": {"type": "band", "low": 0.01, "high": 0.1},
            }
        },
        "optim": {"learning_rate": 1e-4},
        **changes,
    }


def make_objective(**changes: Any) -> dict[str, Any]:
    return {"brevity": {**make_values()["objectives"]["brevity"], **changes}}


def parse(**changes: Any) -> RunConfig:
    return parse_recipe(make_values(**changes), base_dir=Path("/recipes"), source="r.yaml")


def error_of(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(**changes)
    return str(caught.value)


def test_a_recipe_needs_six_keys_and_each_missing_one_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe({}, base_dir=Path("/recipes"), source="r.yaml")
    assert str(caught.value) == (
        "recipe r.yaml:\n  - model is missing\n  - steps is missing\n  - output_dir is missing\n"
        "  - prompts is missing\n  - objectives is missing\n  - optim is missing"
    )


def test_what_a_recipe_leaves_out_has_the_documented_default() -> None:
    config = parse()
    assert (config.seed, config.rollout.group_size, config.rollout.temperature) == (0, 8, 1.0)
    assert (config.update.kl.estimator, config.update.combine) == ("clamped", "decoupled")
    assert config.trainable == LoraTrainable(rank=16, alpha=32.0, modules="all-linear")
    beta = config.objectives["brevity"].beta
    assert isinstance(beta, BandBetaConfig)
    assert (beta.initial, beta.rate, beta.observed) == (0.02, 0.1, "k3")


def test_a_choice_by_type_gives_that_types_record() -> None:
    config = parse(prompts={"type": "tasks", "names": ["fairness"]}, trainable={"type": "full"})
    assert isinstance(config.prompts, TaskPrompts)
    assert config.prompts.names == ("fairness",)
    assert isinstance(config.trainable, FullTrainable)


def test_a_config_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse().steps = 3  # pyright: ignore[reportAttributeAccessIssue]


BELOW_ITS_BOUND = [
    ({"rollout": {"group_size": 1}}, "rollout.group_size is 1; expected a number of at least 2. Advantages are"),
    ({"rollout": {"temperature": 0}}, "rollout.temperature is 0; expected a number above 0. A greedy policy has no"),
    ({"rollout": {"temperature": -1.0}}, "rollout.temperature is -1.0; expected a number above 0"),
    ({"rollout": {"top_p": 0}}, "rollout.top_p is 0; expected a number above 0"),
    ({"rollout": {"top_p": 1.5}}, "rollout.top_p is 1.5; expected a number of at most 1"),
    ({"steps": 0}, "steps is 0; expected a number of at least 1"),
    ({"seed": -1}, "seed is -1; expected a number of at least 0"),
    ({"optim": {"learning_rate": 0}}, "optim.learning_rate is 0; expected a number above 0"),
    ({"optim": {"learning_rate": 1e-4, "betas": [0.9, 1]}}, "optim.betas.1 is 1; expected a number below 1"),
    ({"eval": {"num_prompts": 1}}, "eval.num_prompts is 1; expected a number of at least 2"),
    ({"checkpoint": {"keep": 0}}, "checkpoint.keep is 0; expected a number of at least 1"),
    ({"rollout": {"min_p": 1}}, "rollout.min_p is 1; expected a number below 1"),
    ({"rollout": {"resample_rounds": -1}}, "rollout.resample_rounds is -1; expected a number of at least 0"),
    ({"update": {"iterations": 0}}, "update.iterations is 0; expected a number of at least 1"),
    ({"update": {"max_non_finite_steps": 0}}, "update.max_non_finite_steps is 0; expected a number of at least 1"),
    ({"update": {"kl": {"max_log_ratio": 51}}}, "update.kl.max_log_ratio is 51; expected a number of at most 50"),
    ({"update": {"correction": {"high": 1}}}, "update.correction.high is 1; expected a number above 1"),
    ({"update": {"gradients": {"cosine_every": -1}}}, "update.gradients.cosine_every is -1; expected a number of at"),
    ({"update": {"loss": {"type": "cispo", "max_ratio": 1}}}, "update.loss.max_ratio is 1; expected a number above 1"),
    (
        {"optim": {"learning_rate": 1e-4, "rules": [{"pattern": "", "factor": 1}]}},
        "optim.rules.0.pattern is ''; expected a text that is not empty",
    ),
    ({"model": ""}, "model is ''; expected a text that is not empty"),
    ({"objectives": {}}, "objectives is {}; expected at least 1 of them"),
    ({"prompts": {"type": "tasks", "names": []}}, "prompts.names is []; expected at least 1 of them"),
    ({"objectives": make_objective(weight=-1)}, "objectives.brevity.weight is -1; expected a number of at least 0"),
]


@pytest.mark.parametrize(
    ("changes", "expected"), BELOW_ITS_BOUND, ids=[text.split(";")[0] for _, text in BELOW_ITS_BOUND]
)
def test_a_value_out_of_bounds_is_answered_with_key_value_and_bound(changes: dict[str, Any], expected: str) -> None:
    assert error_of(**changes).startswith(f"recipe r.yaml: {expected}")


WRONG_KIND = [
    ({"steps": "three"}, "steps is 'three'; expected a whole number"),
    ({"steps": 1.5}, "steps is 1.5; expected a whole number"),
    ({"steps": True}, "steps is True; expected a number"),
    ({"optim": {"learning_rate": "fast"}}, "optim.learning_rate is 'fast'; expected a number"),
    ({"eval": {"before": "maybe"}}, "eval.before is 'maybe'; expected true or false"),
    ({"model": 3}, "model is 3; expected a text"),
    ({"output_dir": 3}, "output_dir is 3; expected a path"),
    ({"rollout": 3}, "rollout is 3; expected keys and values"),
    ({"objectives": 3}, "objectives is 3; expected keys and values"),
    ({"prompts": "data.jsonl"}, "prompts is 'data.jsonl'; expected keys and values"),
    (
        {"prompts": {"type": "tasks", "names": "fairness"}},
        "prompts.names is 'fairness'; expected a list, such as [a, b]",
    ),
    ({"rollout": {"end_tokens": [[1]]}}, "rollout.end_tokens.0 is [1]; expected a token's id or text"),
    (
        {"trainable": {"type": "lora", "modules": 3}},
        "trainable.modules is 3; expected 'all-linear', or a list of module names",
    ),
    ({"dtype": "bfloat"}, "dtype is 'bfloat'; expected 'auto', 'bfloat16' or 'float32'; did you mean 'bfloat16'?"),
    (
        {"update": {"kl": {"estimator": "k4"}}},
        "update.kl.estimator is 'k4'; expected 'clamped', 'k1', 'k2', 'k3', 'k3+' or 'abs'",
    ),
    (
        {"update": {"loss": {"type": "custom", "path": "my_loss"}}},
        "update.loss.path is 'my_loss'; expected package.module:name",
    ),
    (
        {"update": {"gradients": {"method": "average"}}},
        "update.gradients.method is 'average'; expected 'sum', 'pcgrad', 'cagrad' or 'mgda'",
    ),
    (
        {"warmup": {"path": "w.jsonl", "steps": 1, "learning_rate": True}},
        "warmup: learning_rate is True; expected a number",
    ),
    ({"update": {"flat_groups": "kl"}}, "update.flat_groups is 'kl'; expected 'kl_only' or 'drop'"),
    ({"update": {"entropy": 3}}, "update.entropy is 3; expected keys and values"),
]


@pytest.mark.parametrize(("changes", "expected"), WRONG_KIND, ids=[text.split(";")[0] for _, text in WRONG_KIND])
def test_a_wrong_kind_is_answered_in_the_recipes_words(changes: dict[str, Any], expected: str) -> None:
    assert error_of(**changes) == f"recipe r.yaml: {expected}"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_no_number_of_a_recipe_may_be_infinite_or_nan(value: float) -> None:
    assert "rollout.temperature is" in error_of(rollout={"temperature": value})
    assert "optim.learning_rate is" in error_of(optim={"learning_rate": value})
    assert "objectives.brevity.weight is" in error_of(objectives=make_objective(weight=value))
    band = {"type": "band", "low": 0.01, "high": value}
    assert "objectives.brevity.beta.high is" in error_of(objectives=make_objective(beta=band))
    reward = {"name": "length", "weight": value}
    assert "objectives.brevity.rewards.0.weight is" in error_of(objectives=make_objective(rewards=[reward]))


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.1), (0.1, 0.1)])
def test_a_band_without_room_is_refused(low: float, high: float) -> None:
    beta = {"type": "band", "low": low, "high": high}
    assert error_of(objectives=make_objective(beta=beta)) == (
        f"recipe r.yaml: objectives.brevity.beta: the KL band has low = {low} >= high = {high}; set low < high"
    )


def test_a_bands_beta_must_start_between_its_bounds() -> None:
    beta = {"type": "band", "low": 0.01, "high": 0.1, "initial": 20}
    assert "objectives.brevity.beta: initial = 20.0 lies outside [0.0001, 10.0]" in error_of(
        objectives=make_objective(beta=beta)
    )


def test_objectives_that_all_weigh_nothing_are_refused() -> None:
    one = make_objective(weight=0)["brevity"]
    assert error_of(objectives={"a": one, "b": one}) == (
        "recipe r.yaml: objectives: all weights are 0, so nothing would be learned; set one above 0"
    )
    assert parse(objectives={"a": one, "b": {**one, "weight": 0.5}}).objectives["b"].weight == 0.5


@pytest.mark.parametrize("key", ["rewards", "eval_rewards"])
def test_rewards_that_all_weigh_nothing_are_refused(key: str) -> None:
    rewards = [{"name": "length", "weight": 0}, {"name": "format", "weight": 0.0}]
    assert "objectives.brevity: all rewards ['length', 'format'] have weight 0" in error_of(
        objectives=make_objective(**{key: rewards})
    )


def test_a_reward_named_twice_is_refused() -> None:
    rewards = [{"name": "length"}, {"name": "length", "weight": 2}]
    assert "a reward is named twice in ['length', 'length']" in error_of(objectives=make_objective(rewards=rewards))


def test_an_objectives_name_must_be_plain_because_it_becomes_part_of_metric_names() -> None:
    one = make_objective()["brevity"]
    assert "objectives: 'a/b' is no plain name; use letters, digits and underscores" in error_of(
        objectives={"a/b": one}
    )


def test_an_end_needs_a_token_after_the_minimum() -> None:
    rollout = {"min_new_tokens": 8, "max_new_tokens": 8}
    assert "rollout: min_new_tokens = 8 leaves no token for an end within max_new_tokens = 8; set it lower" in error_of(
        rollout=rollout
    )
    assert parse(rollout={"min_new_tokens": 7, "max_new_tokens": 8}).rollout.min_new_tokens == 7


@pytest.mark.parametrize("kind", ["proportional", "dual"])
def test_a_target_is_needed_and_lies_above_zero_and_every_adaptive_beta_starts_inside_its_bounds(kind: str) -> None:
    def error(**changes: Any) -> str:
        return error_of(objectives=make_objective(beta={"type": kind, **changes}))

    assert error() == "recipe r.yaml: objectives.brevity.beta.target is missing"
    assert error(target=0) == "recipe r.yaml: objectives.brevity.beta.target is 0; expected a number above 0"
    assert error(target=0.1, initial=1e-5).endswith("beta: initial = 1e-05 lies outside [0.0001, 10.0]")
    assert error(target=0.1, alarm_after=0).endswith("beta.alarm_after is 0; expected a number of at least 1")
    parsed = parse(objectives=make_objective(beta={"type": kind, "target": 0.1, "observe": "penalty"}))
    assert parsed.objectives["brevity"].beta.observed == "penalty"


ALLOWED_KL = [
    {},
    {"estimator": "k3"},
    {"estimator": "k1", "kl_correction": "ratio"},
    {"estimator": "k3", "kl_correction": "ratio"},
    {"estimator": "k1", "kl_in": "reward"},
]
REFUSED_KL = [
    ({"kl_correction": "ratio"}, "kl_correction = ratio is exact for k1 and k3 only, not for clamped; set none"),
    ({"kl_correction": "ratio", "estimator": "k3+"}, "exact for k1 and k3 only, not for k3+; set none"),
    ({"kl_in": "reward"}, "kl_in = reward takes the log-ratio off the advantage: set estimator = k1, no correction"),
    ({"kl_in": "reward", "estimator": "k1", "kl_correction": "ratio"}, "set estimator = k1, no correction"),
    ({"estimator": "k1"}, "k1 in the loss has expected gradient zero: set kl_correction = ratio, or kl_in = reward"),
]


@pytest.mark.parametrize("kl", ALLOWED_KL, ids=str)
def test_a_kl_whose_gradient_pulls_to_the_reference_is_accepted(kl: dict[str, Any]) -> None:
    assert parse(update={"kl": kl}).update.kl.model_dump().items() >= kl.items()


@pytest.mark.parametrize(("kl", "why"), REFUSED_KL, ids=[str(kl) for kl, _ in REFUSED_KL])
def test_a_kl_without_a_right_gradient_is_refused_with_what_to_set(kl: dict[str, Any], why: str) -> None:
    message = error_of(update={"kl": kl})
    assert message.startswith("recipe r.yaml: update.kl: ")
    assert why in message


def test_dual_clip_lies_outside_the_upper_clip() -> None:
    for delta in (1.1, 1.2):
        assert f"update.loss: delta = {delta} must be above 1 + clip_high = 1.2" in error_of(
            update={"loss": {"type": "dapo", "delta": delta}}
        )
    assert parse(update={"loss": {"type": "dapo", "delta": 1.25}}).update.loss.model_dump()["delta"] == 1.25


def test_an_adaptive_entropy_bonus_starts_at_or_below_its_maximum() -> None:
    entropy = {"type": "adaptive", "target": 1.0, "maximum": 0.02}
    assert "update.entropy: initial = 0.03 lies above maximum = 0.02" in error_of(
        update={"entropy": {**entropy, "initial": 0.03}}
    )
    bonus = parse(update={"entropy": {**entropy, "initial": 0.02}}).update.entropy
    assert bonus is not None
    assert bonus.type == "adaptive"
    assert bonus.initial == 0.02


@pytest.mark.parametrize("gradients", [{"method": "pcgrad"}, {"method": "mgda"}, {"cosine_every": 5}], ids=str)
def test_a_custom_loss_cannot_be_taken_apart_by_objectives(gradients: dict[str, Any]) -> None:
    loss = {"type": "custom", "path": "my_losses:mine"}
    assert "update: a custom loss cannot be taken apart by objectives" in error_of(
        update={"loss": loss, "gradients": gradients}
    )
    assert parse(update={"loss": loss}).update.gradients.method == "sum"
    assert parse(update={"gradients": gradients}).update.loss.type == "dapo"


def test_scores_are_divided_by_their_spread_except_under_dr_grpo_and_where_the_recipe_says_so() -> None:
    scales = {
        parse(update={"loss": {"type": kind}}).update.score_scale: kind for kind in ("dapo", "gspo", "grpo", "dr_grpo")
    }
    assert scales == {"group": "grpo", "none": "dr_grpo"}
    assert parse(update={"loss": {"type": "dr_grpo"}, "scale": "batch"}).update.score_scale == "batch"


@pytest.mark.parametrize(("mode", "bound"), [("truncate", 2.0), ("mask", 5.0)])
def test_a_rollout_correction_has_the_bound_of_its_mode_unless_it_names_one(mode: str, bound: float) -> None:
    for high, expected in ((None, bound), (3.0, 3.0)):
        correction = parse(update={"correction": {"mode": mode, "high": high}}).update.correction
        assert correction is not None
        assert correction.bound == expected


def test_a_rollout_correction_that_would_mask_every_token_is_refused() -> None:
    assert "low = 2.5 is not below high = 2.0" in error_of(
        update={"correction": {"mode": "mask", "low": 2.5, "high": 2}}
    )
    assert (
        parse(update={"correction": {"mode": "truncate", "low": 2.5}}).update.correction is not None
    )  # low is not read


def test_a_warm_ups_micro_batch_divides_its_batch() -> None:
    warmup = {"path": "w.jsonl", "steps": 1, "learning_rate": 1e-3, "batch_size": 6}
    assert "warmup: micro_batch_size = 4 does not divide 6" in error_of(warmup={**warmup, "micro_batch_size": 4})
    parsed = parse(warmup={**warmup, "micro_batch_size": 3}).warmup
    assert parsed is not None
    assert parsed.path == Path("/recipes/w.jsonl")  # beside the recipe


@pytest.mark.parametrize(
    ("evaluation", "count"),
    [
        ({}, 2),
        ({"every": 4}, 4),  # before, after steps 4 and 8, after training
        ({"every": 5}, 3),  # the one after step 10 is the one after training
        ({"every": 5, "after": False}, 3),
        ({"every": 20, "before": False}, 1),
        ({"before": False, "after": False}, 0),
    ],
)
def test_a_run_of_ten_steps_counts_its_evaluations(evaluation: dict[str, Any], count: int) -> None:
    config = parse(eval=evaluation)
    assert config.eval.count(10) == count
    assert config.eval.is_on == (count > 0)


def test_true_is_no_number_of_steps() -> None:
    assert "every is True; expected a number" in error_of(eval={"every": True})


@pytest.mark.parametrize(
    ("every_epochs", "due"),
    [
        # 10 prompts an epoch, 4 a step: the 10th is in step 3, the 20th ends step 5, the 30th is in step 8
        (1, [3, 5, 8, 10]),
        (2, [5, 10]),
    ],
)
def test_a_checkpoint_every_epoch_follows_the_step_that_takes_its_last_prompt(
    every_epochs: int, due: list[int]
) -> None:
    prompts = {"type": "file", "path": "train.jsonl", "per_step": 4}
    checkpoint = parse(prompts=prompts, checkpoint={"every_epochs": every_epochs}).checkpoint
    assert [step for step in range(1, 11) if checkpoint.is_due(step, per_step=4, epoch_prompts=10)] == due


def test_checkpoints_are_counted_in_steps_or_in_epochs_where_there_are_any_and_never_in_both() -> None:
    prompts = {"type": "file", "path": "train.jsonl"}
    saved_each_step = parse(prompts=prompts, checkpoint={"every_epochs": 1}).checkpoint
    assert all(saved_each_step.is_due(step, per_step=8, epoch_prompts=8) for step in (1, 2, 3))
    assert parse().checkpoint.every == 10
    assert parse(prompts=prompts, checkpoint={"every_epochs": 1}).checkpoint.every is None
    both = error_of(prompts=prompts, checkpoint={"every": 5, "every_epochs": 1})
    assert "every = 5 counts steps and every_epochs = 1 epochs; give one of them" in both
    tasks = error_of(prompts={"type": "tasks", "names": ["fairness"]}, checkpoint={"every_epochs": 1})
    assert "have no epochs; set checkpoint.every, in steps" in tasks
