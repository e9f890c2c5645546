"""A rank dies: whatever the other one sends or waits for next, it is told so, and can tell it from other errors."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_processes import Ended, RankPair

from grpo.errors import RankLost
from grpo.runtime.distributed import Ranks


def what_each_raises(dies: int | None) -> list[str]:
    """The errors of everything that is sent, one after the other, once a rank has died."""
    ranks = Ranks(use_cpu=True)
    reduce = ranks.all_reduce
    assert reduce is not None
    sendings: list[Callable[[], object]] = [
        lambda: ranks.gather([1]),
        lambda: ranks.any(True),
        lambda: ranks.on_main(lambda: 1),
        lambda: ranks.together(lambda: 1),
        lambda: reduce(torch.ones(3)),
        lambda: ranks.check_equal({"weight": torch.ones(3)}),
    ]
    if dies == ranks.index:
        os.kill(os.getpid(), signal.SIGKILL)
    told: list[str] = []
    for send in sendings:
        try:
            send()
            told.append("no error")
        except RankLost as exc:
            told.append(str(exc))
    return told


def what_a_tensor_raises_that_cannot_be_added() -> str:
    reduce = Ranks(use_cpu=True).all_reduce
    assert reduce is not None
    with pytest.raises(RuntimeError) as caught:
        reduce(torch.zeros(3, dtype=torch.int16))
    return type(caught.value).__name__


@pytest.mark.parametrize("dies", [pytest.param(0, marks=pytest.mark.long), 1])
def test_whatever_is_sent_after_a_rank_has_died_raises_that_it_is_lost(dies: int, tmp_path: Path) -> None:
    with RankPair(tmp_path) as two:
        assert two.run(what_a_tensor_raises_that_cannot_be_added) == ["RuntimeError"] * 2  # an error of its own kind
        assert two.run(what_each_raises, None) == [["no error"] * 6] * 2
        answers = two.run(what_each_raises, dies)
    assert answers[dies] == Ended(code=-signal.SIGKILL)
    for told in answers[1 - dies]:
        assert told.startswith("another process of this run is gone: it has ended or was killed, or its machine cannot")
        assert told.endswith("start all of them again by the same command.")
        assert "pair.cc" not in told  # where in gloo
