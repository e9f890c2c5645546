"""How OpenMP's threads wait: a default of ours, which a user's own choice replaces whole."""

from __future__ import annotations

import os
import subprocess
import sys

from grpo.runtime.waiting import waiting


def test_threads_sleep_after_a_short_spin_where_nothing_is_said() -> None:
    assert waiting({}) == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}
    assert waiting({"GOMP_SPINCOUNT": "5"}) == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5"}


def test_a_policy_of_ones_own_is_left_alone_with_all_its_consequences() -> None:
    assert waiting({"OMP_WAIT_POLICY": "ACTIVE"}) == {}


def test_the_command_sets_it_before_torch_is_there() -> None:
    script = (
        "import os, sys, grpo.cli\n"
        "assert 'torch' not in sys.modules\n"
        "sys.argv[1:] = ['--help']\n"
        "try: grpo.cli.main()\n"
        "finally: print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'])\n"
    )
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", script], env=bare, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "PASSIVE 20000"
