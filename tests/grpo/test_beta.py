"""Claims about the controllers of the KL penalty's weight (FORMULAS 4)."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.update.beta import BandBeta, FixedBeta

kl = st.floats(0, 10)


def band(
    *, initial: float = 1.0, low: float = 0.02, high: float = 0.06, minimum: float = 1e-4, maximum: float = 10.0
) -> BandBeta:
    return BandBeta(initial=initial, low=low, high=high, rate=0.1, minimum=minimum, maximum=maximum)


def after(controller: BandBeta, *observed: float) -> float:
    for value in observed:
        controller.observe(value)
    return controller.value


@pytest.mark.parametrize(
    ("observed", "expected"),
    [(0.07, 1.1), (0.01, 0.9), (0.04, 1.0), (0.02, 1.0), (0.06, 1.0)],
    ids=["above grows", "below shrinks", "inside rests", "lower edge rests", "upper edge rests"],
)
def test_beta_grows_above_the_band_shrinks_below_it_and_rests_inside(observed: float, expected: float) -> None:
    assert after(band(), observed) == pytest.approx(expected)


def test_the_first_observation_starts_the_average_and_is_not_pulled_toward_zero() -> None:
    # an average that starts at 0 would hold 0.1 * 0.1 = 0.01 after one window: below the band
    assert after(band(), 0.1) == pytest.approx(1.1)


def test_beta_follows_the_moving_average_and_not_the_last_window() -> None:
    controller = band()
    # 0.04; 0.9 * 0.04 + 0.1 * 0.2 = 0.056, inside; 0.9 * 0.056 + 0.1 * 0.2 = 0.0704, above
    assert after(controller, 0.04) == 1.0
    assert after(controller, 0.2) == 1.0
    assert after(controller, 0.2) == pytest.approx(1.1)
    assert controller.state_dict()["average"] == pytest.approx(0.0704)


def test_beta_changes_by_the_same_share_every_window() -> None:
    assert after(band(), 1.0, 1.0, 1.0) == pytest.approx(1.331)  # 1.1^3
    assert after(band(), 0.0, 0.0, 0.0) == pytest.approx(0.729)  # 0.9^3


def test_beta_stops_at_its_bounds_and_leaves_them_again() -> None:
    controller = band(initial=1.0, minimum=0.95, maximum=1.05)
    assert after(controller, 1.0) == 1.05
    assert after(controller, 1.0) == 1.05
    controller = band(initial=1.0, minimum=0.95, maximum=1.05)
    assert after(controller, 0.0) == 0.95
    assert after(controller, 1.0) == pytest.approx(1.045)  # average 0.1 is above: 0.95 * 1.1


@settings(max_examples=50, deadline=None)
@given(observed=st.lists(kl, max_size=60))
def test_beta_never_leaves_its_bounds(observed: list[float]) -> None:
    controller = band(initial=0.5, minimum=0.3, maximum=0.7)
    for value in observed:
        controller.observe(value)
        assert 0.3 <= controller.value <= 0.7


@pytest.mark.parametrize("controller", [band(), FixedBeta(value=1.0)], ids=["band", "fixed"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_not_finite_is_refused_and_changes_nothing(controller: BandBeta | FixedBeta, value: float) -> None:
    before = controller.state_dict()
    with pytest.raises(ValueError, match="finite"):
        controller.observe(value)
    assert controller.state_dict() == before


@settings(max_examples=50, deadline=None)
@given(before=st.lists(kl, max_size=20), later=st.lists(kl, max_size=20))
def test_a_controller_restored_from_its_saved_state_goes_on_identically(
    before: list[float], later: list[float]
) -> None:
    original, restored = band(), band(initial=0.3)
    after(original, *before)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    for value in later:
        original.observe(value)
        restored.observe(value)
        assert restored.value == original.value
    assert restored.state_dict() == original.state_dict()


def test_a_fixed_beta_stays_whatever_it_sees_and_survives_a_save() -> None:
    controller = FixedBeta(value=0.04)
    controller.observe(100.0)
    assert controller.value == 0.04
    restored = FixedBeta(value=1.0)
    restored.load_state_dict(controller.state_dict())
    assert restored.value == 0.04


@pytest.mark.parametrize("controller", [band(), FixedBeta(value=1.0)], ids=["band", "fixed"])
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_saved_beta_that_is_no_number_is_refused(controller: BandBeta | FixedBeta, value: float | None) -> None:
    with pytest.raises(ValueError, match="saved state"):
        controller.load_state_dict({"value": value, "average": None})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_saved_average_that_is_not_finite_is_refused_and_not_kept_for_ever(value: float) -> None:
    # every later average would be NaN, every comparison with the band false, and beta would rest silently
    with pytest.raises(ValueError, match="saved state"):
        band().load_state_dict({"value": 1.0, "average": value})


@pytest.mark.parametrize("initial", [0.001, 1.0])
@pytest.mark.parametrize("responsiveness", [1.0, 0.3, 0.1])
def test_a_policy_whose_kl_answers_to_beta_settles_inside_the_band(initial: float, responsiveness: float) -> None:
    # the plant: KL drifts toward 0.001 / beta, so beta between 0.001 / 0.06 and 0.001 / 0.02 holds the band
    controller, observed, seen, betas = band(initial=initial), 0.0, [], []
    for _ in range(400):
        observed += responsiveness * (0.001 / controller.value - observed)
        controller.observe(observed)
        seen.append(observed)
        betas.append(controller.value)
    assert all(0.02 <= value <= 0.06 for value in seen[-200:])
    assert betas[-1] == betas[-150]
    assert 0.001 / 0.06 <= betas[-1] <= 0.001 / 0.02


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"low": 0.06, "high": 0.06}, "low < high"),
        ({"low": -0.1}, "low < high"),
        ({"initial": 20.0}, "initial <= maximum"),
        ({"initial": 1e-5}, "minimum <= initial"),
        ({"minimum": 0.0}, "0 < minimum"),
    ],
)
def test_bounds_that_cannot_hold_are_refused(changes: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        band(**changes)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1])
def test_a_rate_that_is_no_share_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        BandBeta(initial=1.0, low=0.0, high=0.1, rate=rate)


def test_controllers_load_no_torch() -> None:
    code = "import sys, grpo.update.beta; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
