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
    ({"dtype": "bfloat"}, "dtype is 'bfloat'; expected 'auto' or 'bfloat16' or 'float32'; did you mean 'bfloat16'?"),
    ({"update": {"kl": {"estimator": "k1"}}}, "update.kl.estimator is 'k1'; expected 'clamped' or 'k3'"),
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
