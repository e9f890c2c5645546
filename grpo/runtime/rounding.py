"""Merged weights in bfloat16 that keep what an adapter adds to them.

A weight lies on bfloat16's grid already, and what a few small steps add is less than half of a step of that grid:
rounded to the nearest, all of it would be gone, and an engine would sample from the model without its adapter.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_PERIOD = 65521
"""Of the noise; a prime, so that the rows of a matrix do not get the same."""
_DROPPED_BITS = 16


def dithered(values: Tensor) -> Tensor:
    """float32 -> bfloat16, each value to one of its two neighbours, the nearer one the likelier: the mean is kept
    (stochastic rounding, Gupta et al. 2015, https://arxiv.org/abs/1502.02551). The noise is the same at every call, so
    that equal values give equal bits, and what lies on the grid stays where it is. Overwrites the values, which are
    contiguous.
    """
    bits = values.view(torch.int32).view(-1)
    noise = _noise(values.device)
    whole = len(bits) // _PERIOD * _PERIOD
    bits[:whole].view(-1, _PERIOD).add_(noise)  # in place: the matrix is large, and nobody else needs it
    bits[whole:].add_(noise[: len(bits) - whole])
    bits.bitwise_and_(-1 << _DROPPED_BITS)
    return values.to(torch.bfloat16)


@lru_cache(maxsize=8)
def _noise(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1 << _DROPPED_BITS, (_PERIOD,), generator=generator, dtype=torch.int32).to(device)
