"""benchmarks/cost_growth.py: how a power and a straight line are told from figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cost_growth
import pytest
from growth.fits import Fit, distance_from_line, exponent_of, misses
from growth.points import Expected

SIZES = (100.0, 200.0, 400.0)


def fit(values: tuple[float, ...], *, least: float, most: float, straight: float | None = None) -> Fit:
    expected = Expected(
        cost="update_bytes", against="update_tokens", least=least, most=most, why="x", straight=straight
    )
    return Fit(series="K", expected=expected, exponent=exponent_of(SIZES, values), sizes=SIZES, values=values)


def test_the_power_of_a_cost_is_the_slope_of_its_logarithms() -> None:
    assert exponent_of(SIZES, [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert exponent_of(SIZES, [1.0, 4.0, 16.0]) == pytest.approx(2)
    assert exponent_of(SIZES, [5.0, 5.0, 5.0]) == pytest.approx(0)
    with pytest.raises(ValueError, match="measure a larger point"):
        exponent_of(SIZES, [0.0, 1.0, 2.0])


def test_a_fixed_part_and_a_slope_are_a_straight_line_and_a_square_is_none() -> None:
    assert distance_from_line(SIZES, [70 + 1.0, 70 + 2.0, 70 + 4.0]) == pytest.approx(0, abs=1e-9)
    assert distance_from_line(SIZES, [1.0, 4.0, 16.0]) > 0.2


def test_a_power_outside_of_what_is_expected_is_a_miss_and_so_is_a_bend() -> None:
    assert misses([fit((3.0, 6.0, 12.0), least=0.9, most=1.1)]) == []
    assert "power 2.00" in misses([fit((1.0, 4.0, 16.0), least=0.9, most=1.1)])[0]
    assert misses([fit((71.0, 72.0, 74.0), least=0, most=1, straight=0.05)]) == []
    assert "off a straight line" in misses([fit((1.0, 4.0, 16.0), least=0, most=2, straight=0.05)])[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_script_measures_a_small_point_and_goes_on_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "growth.json"
    command = [sys.executable, str(Path(cost_growth.__file__)), "--quick", "--json", str(path)]
    subprocess.run(command, check=True)
    found = json.loads(path.read_text())
    (point,) = found["points"].values()
    assert min(point["update_s"], point["sampling_s"]) > 0
    assert list(found["heads"]) == ["4096", "8192"]
    subprocess.run(command, check=True, timeout=60)  # nothing is left to measure
    assert json.loads(path.read_text())["points"] == found["points"]
