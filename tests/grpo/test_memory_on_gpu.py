"""benchmarks/gpu_update.py: its arithmetic anywhere, its run where there is a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpu_update
import pytest
from gpu_update import CASE, TINY, Result, fitted, misses, update_flops

from grpo.runtime.memory_hardware import GIB
from grpo.runtime.memory_model import shape_of

SCRIPT = Path(gpu_update.__file__)
RESULT = Result(
    name="x",
    parameters=1,
    micro_batch_tokens=1,
    peaks={"load": 100, "update": 200},
    predicted={"load": 104, "update": 192},
    halvings=0,
    update_s=2.0,
    flops=180,
    matrix_rate=200.0,
)


def test_the_operations_of_an_update_worked_by_hand() -> None:
    """One prompt of 3 tokens, 2 completions of 2, of which the last token predicts nothing: 3 + 2 * 1 = 5 tokens.

    A block of width 64: q and o 64 * 64, k and v 64 * 32, three of 64 * 128 = 36,864 products a token; two blocks, and
    a head of 512 * 64 = 32,768 for 4 completion tokens. qwen2's q, k and v have a bias: 64 + 32 + 32 more.
    """
    case = replace(CASE, model=TINY, prompts=1, group_size=2, prompt_tokens=3, max_new_tokens=2)
    frozen = 5 * 2 * (36_864 + 128) + 4 * 32_768
    adapters = 5 * 2 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    pairs = 3 * 4 // 2 + 2 * (1 * 3 + 1)  # the prompt's with itself; each completion's with the prompt and itself
    attention = 2 * pairs * 64 * 2
    # policy forward and backward and reference forward; of adapters no reference, and a gradient of their own
    expected = 2 * (3 * frozen + 3 * adapters + 4 * attention)
    assert update_flops(case, shape_of(TINY, source="tiny")) == expected


def test_targets_are_five_percent_of_memory_no_halving_and_45_percent_of_the_card() -> None:
    assert misses(RESULT) == []  # off by 4% both ways, at 180 / 2 / 200 = 45% of the card
    assert "load" in misses(replace(RESULT, predicted={"load": 106, "update": 190}))[0]
    assert "halved 1 times" in misses(replace(RESULT, halvings=1))[0]
    assert "44%" in misses(replace(RESULT, flops=176))[0]


def test_the_7b_shape_is_given_micro_batches_that_fit_40_gib() -> None:
    case = replace(CASE, model=gpu_update.SHAPES["7B"])
    chosen = fitted(case, device="cuda", device_bytes=40 * GIB)
    assert 1024 <= chosen.micro_batch_tokens < 2 * (512 + 8 * 512)  # a row at least, less than a step


def run_script(*arguments: str, json_file: Path) -> dict[str, object]:
    command = [sys.executable, str(SCRIPT), *arguments, "--json", str(json_file)]
    subprocess.run(command, check=True)
    return json.loads(json_file.read_text())


@pytest.mark.slow
def test_the_script_works_up_to_the_device(tmp_path: Path) -> None:
    found = run_script("--quick", "--device", "cpu", json_file=tmp_path / "figures.json")
    (shape,) = found["shapes"]  # pyright: ignore[reportGeneralTypeIssues]
    assert shape["name"] == "tiny"
    assert shape["update_s"] > 0
    assert set(shape["peaks"]) == set(shape["predicted"]) == set(shape["errors"])


@pytest.mark.gpu
def test_the_script_works_on_a_gpu(tmp_path: Path) -> None:
    found = run_script("--quick", json_file=tmp_path / "figures.json")
    assert len(found["shapes"]) == 1  # pyright: ignore[reportArgumentType]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shape", list(gpu_update.SHAPES))
def test_a_recipe_trains_within_40_gib_as_planned_and_near_the_cards_rate(shape: str, tmp_path: Path) -> None:
    run_script("--shapes", shape, json_file=tmp_path / "figures.json")  # exits 1 where a target is missed
