"""How OpenMP's threads wait, and in which pages tensors come: defaults of ours, which a user's own choice replaces."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from grpo.runtime.torch_environment import torch_environment, waiting

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_threads_sleep_after_a_short_spin_where_nothing_is_said() -> None:
    assert waiting({}) == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}
    assert waiting({"GOMP_SPINCOUNT": "5"}) == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5"}


def test_what_is_set_is_left_alone_with_all_its_consequences() -> None:
    assert waiting({"OMP_WAIT_POLICY": "ACTIVE"}) == {}
    assert torch_environment({"OMP_WAIT_POLICY": "ACTIVE", "THP_MEM_ALLOC_ENABLE": "0"}) == {}


def bare() -> dict[str, str]:
    """This process's environment, as if nobody had set anything."""
    ours = torch_environment({})
    return {name: value for name, value in os.environ.items() if name not in ours}


def faults_of_a_big_tensor(chosen: Mapping[str, str]) -> int:
    """Page faults of filling a new tensor of 256 MiB, in a process of its own."""
    script = (
        "import resource, torch\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "before = faults(); torch.ones(1 << 26); print(faults() - before)\n"
    )
    environment = {**bare(), **chosen}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not PAGES.exists() or "[madvise]" not in PAGES.read_text(), reason="no huge pages on request here")
def test_a_big_tensor_takes_less_than_a_tenth_of_the_page_faults() -> None:
    plain = faults_of_a_big_tensor({})
    assert plain > 256 * 2**20 / 4096 / 2
    assert faults_of_a_big_tensor(torch_environment({})) < plain / 10


def test_the_command_sets_it_before_torch_is_there() -> None:
    script = (
        "import os, sys, grpo.cli\n"
        "assert 'torch' not in sys.modules\n"
        "sys.argv[1:] = ['--help']\n"
        "try: grpo.cli.main()\n"
        f"finally: print(*(os.environ[name] for name in {list(torch_environment({}))}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=bare(), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == list(torch_environment({}).values())
