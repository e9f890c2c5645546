"""Which device and which dtype a run uses."""

from __future__ import annotations

import resource
import sys

import torch

from grpo.errors import ConfigError


def choose_device(name: str, *, index: int = 0) -> torch.device:
    """`auto` is CUDA where there is a card. Args: index: of the card. Raises ConfigError for one that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device. Install a CUDA build of torch, or use auto.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"this is process {index} of the machine, but torch sees {torch.cuda.device_count()} CUDA devices. Launch "
            "as many processes as there are, or set device=cpu."
        )
    return torch.device("cuda", index)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype of the frozen weights and matrix products; `auto` is bfloat16 where the hardware multiplies it."""
    if name == "float32":
        return torch.float32
    if name == "bfloat16" or has_native_bfloat16(device):
        return torch.bfloat16
    return torch.float32


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are done in hardware; emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def peak_memory_bytes(device: torch.device) -> int:
    """Peak so far: the device's own count on CUDA, else this process's resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
