"""The processes of one run: who owns which prompts, and what they add up or tell each other.

Everything that decides what a run does next is decided from what all ranks say, so that no rank takes another turn:
an error that one rank meets alone is raised on every rank. A run in one process has one rank, and sends nothing.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env, reduce

from grpo.errors import ConfigError, RankLost, RunStopped

Item = TypeVar("Item")

TIMEOUT = timedelta(hours=2)
"""Longest that ranks wait for one whose judges are slow or that writes a checkpoint. A rank that dies is noticed by
the launcher, or by its closed connection, at once."""
_CONNECTIONS_SAY = (
    "gloo/transport",  # the file that it names: a connection that was closed or reset, or that was silent for TIMEOUT
    "gloo/rendezvous",
    "caused pair closure",  # of a connection that broke in an earlier call
    "ncclRemoteError",
    "remote process exited",
)
"""Parts of the messages of a lost process: gloo raises a bare RuntimeError for it, NCCL one class for everything."""


class Ranks:
    """The ranks of a run, under accelerate: `accelerate launch -m grpo train ...` starts several.

    Every method that sends anything raises RankLost where another rank is gone.
    """

    def __init__(self, *, use_cpu: bool = False) -> None:
        """Join the other processes, where the environment names any.

        Args:
            use_cpu: gloo, though there is a card. So it is where there is none, or under `accelerate launch --cpu`.
        Raises:
            ConfigError: this is one of several processes, but it has not found the others.
            RankLost: another one went while they met.
        """
        if PartialState._shared_state:
            self._state = PartialState()  # a process joins once; asking again for another device would not change it
        else:
            on_cpu = use_cpu or launched_for_cpu() or not torch.cuda.is_available()
            with _lost_ranks():
                self._state = PartialState(cpu=on_cpu, timeout=TIMEOUT)
        started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
        if started != self.count:
            raise ConfigError(
                f"the launcher started {started} processes, but this one has joined {self.count}: something used "
                "accelerate before the run did. Start the run from its own process."
            )

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
        """All ranks' items, on every rank, in rank order. They are pickled: a tensor among them is on the CPU."""
        if self.count == 1:
            return list(items)
        with _lost_ranks():
            return list(gather_object(list(items)))

    def gather_from(self, do: Callable[[], Sequence[Item]]) -> list[Item]:
        """What `do` returns on every rank, on every rank, in rank order.

        Raises:
            Exception: what `do` raised on the first rank where it failed; on every rank, so that none waits for it.
        """
        if self.count == 1:
            return list(do())
        mine: Sequence[Item] | Exception
        try:
            mine = list(do())
        except Exception as exc:  # noqa: BLE001  raised below, here and on every other rank
            mine = exc
        told: list[Sequence[Item] | Exception] = self.gather(
            [_as_sent(mine, rank=self.index) if isinstance(mine, Exception) else mine]
        )
        failed = [rank for rank, each in enumerate(told) if isinstance(each, Exception)]
        if failed and failed[0] == self.index and isinstance(mine, Exception):
            raise mine  # with its traceback
        found: list[Item] = []
        for each in told:
            if isinstance(each, Exception):
                raise each
            found += each
        return found

    def together(self, do: Callable[[], Item]) -> Item:
        """What `do` returns here, once it has returned on every rank. Raises as `gather_from` does."""
        done: list[Item] = []
        self.gather_from(lambda: done.append(do()) or ())
        return done[0]

    def sum(self, value: float) -> float:
        """The sum of every rank's number."""
        return float(sum(self.gather([value])))

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return any(self.gather([flag]))

    @property
    def all_reduce(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Adds a tensor up over the ranks; None where there is one."""
        return None if self.count == 1 else _added_up

    def on_main(self, do: Callable[[], Item]) -> Item:
        """What `do` returns on the main rank, given to every rank; what it raises there is raised on every rank."""
        if self.count == 1:
            return do()
        told: list[Item | Exception | None] = [None, None]
        mine: Exception | None = None
        if self.is_main:
            try:
                told[0] = do()
            except Exception as exc:  # noqa: BLE001  raised below, here and on every other rank
                mine = exc
                told[1] = _as_sent(exc, rank=self.index)
        with _lost_ranks():
            broadcast_object_list(told)
        if mine is not None:
            raise mine  # with its traceback
        if isinstance(told[1], Exception):
            raise told[1]
        return told[0]  # pyright: ignore[reportReturnType]

    def check_equal(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Compare the ranks' parameters, bit for bit.

        Args:
            parameters: name -> tensor, the same names in the same order on every rank.
        Raises:
            RunStopped: a parameter differs; names the first, on every rank.
        """
        if self.count == 1:
            return
        told = self.gather([{name: _digest(tensor) for name, tensor in parameters.items()}])
        for name in told[0]:
            differing = [rank for rank, each in enumerate(told) if each.get(name) != told[0][name]]
            if differing:
                raise RunStopped(
                    f"the ranks' copies of {name} differ: rank {differing[0]} has learned something else than rank 0. "
                    "Nothing was saved of it. Check that all processes run the same code on the same kind of device, "
                    "and go on from the last checkpoint with --resume."
                )


def launched_for_cpu() -> bool:
    """Whether `accelerate launch --cpu` started this process."""
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU"))


def _added_up(tensor: torch.Tensor) -> torch.Tensor:
    with _lost_ranks():
        return reduce(tensor, reduction="sum")  # pyright: ignore[reportReturnType]  a tensor for a tensor


@contextmanager
def _lost_ranks() -> Iterator[None]:
    """What a broken connection to another rank raises becomes a RankLost; all other errors stay what they are."""
    try:
        yield
    except RuntimeError as exc:
        is_unmet = isinstance(exc, torch.distributed.DistNetworkError | torch.distributed.DistStoreError)
        if not is_unmet and not any(text in str(exc) for text in _CONNECTIONS_SAY):
            raise
        said = re.sub(r"^\[\S+\] ", "", str(exc).partition("\n")[0]).partition(". This is typically")[0]
        raise RankLost(
            "another process of this run is gone: it has ended or was killed, or its machine cannot be reached "
            f"({said}). A run goes on with all of its processes or with none. See what that process, the launcher and "
            "the kernel's log (for out of memory) say of its end; then start all of them again by the same command."
        ) from exc


def _digest(tensor: torch.Tensor) -> bytes:
    """Of the tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().data, digest_size=16).digest()


def _as_sent(exc: Exception, *, rank: int) -> Exception:
    """The exception as another rank can read it: some are pickled without complaint, but cannot be read."""
    try:
        pickle.loads(pickle.dumps(exc))  # noqa: S301  what this process wrote itself
    except Exception:  # noqa: BLE001  whatever a foreign class does
        return RuntimeError(f"rank {rank} failed: {type(exc).__name__}: {exc}")
    return exc
