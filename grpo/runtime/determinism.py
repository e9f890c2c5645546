"""The recipe's `determinism`: whether torch may take kernels whose result depends on who was faster.

On a CPU torch's kernels give the same bits for the same number of threads, strict or not. On a card the default ones
add up in any order here and there, and a run repeats itself only nearly. What strict costs an update is measured by
`benchmarks/determinism_cost.py`: 1.0 to 1.2 times its time on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from grpo.errors import RunStopped

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_TORCH_REFUSES = "does not have a deterministic implementation"


@contextmanager
def determinism(kind: Literal["default", "strict"]) -> Iterator[None]:
    """Set torch as the recipe says, for the while; before the first product on a card, which reads its setting once.

    strict makes torch refuse an operation that has no deterministic kernel: the run stops rather than go on by chance.

    Raises:
        RunStopped: there was such an operation.
    """
    if kind == "default":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    had_workspace = _CUBLAS in os.environ
    os.environ.setdefault(_CUBLAS, ":4096:8")  # torch asks for it: docs, "Reproducibility"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as exc:
        if _TORCH_REFUSES not in str(exc):
            raise
        raise RunStopped(
            f"determinism is strict, and {str(exc).partition(',')[0]}. With determinism=default a run on a card "
            "repeats itself up to rounding."
        ) from exc
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        if not had_workspace:
            del os.environ[_CUBLAS]
