"""What a forward pass keeps for its backward pass, and how much of it only because certain parameters learn.

Read off autograd's saved tensors, so it holds for any model; what checkpointing and offloading leave out is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptMemory:
    """Counts one batch's pass, in bytes. Leaves the model, `requires_grad` and the random generators as they were."""

    model: nn.Module
    """In the mode that it trains in, with its dropout: a dropped copy of an input is kept too."""
    loss: Callable[[], Tensor]
    """A forward pass through the model and a scalar."""

    def total(self) -> int:
        """Of all that learns. Weights are not counted, each storage is counted once."""
        holders = [*self.model.parameters(), *self.model.buffers()]
        own = {_storage(tensor) for tensor in holders}
        kept: dict[int, Tensor] = {}  # held until the end: a freed address would be used again

        def keep(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in own:
                kept[_storage(tensor)] = tensor
            return tensor

        devices = range(torch.cuda.device_count())
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.random.fork_rng(devices=devices), hooks:
            self.loss()
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    def because_of(self, names: Collection[str]) -> int:
        """What would not be kept if these parameters were frozen. Costs two passes."""
        learning = dict(self.model.named_parameters())
        frozen = [learning[name] for name in names if learning[name].requires_grad]
        total = self.total()
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            return total - self.total()
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
