"""Was it the allocator? Holds no tensor."""

from __future__ import annotations

import torch

_ALLOCATORS_SAY = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
_CUBLAS_SAYS = "CUBLAS_STATUS_ALLOC_FAILED"  # its workspace is not the caching allocator's
_SHOWN_CHARACTERS = 200


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator raised it: the GPU's, or the CPU's, which has no class of its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in (*_ALLOCATORS_SAY, _CUBLAS_SAYS))


def cause_of(error: BaseException) -> str:
    """The first line of its message, which may be long."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:_SHOWN_CHARACTERS]
