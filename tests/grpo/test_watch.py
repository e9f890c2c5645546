"""The watch: peaks by phase of a run that is seen from outside, and what fills the machine is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from grpo.diagnostics.watch import Seen, Usage, Watched, hint, usage_of, watch
from grpo.errors import ConfigError
from grpo.run_directory import RunDirectory

MIB = 1 << 20


def run_in(folder: Path) -> RunDirectory:
    """A run directory that this process holds."""
    directory = RunDirectory(folder)
    directory.lock()
    return directory


def test_the_peak_of_each_phase_is_kept_until_the_run_ends(tmp_path: Path) -> None:
    directory = run_in(tmp_path)
    script = [("rollout", 5, 50), ("rollout", 9, 40), ("backward", 7, 80), ("rollout", 6, 45)]
    shown = iter(script)
    held: dict[str, int] = {}

    def measure(pid: int) -> Usage:
        assert pid == os.getpid()
        name, host, device = next(shown)
        held["host"], held["device"] = host, device
        directory.note_phase(name)  # type: ignore[arg-type]
        return Usage(host_bytes=host, device_bytes=device)

    def sleep(_: float) -> None:
        if held["host"] == 6:  # the last of the script
            directory.unlock()

    *_, last = watch(tmp_path, sleep=sleep, measure=measure)
    assert last.phases == {
        "rollout": Seen(phase="rollout", peak=Usage(host_bytes=9, device_bytes=50), samples=3),
        "backward": Seen(phase="backward", peak=Usage(host_bytes=7, device_bytes=80), samples=1),
    }
    assert last.phase == "rollout"


def test_where_no_run_is_going_on_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run is going on"):
        next(watch(tmp_path))
    directory = run_in(tmp_path)
    dead = {**json.loads((tmp_path / ".lock").read_text()), "started": "another boot/1"}
    directory.unlock()
    (tmp_path / ".lock").write_text(json.dumps(dead))
    with pytest.raises(ConfigError, match="no run is going on"):
        next(watch(tmp_path))


def test_the_memory_of_a_process_and_its_children_is_counted_until_they_end() -> None:
    fill = "block = bytearray(60 << 20); print('ready', flush=True); input()"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {fill!r}])"
    process = subprocess.Popen([sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    usage = usage_of(process.pid)
    assert usage is not None
    assert usage.host_bytes > 60 * MIB  # the child's
    process.communicate("done\n")
    assert usage_of(process.pid) is None


@pytest.mark.parametrize(
    ("phase", "usage", "said"),
    [
        ("backward", Usage(host_bytes=10, device_bytes=95), "backward fills the card to 95%: lower update.micro"),
        ("rollout", Usage(host_bytes=10, device_bytes=91), "rollout fills the card to 91%: lower rollout.max_rows"),
        ("start", Usage(host_bytes=195, device_bytes=None), "start fills host memory to 98%"),
        ("backward", Usage(host_bytes=100, device_bytes=50), ""),
    ],
)
def test_the_hint_names_the_phase_that_fills_the_machine(phase: str, usage: Usage, said: str) -> None:
    seen = Seen(phase=phase, peak=usage, samples=1)
    watched = Watched(step=1, phase=phase, now=usage, phases={phase: seen})
    told = hint(watched, host_bytes=200, device_bytes=100 if usage.device_bytes else None)
    assert told.startswith(said)
    assert bool(told) == bool(said)


def test_a_real_run_says_what_it_does(tmp_path: Path) -> None:
    directory = run_in(tmp_path)
    directory.note_phase("optimizer")
    looks = watch(tmp_path, interval_s=0.01)
    first = next(looks)
    assert (first.phase, first.step) == ("optimizer", 0)
    assert first.now.host_bytes > 50 * MIB
    threading.Timer(0.1, directory.unlock).start()
    assert len(list(looks)) >= 1
