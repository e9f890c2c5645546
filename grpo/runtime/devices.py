"""Which device and which dtype a run uses."""

from __future__ import annotations

import importlib.util
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
    """Dtype of the frozen weights and matrix products; `auto` is bfloat16 where its products are the faster ones."""
    if name == "float32":
        return torch.float32
    if name == "bfloat16" or has_fast_bfloat16(device):
        return torch.bfloat16
    return torch.float32


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32: on a card from Ampere on, on a CPU with AMX.

    AVX512_BF16 without AMX is not enough: a product took 1.3 to 1.8 times as long as in float32 on such an Intel CPU
    (oneDNN, torch 2.13), a step of the quickstart 1.7 times.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return bool(torch.cpu._is_amx_tile_supported())


def choose_attention(name: str, device: torch.device, dtype: torch.dtype, *, model_has_flash: bool) -> str | None:
    """transformers' name of the attention; None leaves it its own choice: SDPA where the model has it, else eager.

    Args:
        name: the recipe's `attention`; auto is flash-attn where it can run.
        model_has_flash: whether the architecture can call flash-attn.
    Raises:
        ConfigError: flash-attn is asked for and cannot run here; says which of its conditions fails.
    """
    if name not in ("auto", "flash_attention_2"):
        return name
    obstacle = _flash_attention_obstacle(device, dtype)
    if obstacle is None and not model_has_flash:
        obstacle = "this model's architecture cannot call it"
    if obstacle is None:
        return "flash_attention_2"
    if name == "auto":
        return None
    raise ConfigError(f"attention is flash_attention_2, but {obstacle}. Set attention=auto or sdpa.")


def _flash_attention_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it runs on CUDA only, and the device is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0, and this card has {major}.{minor}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies 16-bit numbers only, and dtype is {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed (bash scripts/install_flash_attn.sh)"
    return None


def check_offload(device: torch.device, *, update_offload: str, optim_offload: str) -> None:
    """Whether there is a card to take something off. Raises ConfigError for a recipe's offloading on a CPU."""
    asked = [("update.offload", update_offload), ("optim.offload", optim_offload)]
    for key, value in asked:
        if value != "none" and device.type != "cuda":
            raise ConfigError(
                f"{key} is {value}, which needs a GPU: it moves what is on the card to the host's memory, and the "
                f"device is {device.type}. Set {key}=none; on a CPU, update.checkpointing lowers the update's memory."
            )


def peak_memory_bytes(device: torch.device) -> int:
    """Peak so far: the device's own count on CUDA, else this process's resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
