"""Claims about the controllers of the KL penalty's weight (FORMULAS 4)."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.update.beta import BandBeta, BetaController, DualBeta, FixedBeta, ProportionalBeta

kl = st.floats(0, 10)


def band(
    *, initial: float = 1.0, low: float = 0.02, high: float = 0.06, minimum: float = 1e-4, maximum: float = 10.0
) -> BandBeta:
    return BandBeta(initial=initial, low=low, high=high, rate=0.1, minimum=minimum, maximum=maximum)


def proportional(
    *, initial: float = 1.0, target: float = 0.04, horizon: float = 1000, minimum: float = 1e-4, maximum: float = 10.0
) -> ProportionalBeta:
    return ProportionalBeta(initial=initial, target=target, horizon=horizon, minimum=minimum, maximum=maximum)


def dual(
    *, initial: float = 1.0, target: float = 0.04, rate: float = 0.1, minimum: float = 1e-4, maximum: float = 10.0
) -> DualBeta:
    return DualBeta(initial=initial, target=target, rate=rate, minimum=minimum, maximum=maximum)


Build = Callable[..., BetaController]
every_adaptive = pytest.mark.parametrize("build", [band, proportional, dual])
every_controller = pytest.mark.parametrize(
    "controller", [FixedBeta(value=1.0), band(), proportional(), dual()], ids=["fixed", "band", "proportional", "dual"]
)


def after(controller: BetaController, *observed: float) -> float:
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


@pytest.mark.parametrize(
    ("observed", "rows", "expected"),
    [
        (0.044, 100, 1.01),  # error 0.1, share 100 / 1000: 1 + 0.1 * 0.1
        (0.036, 100, 0.99),
        (0.04, 100, 1.0),
        (0.048, 100, 1.02),  # error 0.2, at the clip
        (4.0, 100, 1.02),  # error 99, clipped to 0.2
        (0.0, 100, 0.98),  # error -1, clipped to -0.2
        (0.044, 1000, 1.1),  # as many rows as the horizon: the whole error
    ],
)
def test_proportional_beta_moves_by_the_clipped_relative_error_times_the_share_of_the_horizon(
    observed: float, rows: int, expected: float
) -> None:
    controller = proportional(horizon=1000)
    controller.observe(observed, rows=rows)
    assert controller.value == pytest.approx(expected, rel=1e-12)


def test_proportional_beta_counts_rows_and_the_others_count_windows() -> None:
    few, many = proportional(), proportional()
    few.observe(0.1, rows=1)
    many.observe(0.1, rows=100)
    assert (many.value - 1) / (few.value - 1) == pytest.approx(100)
    for build in (band, dual):
        few, many = build(), build()
        few.observe(0.1, rows=1)
        many.observe(0.1, rows=100)
        assert few.value == many.value != 1.0


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        (0.08, 1.1051709180756477),  # twice the target: e^0.1
        (0.0, 0.9048374180359595),  # e^-0.1, the most that beta falls in a window
        (0.04, 1.0),
        (0.2, 1.4918246976412703),  # five times the target: e^(0.1 * 4)
    ],
)
def test_dual_beta_adds_the_relative_error_to_its_logarithm(observed: float, expected: float) -> None:
    assert after(dual(), observed) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("observed", [1e6, 1e308, -1e6, -1e308])
@every_adaptive
def test_an_absurd_kl_ends_at_a_bound_and_not_in_an_overflow(build: Build, observed: float) -> None:
    controller = build(maximum=1.0001, minimum=0.9999)
    controller.observe(observed, rows=64)
    assert controller.value == (1.0001 if observed > 0 else 0.9999)


def test_proportional_and_dual_follow_the_moving_average_and_not_the_last_window() -> None:
    # averages 0.04, then 0.9 * 0.04 + 0.1 * 0.08 = 0.044: relative error 0.1
    controller = proportional(horizon=1000)
    controller.observe(0.04, rows=100)
    controller.observe(0.08, rows=100)
    assert controller.value == pytest.approx(1.01)
    assert after(dual(), 0.04, 0.08) == pytest.approx(math.exp(0.01))


@every_adaptive
@settings(max_examples=50, deadline=None)
@given(observed=st.lists(kl, max_size=60), rows=st.integers(1, 100_000))
def test_beta_never_leaves_its_bounds(build: Build, observed: list[float], rows: int) -> None:
    controller = build(initial=0.5, minimum=0.3, maximum=0.7)
    for value in observed:
        controller.observe(value, rows=rows)
        assert 0.3 <= controller.value <= 0.7


@every_controller
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_not_finite_is_refused_and_changes_nothing(controller: BetaController, value: float) -> None:
    before = controller.state_dict()
    with pytest.raises(ValueError, match="finite"):
        controller.observe(value)
    assert controller.state_dict() == before


@every_controller
@pytest.mark.parametrize("rows", [0, -1])
def test_an_observation_over_no_rows_is_refused_and_changes_nothing(controller: BetaController, rows: int) -> None:
    before = controller.state_dict()
    with pytest.raises(ValueError, match="rows"):
        controller.observe(0.1, rows=rows)
    assert controller.state_dict() == before


@every_adaptive
@settings(max_examples=50, deadline=None)
@given(before=st.lists(kl, max_size=40), later=st.lists(kl, max_size=40))
def test_a_controller_restored_from_its_saved_state_goes_on_identically(
    build: Build, before: list[float], later: list[float]
) -> None:
    original, restored = build(maximum=1.5), build(initial=0.3, maximum=1.5)
    for value in before:
        original.observe(value, rows=300)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    for value in later:
        original.observe(value, rows=300)
        restored.observe(value, rows=300)
        assert restored.value == original.value
        assert restored.is_stuck == original.is_stuck
    assert restored.state_dict() == original.state_dict()


@every_adaptive
def test_beta_is_stuck_after_so_many_windows_in_a_row_at_its_maximum_with_the_kl_too_high(build: Build) -> None:
    controller = build(initial=2.0, maximum=2.0)
    assert after(controller, *[1.0] * 19) == 2.0
    assert not controller.is_stuck
    after(controller, 1.0)
    assert controller.is_stuck
    after(controller, 1.0)
    assert controller.is_stuck


@every_adaptive
def test_the_count_toward_the_alarm_starts_anew_when_the_kl_comes_down(build: Build) -> None:
    controller = build(initial=2.0, maximum=2.0)
    after(controller, *[0.1] * 19)
    # averages 0.1, then 0.9 * 0.1 - 0.1 * 0.9 = 0: below band and target, so this window is not counted
    after(controller, -0.9)
    controller.load_state_dict({**controller.state_dict(), "value": 2.0})
    after(controller, *[10.0] * 19)
    assert not controller.is_stuck
    after(controller, 10.0)
    assert controller.is_stuck


def test_windows_before_beta_reached_its_maximum_do_not_count_toward_the_alarm() -> None:
    controller = BandBeta(initial=1.0, low=0.02, high=0.06, rate=0.1, maximum=1.2, alarm_after=2)
    # windows with beta 1, 1.1, 1.2, 1.2: the alarm is due after the fourth
    states = []
    for _ in range(4):
        controller.observe(1.0)
        states.append(controller.is_stuck)
    assert states == [False, False, False, True]


def test_a_kl_inside_the_band_is_no_alarm_even_at_the_maximum() -> None:
    controller = band(initial=2.0, maximum=2.0)
    after(controller, *[0.06] * 50)
    assert controller.value == 2.0
    assert not controller.is_stuck


def test_the_alarm_survives_a_save() -> None:
    original, restored = band(initial=2.0, maximum=2.0), band(maximum=2.0)
    after(original, *[1.0] * 19)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert not restored.is_stuck
    after(restored, 1.0)
    assert restored.is_stuck


def test_a_fixed_beta_is_never_stuck() -> None:
    controller = FixedBeta(value=10.0)
    after(controller, *[10.0] * 100)
    assert not controller.is_stuck


def test_a_fixed_beta_stays_whatever_it_sees_and_survives_a_save() -> None:
    controller = FixedBeta(value=0.04)
    controller.observe(100.0)
    assert controller.value == 0.04
    restored = FixedBeta(value=1.0)
    restored.load_state_dict(controller.state_dict())
    assert restored.value == 0.04


@every_controller
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_saved_beta_that_is_no_number_is_refused(controller: BetaController, value: float | None) -> None:
    before = controller.state_dict()
    with pytest.raises(ValueError, match="saved state"):
        controller.load_state_dict({"value": value, "average": 0.5, "num_stuck": 3})
    assert controller.state_dict() == before


@every_adaptive
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_saved_average_that_is_not_finite_is_refused_and_not_kept_for_ever(build: Build, value: float) -> None:
    # every later average would be NaN, every comparison with the band false, and beta would rest silently
    with pytest.raises(ValueError, match="saved state"):
        build().load_state_dict({"value": 1.0, "average": value, "num_stuck": 0})


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


def closed_loop(
    controller: BetaController, *, gain: float, delay: int, windows: int, noise: float, spike_at: int | None = None
) -> tuple[list[float], list[float]]:
    """[windows] of the smoothed KL and of beta, against a policy whose KL answers to beta.

    The plant: KL goes 30 % of the way to gain * 0.04 * 0.02 / beta in a window, so that at gain 1 beta = 0.02 holds
    0.04; it sees beta `delay` windows late; 64 rows and 1000 tokens a window, so one token of 10 nats adds 0.01.
    """
    rng = random.Random(0)
    betas = deque([controller.value] * (delay + 1), maxlen=delay + 1)
    kl, smoothed, seen = 0.0, [], []
    for window in range(windows):
        betas.append(controller.value)
        kl += 0.3 * (gain * 0.04 * 0.02 / betas[0] - kl)
        observed = kl * math.exp(rng.gauss(0, noise)) + (10 / 1000 if window == spike_at else 0.0)
        controller.observe(observed, rows=64)
        smoothed.append(0.9 * smoothed[-1] + 0.1 * observed if smoothed else observed)
        seen.append(controller.value)
    return smoothed, seen


# builder, where the smoothed KL must stay, windows that it needs from a tenth or ten times the target
LOOPS = {
    "band": (lambda: BandBeta(initial=0.02, low=0.02, high=0.06), (0.02, 0.06), 250),
    "proportional": (lambda: ProportionalBeta(initial=0.02, target=0.04), (0.03, 0.05), 1800),
    "proportional-2000": (lambda: ProportionalBeta(initial=0.02, target=0.04, horizon=2000), (0.03, 0.05), 450),
    "dual": (lambda: DualBeta(initial=0.02, target=0.04), (0.03, 0.05), 250),
}
in_every_loop = pytest.mark.parametrize("loop", LOOPS)
at_every_gain = pytest.mark.parametrize("gain", [0.1, 1.0, 10.0])
at_every_delay = pytest.mark.parametrize("delay", [0, 1, 2, 3, 4, 5])


@in_every_loop
@at_every_gain
@at_every_delay
def test_in_closed_loop_the_smoothed_kl_comes_into_the_band_or_near_the_target_and_stays(
    loop: str, gain: float, delay: int
) -> None:
    build, (low, high), settled_by = LOOPS[loop]
    smoothed, _ = closed_loop(build(), gain=gain, delay=delay, windows=settled_by + 200, noise=0.2)
    assert low <= min(smoothed[settled_by:])
    assert max(smoothed[settled_by:]) <= high


@in_every_loop
@at_every_gain
@at_every_delay
def test_in_closed_loop_beta_comes_to_rest_and_does_not_swing(loop: str, gain: float, delay: int) -> None:
    build, _, settled_by = LOOPS[loop]
    _, beta = closed_loop(build(), gain=gain, delay=delay, windows=settled_by + 200, noise=0.0)
    before, last = beta[settled_by : settled_by + 100], beta[settled_by + 100 :]
    assert max(last) / min(last) <= max(before) / min(before) + 1e-12  # does not grow
    assert max(last) / min(last) <= 1.05  # a lasting cycle has 2 and more


@in_every_loop
@at_every_gain
@at_every_delay
def test_in_closed_loop_one_token_of_ten_nats_moves_beta_by_at_most_a_few_percent(
    loop: str, gain: float, delay: int
) -> None:
    build, _, settled_by = LOOPS[loop]
    _, calm = closed_loop(build(), gain=gain, delay=delay, windows=settled_by + 100, noise=0.2)
    _, spiked = closed_loop(build(), gain=gain, delay=delay, windows=settled_by + 100, noise=0.2, spike_at=settled_by)
    assert max(abs(a / b - 1) for a, b in zip(spiked, calm, strict=True)) <= 0.03


def test_a_spike_at_the_very_edge_of_the_band_costs_steps_but_leaves_the_kl_inside() -> None:
    # the limit of a band: at rest just below its edge, any push beyond it starts the controller, and 5 windows late
    # it has taken several steps before it sees the first one's effect
    controller = BandBeta(initial=0.02, low=0.02, high=0.06)
    controller.load_state_dict({"value": 0.02, "average": 0.0599, "num_stuck": 0})
    kl, betas = 0.0599, deque([0.02] * 6, maxlen=6)
    for window in range(200):
        betas.append(controller.value)
        kl += 0.3 * (0.0599 * 0.02 / betas[0] - kl)
        controller.observe(kl + (0.01 if window == 0 else 0.0))
    assert controller.value == pytest.approx(0.02 * 1.1**7)
    assert 0.02 < kl < 0.06


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


@pytest.mark.parametrize("build", [proportional, dual])
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"target": 0.0}, "target"),
        ({"target": -0.1}, "target"),
        ({"target": math.nan}, "target"),
        ({"initial": 20.0}, "initial <= maximum"),
        ({"minimum": 0.0}, "0 < minimum"),
    ],
)
def test_a_target_or_bounds_that_cannot_hold_are_refused(
    build: Build, changes: dict[str, float], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        build(**changes)


def test_a_horizon_a_rate_or_an_alarm_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="horizon"):
        proportional(horizon=0.0)
    with pytest.raises(ValueError, match="rate"):
        dual(rate=0.0)
    with pytest.raises(ValueError, match="alarm_after"):
        BandBeta(initial=1.0, low=0.0, high=0.1, alarm_after=0)


def test_controllers_load_no_torch() -> None:
    code = "import sys, grpo.update.beta; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
