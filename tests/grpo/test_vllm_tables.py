"""A rotary table that was computed with half the digits is found, and none is computed so once the functions are
settled."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from grpo.errors import EngineError
from grpo.rollout.vllm_tables import check_rotary_tables
from grpo.runtime.vector_functions import settle_vector_functions


class Rotary(nn.Module):
    """As vLLM's: a table [positions, angles] that is computed when it is built."""

    cos_sin_cache: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("cos_sin_cache", self._compute_cos_sin_cache().to(dtype), persistent=False)

    def _compute_cos_sin_cache(self) -> Tensor:
        angles = torch.outer(torch.arange(64.0), 10_000.0 ** -torch.linspace(0, 1, 8))
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Layer(nn.Module):
    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        self.rotary, self.norm = rotary, nn.LayerNorm(4)


def layers(rotary: Rotary) -> nn.Module:
    """Two that share it."""
    return nn.Sequential(Layer(rotary), Layer(rotary))


def test_a_table_that_layers_share_is_checked_once() -> None:
    assert check_rotary_tables(layers(Rotary())) == 1


@pytest.mark.parametrize("off_by", [1.5e-4, -1.5e-4, math.nan])
def test_a_table_that_is_off_in_one_cosine_is_found(off_by: float) -> None:
    rotary = Rotary()
    rotary.cos_sin_cache[5, 3] += off_by
    with pytest.raises(EngineError, match=r"rotary angles is off by up to (0\.00015|nan).*Start the engine anew"):
        check_rotary_tables(layers(rotary))


def test_a_table_of_16_bits_is_left_alone_for_its_rounding_hides_the_fault() -> None:
    assert check_rotary_tables(layers(Rotary(torch.bfloat16))) == 0


def test_a_table_that_is_made_of_weights_is_left_alone() -> None:
    rotary = Rotary()
    rotary.coefficients = nn.Parameter(torch.ones(1))
    rotary.cos_sin_cache += 1.0
    assert check_rotary_tables(layers(rotary)) == 0


def test_settled_functions_have_all_their_digits() -> None:
    settle_vector_functions()
    numbers = torch.linspace(0.01, 0.99, 100_000)  # enough for several threads
    for name in ("cos", "sin", "exp", "log", "sqrt", "tanh", "erf"):
        function = getattr(torch, name)
        exact = function(numbers.double())
        assert float((function(numbers) - exact).abs().max()) < 1e-6, name
