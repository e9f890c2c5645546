"""What autograd keeps of a pass, held in host memory until the backward pass wants it.

Unlike `torch.autograd.graph.save_on_cpu` it leaves the weights, which autograd keeps too, where they are, copies what
several operators keep once, and lets the copies run beside the arithmetic.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST_BYTES = 2**20
"""Smaller tensors stay: their transfer would cost more than their room is worth."""
IN_FLIGHT = 4
"""Copies to the host that may be under way at a time: each holds on to its tensor's device memory until it is done."""


class Held(Protocol):
    """A tensor in host memory."""

    def fetch(self) -> Tensor:
        """On its device again; may be asked for more than once."""
        ...


class Host(Protocol):
    """Takes tensors off a device."""

    def hold(self, tensor: Tensor) -> Held:
        """Copy it to the host. The tensor does not change before the copy is done."""
        ...


class PinnedCopy:
    """A tensor of a card in page-locked host memory."""

    __slots__ = ("__weakref__", "_arrived", "_device", "_values")

    def __init__(self, values: Tensor, device: torch.device, arrived: torch.cuda.Event) -> None:
        self._values, self._device, self._arrived = values, device, arrived

    def fetch(self) -> Tensor:
        """See `Held.fetch`."""
        torch.cuda.current_stream(self._device).wait_event(self._arrived)
        return self._values.to(self._device, non_blocking=True)


class PinnedHost:
    """Page-locked host memory; copies to it run on a stream of their own, a few at a time."""

    def __init__(self, device: torch.device) -> None:
        """Args: device: a CUDA device."""
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._under_way: deque[torch.cuda.Event] = deque()

    def hold(self, tensor: Tensor) -> PinnedCopy:
        """See `Host.hold`."""
        values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            values.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is not given to another tensor before the copy is done
        arrived = torch.cuda.Event()
        arrived.record(self._stream)
        self._under_way.append(arrived)
        if len(self._under_way) > IN_FLIGHT:  # else the arithmetic runs ahead, and nothing is free when it is needed
            self._under_way.popleft().synchronize()
        return PinnedCopy(values, self._device, arrived)


@contextlib.contextmanager
def offloaded(model: nn.Module, host: Host | None, *, smallest_bytes: int = SMALLEST_BYTES) -> Iterator[None]:
    """What the passes within keep for their gradients goes to the host, but for weights and small tensors.

    Args:
        model: its parameters and buffers stay.
        host: None: nothing goes anywhere.
        smallest_bytes: of a tensor that goes.
    """
    if host is None:
        yield
        return
    hold = _sharing(host)
    stays = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor | Held:
        storage = tensor.untyped_storage()
        is_expanded = storage.nbytes() < tensor.nbytes  # one number standing for many: a copy would write them out
        if tensor.nbytes < smallest_bytes or is_expanded or storage.data_ptr() in stays:
            return tensor
        return hold(tensor)

    def unpack(kept: Tensor | Held) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.fetch()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _sharing(host: Host) -> Callable[[Tensor], Held]:
    """`host.hold`, which copies the same values once, however many operators keep them."""
    held: WeakValueDictionary[tuple[object, ...], Held] = WeakValueDictionary()
    storages: dict[int, StorageWeakRef] = {}  # while one is here, its address belongs to no other storage

    def hold(tensor: Tensor) -> Held:
        storage = tensor.untyped_storage()
        storages.setdefault(storage._cdata, StorageWeakRef(storage))
        key = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        found = held.get(key)
        if found is None:
            held[key] = found = host.hold(tensor)
        return found

    return hold
