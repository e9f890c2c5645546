"""How long should an idle OpenMP thread spin before it sleeps: alone on the machine, and beside another process?

    python benchmarks/thread_waiting.py

Small products and what follows them, as in decoding ([64, 576] by [576, 576], tanh), for some seconds in each setting;
then in two processes at once. Where OMP_WAIT_POLICY is not set, `grpo` takes `grpo.runtime.torch_environment`'s count.
Prints passes a second, over those of threads that sleep at once and are alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from typing import Any

from grpo.runtime.torch_environment import SPINS

COUNTS = {"sleep at once": 0, f"{SPINS} looks (ours)": SPINS, "300000 looks (libgomp's own)": 300_000}
PRODUCTS = 60


def passes_per_second(seconds: float) -> float:
    """In this process, with torch's own number of threads."""
    import torch

    inputs, matrices = torch.randn(64, 576), [torch.randn(576, 576) for _ in range(PRODUCTS)]
    print("ready", flush=True)
    sys.stdin.readline()  # all processes begin together
    start, passes = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < seconds:
        states = inputs
        for matrix in matrices:
            states = torch.tanh(states @ matrix) * 0.1
        passes += 1
    return passes / taken


def measured(spins: int, seconds: float, *, processes: int) -> list[float]:
    """Passes a second of each of so many processes at once."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(spins)}
    command = [sys.executable, __file__, "--passes", str(seconds)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    begun = [subprocess.Popen(command, env=environment, **pipes) for _ in range(processes)]
    for process in begun:
        process.stdout.readline()
    for process in begun:
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [process.communicate()[0] for process in begun]
    if failed := [process.returncode for process in begun if process.returncode]:
        sys.exit(f"a process ended with {failed[0]}")
    return [float(text) for text in found]


def main() -> None:
    """Parse, measure, tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--passes", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.passes is not None:
        print(passes_per_second(arguments.passes))
        return
    print("| an idle thread | alone | each of two processes |\n|---|---|---|")
    base = None
    for name, spins in COUNTS.items():
        (alone,) = measured(spins, arguments.seconds, processes=1)
        beside = measured(spins, arguments.seconds, processes=2)
        base = base or alone
        print(f"| {name} | {alone / base:.2f} | {sum(beside) / len(beside) / base:.2f} |", flush=True)


if __name__ == "__main__":
    main()
