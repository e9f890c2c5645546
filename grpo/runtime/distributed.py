"""The processes of one run: who owns which prompts, and what they add up or tell each other.

Everything that decides what a run does next is decided from sums over all ranks, so that no rank takes another turn.
A run in one process has one rank, and sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce

Item = TypeVar("Item")


class Ranks:
    """The ranks of a run, under accelerate: `accelerate launch -m grpo train ...` starts several."""

    def __init__(self, *, use_cpu: bool = False) -> None:
        """Join the other processes, where the environment names any. Args: use_cpu: gloo, though there is a card."""
        self._state = PartialState(cpu=use_cpu)

    @property
    def index(self) -> int:
        """This process's number, from 0."""
        return int(self._state.process_index)

    @property
    def count(self) -> int:
        """How many processes there are."""
        return int(self._state.num_processes)

    @property
    def is_main(self) -> bool:
        """The one rank that writes files and talks to the person."""
        return self.index == 0

    @property
    def device_index(self) -> int:
        """Which of this machine's cards is this process's."""
        return int(self._state.local_process_index)

    def own(self, items: Sequence[Item]) -> list[Item]:
        """This rank's share: every count-th item. A group is one item, and so stays whole."""
        return list(items[self.index :: self.count])

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """All ranks' items, on every rank, in rank order."""
        return list(items) if self.count == 1 else list(gather_object(list(items)))

    def sum(self, value: float) -> float:
        """The sum of every rank's number."""
        return float(sum(self.gather([value])))

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return any(self.gather([flag]))

    @property
    def all_reduce(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Adds a tensor up over the ranks; None where there is one."""
        return None if self.count == 1 else lambda tensor: reduce(tensor, reduction="sum")  # pyright: ignore[reportReturnType]

    def on_main(self, do: Callable[[], Item]) -> Item:
        """What `do` returns on the main rank, given to every rank; what it raises there is raised on every rank."""
        if self.count == 1:
            return do()
        told: list[Any] = [None, None]
        if self.is_main:
            try:
                told[0] = do()
            except Exception as exc:  # noqa: BLE001  raised below, here and on every other rank
                told[1] = exc
        broadcast_object_list(told)
        if told[1] is not None:
            raise told[1]
        return told[0]
