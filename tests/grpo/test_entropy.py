"""Claims about the weight of the entropy bonus (FORMULAS 5)."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.update.entropy import AdaptiveEntropyBonus, EntropyBonus, FixedEntropyBonus


def adaptive(
    *, target: float = 0.5, step: float = 0.01, initial: float = 0.0, maximum: float = 0.05
) -> AdaptiveEntropyBonus:
    return AdaptiveEntropyBonus(target=target, step=step, initial=initial, maximum=maximum)


every_bonus = pytest.mark.parametrize(
    "bonus", [FixedEntropyBonus(coefficient=0.01), adaptive()], ids=["fixed", "adaptive"]
)


def values_after(bonus: EntropyBonus, *observed: float) -> list[float]:
    values = []
    for entropy in observed:
        bonus.observe(entropy)
        values.append(bonus.value)
    return values


def test_the_coefficient_grows_by_a_step_a_window_while_the_entropy_is_below_its_target() -> None:
    assert values_after(adaptive(), 0.4, 0.3, 0.2) == pytest.approx([0.01, 0.02, 0.03])


def test_an_entropy_exactly_at_its_target_counts_as_too_low() -> None:
    assert values_after(adaptive(), 0.5) == pytest.approx([0.01])


def test_above_the_target_the_bonus_rests_and_its_coefficient_shrinks_by_a_step_a_window() -> None:
    bonus = adaptive(initial=0.04)
    # 0.04 -> 0.03 -> 0.02 out of sight; at the next fall 0.02 + 0.01 acts again
    assert values_after(bonus, 0.6, 0.7, 0.4) == pytest.approx([0.0, 0.0, 0.03])
    assert bonus.state_dict() == {"coefficient": pytest.approx(0.03), "entropy": 0.4}


def test_the_initial_coefficient_acts_before_any_observation() -> None:
    assert adaptive(initial=0.02).value == 0.02
    assert adaptive().value == 0.0


def test_the_coefficient_stops_at_zero_and_at_its_maximum_and_leaves_them_again() -> None:
    bonus = adaptive(initial=0.01, maximum=0.025)
    assert values_after(bonus, 0.9, 0.9, 0.9) == [0.0, 0.0, 0.0]
    assert values_after(bonus, 0.1, 0.1, 0.1, 0.1) == pytest.approx([0.01, 0.02, 0.025, 0.025])
    values_after(bonus, 0.9)
    assert bonus.state_dict()["coefficient"] == pytest.approx(0.015)


@settings(max_examples=50, deadline=None)
@given(observed=st.lists(st.floats(0, 1), max_size=60))
def test_the_bonus_acts_only_at_or_below_the_target_and_never_leaves_its_bounds(observed: list[float]) -> None:
    bonus = adaptive(maximum=0.035)
    for entropy in observed:
        bonus.observe(entropy)
        assert 0 <= bonus.value <= 0.035
        assert (bonus.value > 0) == (entropy <= 0.5)


def test_a_policy_whose_entropy_falls_by_itself_is_held_at_the_target() -> None:
    # the plant: entropy falls by 0.02 a window and a coefficient c lifts it by 2 c, so c = 0.01 balances
    bonus, entropy, seen = adaptive(step=1e-3), 1.5, []
    for _ in range(600):
        entropy = max(entropy - 0.02 + 2 * bonus.value, 0.0)
        bonus.observe(entropy)
        seen.append(entropy)
    assert min(seen) > 0.3
    assert all(0.4 <= value <= 0.6 for value in seen[-300:])


def test_a_fixed_bonus_stays_whatever_it_sees_and_survives_a_save() -> None:
    bonus = FixedEntropyBonus(coefficient=0.01)
    assert values_after(bonus, 0.0, 10.0) == [0.01, 0.01]
    restored = FixedEntropyBonus(coefficient=0.5)
    restored.load_state_dict(json.loads(json.dumps(bonus.state_dict())))
    assert restored.value == 0.01


@settings(max_examples=50, deadline=None)
@given(before=st.lists(st.floats(0, 1), max_size=20), later=st.lists(st.floats(0, 1), max_size=20))
def test_a_bonus_restored_from_its_saved_state_goes_on_identically(before: list[float], later: list[float]) -> None:
    original, restored = adaptive(initial=0.02), adaptive()
    values_after(original, *before)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert restored.value == original.value
    assert values_after(restored, *later) == values_after(original, *later)
    assert restored.state_dict() == original.state_dict()


@every_bonus
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_entropy_that_is_not_finite_is_refused_and_changes_nothing(bonus: EntropyBonus, value: float) -> None:
    before = bonus.state_dict()
    with pytest.raises(ValueError, match="finite"):
        bonus.observe(value)
    assert bonus.state_dict() == before


@every_bonus
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_saved_coefficient_that_is_no_number_is_refused_and_changes_nothing(
    bonus: EntropyBonus, value: float | None
) -> None:
    before = bonus.state_dict()
    with pytest.raises(ValueError, match="saved state"):
        bonus.load_state_dict({"coefficient": value, "entropy": 0.3})
    assert bonus.state_dict() == before


def test_a_saved_entropy_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="saved state"):
        adaptive().load_state_dict({"coefficient": 0.01, "entropy": math.nan})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"target": 0.0}, "target"),
        ({"target": math.nan}, "target"),
        ({"step": 0.0}, "step"),
        ({"initial": -0.01}, "0 <= initial"),
        ({"initial": 0.06}, "initial <= maximum"),
    ],
)
def test_settings_that_cannot_hold_are_refused(changes: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        adaptive(**changes)


def test_a_negative_fixed_coefficient_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        FixedEntropyBonus(coefficient=-0.01)


def test_the_bonus_loads_no_torch() -> None:
    code = "import sys, grpo.update.entropy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
