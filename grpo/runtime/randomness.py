"""The process's global random generators: seeded by the run's seed, read for a checkpoint, put back.

Our own draws never use them (`grpo.runtime.seeding`); a reward, a custom loss or a library may. They are seeded anew,
by name, before each step's rollout and again before its update: so neither depends on what the other has drawn, and a
step whose rollout comes from the journal updates with the same draws.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo.runtime.seeding import derived_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomState:
    """Of one rank's generators."""

    python: tuple[int, ...]
    """[625] words of the Mersenne twister, and the place in them."""
    python_gauss: float | None
    """The second of a pair of normal draws."""
    numpy: tuple[int, ...]
    """[624] words of numpy's."""
    numpy_place: int
    numpy_gauss: float | None
    torch: Tensor
    """[5056] uint8, of the CPU's."""
    cuda: tuple[Tensor, ...]
    """[16] uint8 of each card that this process can see; empty where none was used."""


def seed_generators(seed: int, *names: str | int) -> None:
    """Begin anew with the seed derived for these names: python's `random`, numpy's, torch's on CPU and cards."""
    derived = derived_seed(seed, "generators", *names)
    random.seed(derived)
    np.random.seed(derived % 2**32)
    torch.manual_seed(derived)


def random_state() -> RandomState:
    """The generators as they are."""
    _, python, python_gauss = random.getstate()
    _, numpy, place, has_gauss, gauss = np.random.get_state(legacy=True)  # pyright: ignore[reportAssignmentType]
    return RandomState(
        python=tuple(python),
        python_gauss=python_gauss,
        numpy=tuple(int(word) for word in numpy),
        numpy_place=int(place),
        numpy_gauss=float(gauss) if has_gauss else None,
        torch=torch.get_rng_state(),
        cuda=tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else (),
    )


def restore_random_state(state: RandomState) -> None:
    """Put the generators back. Cards are put back where there are as many as then."""
    random.setstate((3, state.python, state.python_gauss))
    words = np.array(state.numpy, dtype=np.uint32)
    np.random.set_state(
        ("MT19937", words, state.numpy_place, int(state.numpy_gauss is not None), state.numpy_gauss or 0.0)
    )
    torch.set_rng_state(state.torch)
    if state.cuda and torch.cuda.device_count() == len(state.cuda):
        torch.cuda.set_rng_state_all(list(state.cuda))


def as_tensors(states: Sequence[RandomState]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The ranks' states for safetensors and JSON: name -> tensor, and per rank what is no tensor."""
    tensors: dict[str, Tensor] = {}
    rest: list[dict[str, Any]] = []
    for rank, state in enumerate(states):
        tensors[f"rank-{rank}/python"] = torch.tensor(state.python)
        tensors[f"rank-{rank}/numpy"] = torch.tensor(state.numpy)
        tensors[f"rank-{rank}/torch"] = state.torch
        tensors |= {f"rank-{rank}/cuda-{card}": one for card, one in enumerate(state.cuda)}
        rest.append(
            {
                "python_gauss": state.python_gauss,
                "numpy_place": state.numpy_place,
                "numpy_gauss": state.numpy_gauss,
                "num_cards": len(state.cuda),
            }
        )
    return tensors, rest


def from_tensors(tensors: Mapping[str, Tensor], rest: Sequence[Mapping[str, Any]]) -> tuple[RandomState, ...]:
    """Take back what `as_tensors` gave."""
    return tuple(
        RandomState(
            python=tuple(tensors[f"rank-{rank}/python"].tolist()),
            python_gauss=one["python_gauss"],
            numpy=tuple(tensors[f"rank-{rank}/numpy"].tolist()),
            numpy_place=one["numpy_place"],
            numpy_gauss=one["numpy_gauss"],
            torch=tensors[f"rank-{rank}/torch"],
            cuda=tuple(tensors[f"rank-{rank}/cuda-{card}"] for card in range(one["num_cards"])),
        )
        for rank, one in enumerate(rest)
    )
