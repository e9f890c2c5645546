"""What an engine computes from its configuration and no weight sync carries: its rotary table. Imports no vLLM."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from grpo.errors import EngineError

_TOLERANCE = 1e-5
"""Of cosines and sines in float32, whose rounding is 6e-8; a table of MKL's fast kernels is off by 1.5e-4."""


def check_rotary_tables(model: nn.Module) -> int:
    """How many rotary tables were computed again and found to be the same.

    On the CPU and in float32 alone: there a table can be wrong (see `runtime.vector_functions`), and nothing else would
    tell, for the engine then samples from the policy's weights and yet not quite from its law. Rounding to 16 bits is
    coarser than the fault.

    Raises:
        EngineError: one differs.
    """
    tables = {id(module.cos_sin_cache): module for module in model.modules() if _can_be_checked(module)}
    for module in tables.values():  # all layers share one
        table: Any = module.cos_sin_cache
        with torch.no_grad(), torch.device("cpu"):
            again = cast(Any, module)._compute_cos_sin_cache()
        # written so that NaN is found too
        if not (difference := float((again.float() - table).abs().max())) <= _TOLERANCE:
            raise EngineError(
                f"the engine's table of rotary angles is off by up to {difference:.3g}: its log-probabilities would "
                "not be the policy's. Start the engine anew."
            )
    return len(tables)


def _can_be_checked(module: nn.Module) -> bool:
    table = getattr(module, "cos_sin_cache", None)
    return (
        isinstance(table, torch.Tensor)
        and table.device.type == "cpu"
        and table.dtype == torch.float32
        and hasattr(module, "_compute_cos_sin_cache")
        and next(module.parameters(), None) is None  # else it depends on weights, and vLLM makes it at the first pass
    )
