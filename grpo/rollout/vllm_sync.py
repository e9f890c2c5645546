"""What a weight sync to vLLM carries, and how both sides know that it arrived. Imports no vLLM."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor

from grpo.errors import ConfigError, EngineError
from grpo.runtime.policy import Policy

Sync = Literal["adapter", "merged"]
"""The LoRA tensors, or all weights with the adapter merged in."""
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM reserves room for one of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter as tensors."""

    tensors: Mapping[str, Tensor]
    """peft's names, such as base_model.model.model.layers.0.mlp.up_proj.lora_A.weight -> [rank, in] or [out, rank]."""
    rank: int
    alpha: float


class Deadline:
    """The time that a sync may take. Every phase names what the error says it waited for."""

    def __init__(self, timeout_s: float) -> None:
        """It begins now."""
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s
        self._phase = "its start"

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Raises EngineError at its end where the time is up."""
        self._phase = name
        yield
        self.check()

    @property
    def left_s(self) -> float:
        """Seconds left, at least 0."""
        return max(self._end - time.monotonic(), 0.0)

    def check(self) -> None:
        """Raises EngineError where the time is up."""
        if time.monotonic() > self._end:
            raise EngineError(
                f"the weight sync took longer than rollout.engine.sync_timeout_s = {self._timeout_s:g} s; it waited "
                f"for {self._phase}. Raise the limit if the model is big; else see what holds the engine up."
            )

    def watched(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights, with the time looked at before each."""
        for item in weights:
            self.check()
            yield item


def choose_sync(sync: Literal["auto", "adapter", "merged"], policy: Policy, *, is_cpu: bool) -> Sync:
    """What a sync carries. auto: on the CPU merged weights, for vLLM's LoRA costs three times as much per token there.

    Raises:
        ConfigError: an adapter is to be synced and there is none, or one that vLLM has no room for.
    """
    if not policy.learns_one_adapter:
        if sync == "adapter":
            raise ConfigError(
                "rollout.engine.sync is adapter, but what trainable says to train is not one adapter of one rank. Set "
                "it to auto."
            )
        return "merged"
    if sync == "auto":
        return "merged" if is_cpu or adapter_of(policy).rank > ADAPTER_RANKS[-1] else "adapter"
    if sync == "adapter" and adapter_of(policy).rank > ADAPTER_RANKS[-1]:
        raise ConfigError(
            f"trainable.rank is {adapter_of(policy).rank}, but vLLM takes adapters up to {ADAPTER_RANKS[-1]}. "
            "Set rollout.engine.sync to merged."
        )
    return sync


def whole_weights(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name in the plain model, weight in `dtype`) of every parameter, tied ones once, in the model's order.

    All and not only those that changed: vLLM packs several of them into one, and takes the pack or nothing. Merged
    ones are made one at a time, so that the adapted model is never in memory twice.
    """
    changed = policy.merged_weights()  # in the order of the parameters
    pending = next(changed, None)
    for name, parameter in policy.causal_lm.named_parameters():
        if policy.is_adapters_own(name):
            continue
        plain = name.replace(".base_layer.", ".")
        if pending is not None and pending[0] == plain:
            yield plain, pending[1].to(dtype)
            pending = next(changed, None)
        else:
            yield plain, parameter.detach().to(dtype)
    assert pending is None, f"{pending[0]} is no parameter of the model, or came before its turn"


def base_weights(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name in the plain model, weight in `dtype`) of every parameter as it is without the adapter."""
    for name, parameter in policy.causal_lm.named_parameters():
        if not policy.is_adapters_own(name):
            yield name.replace(".base_layer.", "."), parameter.detach().to(dtype)


def read_back_columns(width: int) -> list[int]:
    """Which columns of a matrix [out, width] a worker reads back through its kernels."""
    return sorted({0, width // 2, width - 1})


def read_back_samples(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Of each weight what a worker can compare with its own: some columns [out, C] of a matrix, a whole vector.

    On the CPU.
    """
    samples: dict[str, Tensor] = {}
    for name, tensor in weights:
        if tensor.dim() == 2:
            samples[name] = tensor[:, read_back_columns(tensor.shape[1])].to("cpu", copy=True).contiguous()
        elif tensor.dim() == 1:
            samples[name] = tensor.to("cpu", copy=True)
    return samples


def adapter_of(policy: Policy) -> Adapter:
    """The policy's adapter, as it is now (the tensors are the policy's own)."""
    assert isinstance(policy.model, PeftModel)
    (config,) = policy.model.peft_config.values()
    tensors = {name.replace(".default.", "."): p.detach() for name, p in policy.trainable_parameters().items()}
    return Adapter(tensors=tensors, rank=int(config.r), alpha=float(config.lora_alpha))  # pyright: ignore[reportAttributeAccessIssue]


class Checksum:
    """Of named tensors, in any order and on any device: exact, for bits are added and not floats."""

    def __init__(self) -> None:
        """Of none yet."""
        self._entries: list[str] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """One tensor; the kind of its device does not matter, its dtype does."""
        as_integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        total = int(tensor.detach().contiguous().view(as_integers).sum(dtype=torch.int64))
        self._entries.append(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total}")

    def counted(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights, each added as it passes."""
        for name, tensor in weights:
            self.add(name, tensor)
            yield name, tensor

    def value(self) -> str:
        """Hexadecimal."""
        return hashlib.blake2b("\n".join(sorted(self._entries)).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What a worker answers after a sync."""

    version: int
    """The number that the sync gave the weights."""
    checksum: str
    """Of the tensors that the worker was given."""
    num_checked: int
    """Parameters that were read back through the worker's kernels and found to be those."""


def check_report(report: SyncReport, *, version: int, checksum: str) -> None:
    """Raises EngineError where a worker holds other weights than those that were sent."""
    if report.version != version or report.checksum != checksum:
        raise EngineError(
            f"the engine answered the weight sync with version {report.version}, checksum {report.checksum}; expected "
            f"version {version}, checksum {checksum}. Its weights are not the policy's."
        )
    if report.num_checked == 0:
        raise EngineError(
            "the engine took the weights, but none of them could be read back: it names its layers otherwise than the "
            "trainer does. Sampling from this architecture with vLLM is not supported; use the transformers engine."
        )
