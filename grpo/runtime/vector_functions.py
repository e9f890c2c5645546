"""torch's cosines and exponentials on a CPU, made safe before the first large one.

torch takes them from MKL, each thread a part of the tensor. MKL looks for a function's kernel at its first call, and
MKL 2024.2, which torch's wheels carry, may give a thread that asks at the same moment a kernel of half the digits
(https://github.com/pytorch/pytorch/issues/188792). That one call is wrong by up to 1.5e-4, all later ones are right.
But vLLM computes its rotary table once, in that first call: such a server's log-probabilities are off by up to 1e-3
for as long as it lives. And a run that is started again would not repeat its first step.
"""

from __future__ import annotations

from functools import cache

import torch

_NAMES = (
    *("acos", "asin", "atan", "cos", "sin", "tan", "tanh", "sqrt"),
    *("erf", "erfc", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2"),
)


@cache
def settle_vector_functions() -> None:
    """Call each once, on one number and so in one thread: once a process, before anything large is computed."""
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for name in _NAMES:
            getattr(torch, name)(number)
