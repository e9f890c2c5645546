"""Weights on their way to vLLM servers: written once, as a file that every server reads. Knows no HTTP."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from grpo.config import VllmServerConfig
from grpo.errors import ConfigError
from grpo.rollout.vllm_facts import is_loopback
from grpo.rollout.vllm_sync import Checksum, Deadline, Sync, adapter_of, base_weights, read_back_samples, whole_weights
from grpo.runtime.policy import Policy

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A sync as it was written."""

    folder: Path
    """With the weights; for an adapter as peft would have saved it, and with samples of the base."""
    base_path: Path | None
    """Samples of the base model's weights (see `read_back_samples`), to which the adapter belongs; None when merged."""
    method: str
    """The worker's, that takes it."""
    arguments: Mapping[str, Any]
    version: int
    checksum: str


def write_transfer(
    policy: Policy, folder: Path, *, sync: Sync, dtype: torch.dtype, version: int, deadline: Deadline
) -> Transfer:
    """Write the policy's weights, or its adapter, into an empty folder.

    Args:
        dtype: of the servers' weights.
    Raises:
        OSError, SafetensorError: there is no room.
        EngineError: the deadline has passed.
    """
    checksum = Checksum()
    arguments: dict[str, Any] = {"version": version}
    base_path = None
    if sync == "adapter":
        adapter = adapter_of(policy)
        path = folder / "adapter_model.safetensors"  # peft's names: vLLM reads the first one as a folder of peft's
        tensors = _on_cpu(checksum.counted(adapter.tensors.items()))
        arguments |= {"rank": adapter.rank, "alpha": adapter.alpha}
        _save_peft_config(policy, folder)
        base_path = folder / "base_samples.safetensors"
        save_file(read_back_samples(deadline.watched(base_weights(policy, dtype))), base_path)
    else:
        path = folder / "weights.safetensors"
        tensors = _on_cpu(checksum.counted(deadline.watched(whole_weights(policy, dtype))))
    save_file(tensors, path)
    return Transfer(
        folder=folder,
        base_path=base_path,
        method="grpo_load_adapter_file" if sync == "adapter" else "grpo_load_weights_file",
        arguments={**arguments, "path": str(path)},
        version=version,
        checksum=checksum.value(),
    )


def transfer_folder(config: VllmServerConfig) -> Path:
    """Where weights are written.

    Raises:
        ConfigError: a server is elsewhere and no folder is named, or it cannot be written to.
    """
    if config.transfer_dir is None:
        far = [url for url in config.urls if not is_loopback(url)]
        if far:
            raise ConfigError(
                f"{far[0]} is another machine: name a folder that it sees too in rollout.engine.transfer_dir (for "
                "one on this machine under another name, /dev/shm)."
            )
        return SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    folder = config.transfer_dir.expanduser().resolve()
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"rollout.engine.transfer_dir {folder} is no folder that can be written to.")
    return folder


def _on_cpu(weights: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in weights}


def _save_peft_config(policy: Policy, folder: Path) -> None:
    configs: Any = policy.model.peft_config
    (config,) = configs.values()
    config.save_pretrained(str(folder))
