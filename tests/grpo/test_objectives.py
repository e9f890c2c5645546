"""Claims about objectives: what is missing stays missing, and what cannot work is refused with names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.config import (
    BandBetaConfig,
    BetaConfig,
    DualBetaConfig,
    FixedBetaConfig,
    ObjectiveConfig,
    ObservedKl,
    ProportionalBetaConfig,
)
from grpo.errors import ConfigError
from grpo.objectives import (
    Objective,
    WeightedReward,
    build_objectives,
    check_objectives_of_prompts,
    held_kl,
)
from rewards.base import RewardContext
from rewards.config import RewardSpec


def make_config(
    *names: str,
    beta: BetaConfig | None = None,
    weight: float = 1.0,
    eval_rewards: tuple[RewardSpec, ...] | None = None,
) -> ObjectiveConfig:
    return ObjectiveConfig(
        weight=weight,
        rewards=tuple(RewardSpec(name=name, weight=1.0) for name in names or ("exact_match",)),
        eval_rewards=eval_rewards,
        beta=beta or FixedBetaConfig(type="fixed", value=0.02),
    )


def banded(low: float, high: float, observe: ObservedKl = "k3") -> ObjectiveConfig:
    return make_config(beta=BandBetaConfig(low=low, high=high, observe=observe))


def dual(target: float, observe: ObservedKl = "k3") -> ObjectiveConfig:
    return make_config(beta=DualBetaConfig(type="dual", target=target, observe=observe))


def proportional(target: float, observe: ObservedKl = "k3") -> ObjectiveConfig:
    return make_config(beta=ProportionalBetaConfig(type="proportional", target=target, observe=observe))


# Scores


def objective_of(combine: Literal["sum", "product"] = "sum", **rewards: tuple[float, str]) -> Objective:
    """Name -> (weight, what a missing value does)."""
    return Objective(
        name="o",
        combine=combine,
        rewards=tuple(
            WeightedReward(name=name, weight=weight, reward=list, missing=missing)  # pyright: ignore[reportArgumentType]
            for name, (weight, missing) in rewards.items()
        ),
    )


def test_a_missing_term_voids_a_weighted_sum_unless_its_weight_is_zero() -> None:
    both = objective_of(a=(0.5, "void"), b=(-1.0, "void"))
    assert both.score({"a": 1.0, "b": 3.0}) == -2.5  # 0.5*1 - 1*3
    assert both.score({"a": 1.0, "b": None}) is None
    assert objective_of(a=(0.5, "void"), b=(0.0, "void")).score({"a": 1.0, "b": None}) == 0.5


def test_the_others_carry_a_missing_rewards_weight_where_the_recipe_says_so() -> None:
    three = objective_of(a=(1.0, "reweigh"), b=(2.0, "reweigh"), c=(1.0, "void"))
    assert three.score({"a": None, "b": 0.5, "c": 1.0}) == pytest.approx((2 * 0.5 + 1 * 1.0) * 4 / 3)
    assert three.score({"a": 0.5, "b": 0.5, "c": None}) is None
    assert objective_of(a=(1.0, "reweigh")).score({"a": None}) is None  # nobody is left to carry it


def test_a_product_is_of_powers_and_one_zero_makes_it_zero() -> None:
    product = objective_of("product", a=(1.0, "void"), b=(2.0, "void"))
    assert product.score({"a": 0.5, "b": 0.5}) == pytest.approx(0.125)  # 0.5 * 0.5^2
    assert product.score({"a": 0.0, "b": 1.0}) == 0.0
    assert product.score({"a": None, "b": 1.0}) is None
    assert product.score({"a": -1.0, "b": 1.0}) is None
    lenient = objective_of("product", a=(1.0, "reweigh"), b=(2.0, "void"))
    assert lenient.score({"a": None, "b": 0.5}) == pytest.approx(0.125)  # b alone, with the exponent 3


def weighted_sum(parts: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    return objective_of(**{f"r{name}": (weight, "void") for name, weight in weights.items()}).score(
        {f"r{name}": value for name, value in parts.items()}
    )


@settings(max_examples=50, deadline=None)
@given(
    parts=st.dictionaries(
        st.text(min_size=1, max_size=3),
        st.tuples(st.one_of(st.none(), st.floats(-1e6, 1e6)), st.sampled_from([-1.0, 0.0, 0.1, 2.0])),
        min_size=1,
    ),
    data=st.data(),
)
def test_the_order_of_the_parts_changes_no_bit_of_the_score(
    parts: dict[str, tuple[float | None, float]], data: st.DataObject
) -> None:
    weights = {name: weight for name, (_, weight) in parts.items()}
    order = data.draw(st.permutations(list(parts)))
    score = weighted_sum({name: value for name, (value, _) in parts.items()}, weights)
    assert weighted_sum({name: parts[name][0] for name in order}, weights) == score
    counted = [(value, weight) for value, weight in parts.values() if weight != 0]
    assert (score is None) == (not counted or any(value is None for value, _ in counted))
    if score is not None:
        assert score == pytest.approx(sum(weight * (value or 0.0) for value, weight in counted), abs=1e-6)


# Building


def test_objectives_are_built_in_the_recipes_order() -> None:
    configs = {"facts": make_config("exact_match", weight=2.0), "brevity": make_config("exact_match", weight=0.5)}
    built = build_objectives(configs, RewardContext(base_dir=Path()))
    assert [objective.name for objective in built] == ["facts", "brevity"]
    assert [[reward.name for reward in objective.rewards] for objective in built] == [["exact_match"]] * 2


def test_evaluation_takes_the_evaluation_rewards_where_there_are_any() -> None:
    spec = RewardSpec(name="math:fsum", weight=3.0)
    configs = {"a": make_config("exact_match", eval_rewards=(spec,)), "b": make_config("exact_match")}
    context = RewardContext(base_dir=Path())
    in_evaluation = build_objectives(configs, context, for_evaluation=True)
    assert [[reward.name for reward in objective.rewards] for objective in in_evaluation] == [
        ["math:fsum"],
        ["exact_match"],
    ]
    assert in_evaluation[0].rewards[0].weight == 3.0
    assert in_evaluation[0].rewards[0].reward is math.fsum
    in_training = build_objectives(configs, context)
    assert [objective.rewards[0].name for objective in in_training] == ["exact_match", "exact_match"]


def test_a_reward_that_does_not_exist_is_named_together_with_its_objective() -> None:
    with pytest.raises(ConfigError, match=r"objectives\.facts: .*'exact_mach'.*'exact_match'"):
        build_objectives({"facts": make_config("exact_mach")}, RewardContext(base_dir=Path()))


# Prompts and bands


def test_a_prompt_that_asks_for_an_unknown_objective_is_refused_with_its_name() -> None:
    configs = {"facts": make_config()}
    with pytest.raises(ConfigError, match=r"data\.jsonl asks for objectives \['facts', 'fatcs'\].*\['facts'\]"):
        check_objectives_of_prompts([("facts",), ("facts", "fatcs")], configs, source="data.jsonl")


def test_a_prompt_without_any_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match="asks for objectives"):
        check_objectives_of_prompts([()], {"facts": make_config()}, source="data.jsonl")


def test_bands_that_do_not_meet_on_shared_rows_are_refused_with_both_named() -> None:
    configs = {"fair": banded(0.02, 0.06), "true": banded(0.08, 0.15)}
    with pytest.raises(ConfigError, match=r"fair \[0\.02, 0\.06\].*true \[0\.08, 0\.15\]"):
        check_objectives_of_prompts([("fair", "true")], configs, source="data.jsonl")


def test_the_same_bands_are_accepted_where_no_row_is_shared() -> None:
    configs = {"fair": banded(0.02, 0.06), "true": banded(0.08, 0.15)}
    check_objectives_of_prompts([("fair",), ("true",)], configs, source="data.jsonl")


@pytest.mark.parametrize(
    ("low", "high"), [(0.05, 0.15), (0.06, 0.15), (0.03, 0.04)], ids=["overlap", "touch", "inside"]
)
def test_bands_with_a_common_point_are_accepted_on_shared_rows(low: float, high: float) -> None:
    configs = {"fair": banded(0.02, 0.06), "true": banded(low, high)}
    check_objectives_of_prompts([("fair", "true")], configs, source="data.jsonl")


def test_three_bands_that_meet_in_pairs_only_are_refused() -> None:
    # [0, 1] and [2, 3] have no common point, though both meet [0.5, 2.5]
    configs = {"a": banded(0.0, 1.0), "b": banded(0.5, 2.5), "c": banded(2.0, 3.0)}
    with pytest.raises(ConfigError, match="do not meet"):
        check_objectives_of_prompts([("a", "b", "c")], configs, source="data.jsonl")
    check_objectives_of_prompts([("a", "b"), ("b", "c")], configs, source="data.jsonl")


def test_bands_of_different_quantities_are_refused_on_shared_rows() -> None:
    configs = {"fair": banded(0.02, 0.06, "k3"), "true": banded(0.02, 0.06, "penalty")}
    with pytest.raises(ConfigError, match=r"of k3.*of penalty"):
        check_objectives_of_prompts([("fair", "true")], configs, source="data.jsonl")


def test_a_fixed_beta_meets_every_band() -> None:
    configs = {"fair": banded(0.02, 0.06), "true": make_config()}
    check_objectives_of_prompts([("fair", "true")], configs, source="data.jsonl")


def test_what_a_controller_holds_is_its_band_or_its_target_and_a_fixed_beta_holds_nothing() -> None:
    held = [held_kl(config.beta) for config in (banded(0.02, 0.06), dual(0.05), proportional(0.1), make_config())]
    assert held == [(0.02, 0.06), (0.05, 0.05), (0.1, 0.1), None]


MEET = {
    "equal targets": (dual(0.05), proportional(0.05)),
    "a target inside a band": (proportional(0.05), banded(0.02, 0.06)),
    "a target on a band's edge": (banded(0.02, 0.06), dual(0.06)),
    "a target inside two bands": (banded(0.02, 0.06), dual(0.05), banded(0.04, 0.1)),
    "penalties": (dual(0.05, "penalty"), banded(0.02, 0.06, "penalty")),
    "one target and fixed betas": (dual(0.05), make_config(), make_config()),
}
APART = {
    "other targets": ((dual(0.05), dual(0.06)), r"their targets do not meet: o0 0\.05 of k3, o1 0\.06 of k3"),
    "a target outside a band": (
        (banded(0.02, 0.06), proportional(0.07)),
        r"their bands and targets do not meet: o0 \[0\.02, 0\.06\] of k3, o1 0\.07 of k3",
    ),
    "a target inside one of two bands": ((banded(0.0, 0.06), dual(0.05), banded(0.055, 0.1)), "bands and targets"),
    "equal targets of different quantities": (
        (dual(0.05), proportional(0.05, "penalty")),
        r"targets do not meet: o0 0\.05 of k3, o1 0\.05 of penalty",
    ),
    "a fixed beta between them": ((dual(0.05), make_config(), dual(0.06)), "o0 0.05 of k3, o2 0.06 of k3"),
}


@pytest.mark.parametrize("case", MEET)
def test_controllers_that_can_all_rest_at_one_kl_may_share_rows(case: str) -> None:
    configs = {f"o{number}": config for number, config in enumerate(MEET[case])}
    check_objectives_of_prompts([tuple(configs)], configs, source="data.jsonl")


@pytest.mark.parametrize("case", APART)
def test_controllers_that_no_kl_suits_may_not_share_rows_but_may_have_rows_of_their_own(case: str) -> None:
    found, message = APART[case]
    configs = {f"o{number}": config for number, config in enumerate(found)}
    with pytest.raises(ConfigError, match=message):
        check_objectives_of_prompts([tuple(configs)], configs, source="data.jsonl")
    check_objectives_of_prompts([(name,) for name in configs], configs, source="data.jsonl")
