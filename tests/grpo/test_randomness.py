"""The global generators come back as they were, and are begun anew by name."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from grpo.errors import RunStopped
from grpo.runtime.determinism import determinism
from grpo.runtime.randomness import as_tensors, from_tensors, random_state, restore_random_state, seed_generators


def draws() -> list[float]:
    """Of every kind; the normal draws leave a second one behind, which belongs to the state."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.random()),
        float(np.random.normal()),
        torch.rand(()).item(),
        torch.randn(()).item(),
    ]


@pytest.fixture(autouse=True)
def same_state() -> Iterator[None]:
    state = random_state()
    yield
    restore_random_state(state)


def test_every_generator_goes_on_where_it_was_through_safetensors_and_json() -> None:
    draws()
    states = [random_state()]
    expected = [draws() for _ in range(3)]
    states.append(random_state())
    tensors, rest = as_tensors(states)
    first, second = from_tensors(load(save(tensors)), json.loads(json.dumps(rest)))
    for _ in range(2):
        restore_random_state(first)
        assert [draws() for _ in range(3)] == expected
    restore_random_state(second)
    assert draws() not in expected


def test_the_same_names_give_the_same_draws_and_others_give_others() -> None:
    names: list[tuple[str | int, ...]] = [("step", 1, 0), ("step", 2, 0), ("step", 1, 1), ("update", 1, 0)]
    found = []
    for name in [*names, names[0]]:
        seed_generators(7, *name)
        found.append(draws())
    assert found[0] == found[-1]
    assert len({tuple(one) for one in found}) == len(names)
    for kind in zip(*found[:-1], strict=True):
        assert len(set(kind)) == len(names)


def test_strict_is_torchs_deterministic_mode_for_the_while() -> None:
    with determinism("default"):
        assert not torch.are_deterministic_algorithms_enabled()
    with determinism("strict"):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_strict_stops_at_an_operation_without_a_deterministic_kernel() -> None:
    with (
        pytest.raises(RunStopped, match=r"strict, and put_ does not have .*determinism=default"),
        determinism("strict"),
    ):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="must match"), determinism("strict"):  # any other error stays itself
        torch.zeros(3) + torch.zeros(2)
