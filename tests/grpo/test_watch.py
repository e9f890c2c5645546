"""The watch: peaks by phase of a run that is seen from outside, and what fills the machine is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from grpo.diagnostics.watch import Seen, Usage, Watched, fullest_card, hint, usage_of, watch
from grpo.diagnostics.watch_display import WatchDisplay
from grpo.diagnostics.watch_plan import PlannedRun, planned_run
from grpo.errors import ConfigError
from grpo.recipe_loader import parse_recipe
from grpo.run_directory import RunDirectory
from grpo.runtime.machine import Gpu, MachineFacts
from grpo.runtime.memory import CONTEXT_BYTES, PROCESS_BYTES, plan
from grpo.runtime.memory_hardware import hardware_named
from grpo.runtime.prompt_lengths import longest_prompt

MIB = 1 << 20
GIB = 1 << 30
CARD = Gpu(name="L4", capability=(8, 9), total_bytes=int(22.0 * GIB), free_bytes=GIB, uuid="GPU-a")
FACTS = MachineFacts(
    python="3.11.7",
    platform="Linux",
    cores=2,
    host_bytes=64 * GIB,
    available_bytes=60 * GIB,
    torch_cuda="12.4",
    gpus=(CARD,),
)


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
    told = hint(watched, host_bytes=200, cards={"": 100})
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


def test_of_several_cards_the_one_counts_that_holds_most_of_the_run() -> None:
    listed = "GPU-a, 11, 1000\nGPU-b, 11, 300\nGPU-b, 12, 900\nGPU-a, 99, 5000\n"
    assert fullest_card(listed, {11, 12}) == (1200 * MIB, "GPU-b")
    assert fullest_card(listed, {7}) == (None, "")  # not 0: their ids are another namespace's, or it has no card
    assert fullest_card("GPU-a, 11, [N/A]\n", {11}) == (None, "")
    half_full = Usage(host_bytes=1, device_bytes=50, card="GPU-b")
    watched = Watched(
        step=1, phase="rollout", now=half_full, phases={"rollout": Seen(phase="rollout", peak=half_full, samples=1)}
    )
    assert hint(watched, host_bytes=100, cards={"GPU-a": 100, "GPU-b": 100}) == ""
    assert hint(watched, host_bytes=100, cards={"GPU-a": 100, "GPU-b": 52}).startswith("rollout fills the card to 96%")


def shown(watched: Watched, planned: PlannedRun | None = None, facts: MachineFacts = FACTS) -> str:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with WatchDisplay(facts, planned, console) as display:
        display.show(watched)
    console.file.close()
    return console.export_text()


def started_run(folder: Path, model: Path | str, *, evaluates: bool = True) -> Path:
    values = {
        "model": str(model),
        "steps": 1,
        "output_dir": str(folder),
        "prompts": {"type": "file", "path": "train.jsonl", "per_step": 1},
        "objectives": {"short": {"rewards": [{"name": "exact_match"}], "beta": {"type": "fixed", "value": 0.1}}},
        "optim": {"learning_rate": 1e-4},
        "dtype": "float32",
        "eval": {"before": evaluates, "after": evaluates},
    }
    RunDirectory(folder).create(parse_recipe(values, base_dir=folder.parent, source="test"))
    return folder


def test_each_phase_stands_beside_what_its_plan_says(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = started_run(tmp_path / "run", tiny_model_dir)
    planned = planned_run(run, FACTS)
    recipe = parse_recipe(yaml.safe_load((run / "config.yaml").read_text()), base_dir=tmp_path, source="test")
    sizes = {phase.name: phase for phase in plan(recipe, hardware_named("l4")).phases}
    assert planned.phases["rollout"].device_bytes == sizes["sampling"].peak_bytes + CONTEXT_BYTES
    assert planned.phases["backward"].device_bytes == sizes["update"].peak_bytes + CONTEXT_BYTES
    assert planned.phases["optimizer"] == planned.phases["backward"]
    assert planned.phases["checkpoint_write"].host_bytes == sizes["checkpoint"].host_bytes + PROCESS_BYTES
    assert planned.phases["start"].host_bytes == sizes["load"].host_bytes + PROCESS_BYTES
    usage = Usage(host_bytes=GIB, device_bytes=3 * GIB, card="GPU-a")
    seen = {name: Seen(phase=name, peak=usage, samples=4) for name in ("rollout", "judging")}
    text = shown(Watched(step=2, phase="rollout", now=usage, phases=seen), planned)
    rollout, judging = (next(line for line in text.splitlines() if line.split()[:1] == [name]) for name in seen)
    assert rollout.split()[1:] == f"1.00 GiB {gib(planned, 'host')} 3.00 GiB {gib(planned, 'device')} 4".split()
    assert judging.split()[1:] == ["1.00", "GiB", "-", "3.00", "GiB", "-", "4"]
    assert "22.00 GiB" in text
    assert "planned for prompts of 512 tokens (assumed)" in text  # there is no train.jsonl
    assert "rollout holds" in text  # 3 GiB, where a tiny model was planned


def gib(planned: PlannedRun, of: str) -> str:
    return f"{getattr(planned.phases['rollout'], f'{of}_bytes') / GIB:.2f} GiB"


def test_on_a_cpu_the_plan_is_one_of_host_memory(tmp_path: Path, tiny_model_dir: Path) -> None:
    planned = planned_run(started_run(tmp_path / "run", tiny_model_dir), replace(FACTS, gpus=()))
    assert planned.phases["rollout"].device_bytes is None
    assert planned.phases["backward"].host_bytes > PROCESS_BYTES


def test_the_plan_beside_a_run_is_of_the_runs_own_prompts(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "Who?", "reference": "Anna"}\n')
    run = started_run(tmp_path / "run", tiny_model_dir, evaluates=False)
    recipe = parse_recipe(yaml.safe_load((run / "config.yaml").read_text()), base_dir=tmp_path, source="test")
    tokens = longest_prompt(recipe).tokens
    planned = planned_run(run, FACTS)
    assert tokens < 100
    assert planned.note.startswith(f"planned for prompts of {tokens} tokens and completions of ")
    sizes = {phase.name: phase for phase in plan(recipe, hardware_named("l4"), prompt_tokens=tokens).phases}
    assert planned.phases["backward"].device_bytes == sizes["update"].peak_bytes + CONTEXT_BYTES


def test_where_no_plan_can_be_made_it_says_why_and_goes_on(tmp_path: Path) -> None:
    planned = planned_run(started_run(tmp_path / "run", tmp_path / "nowhere"), FACTS)
    assert planned.phases == {}
    usage = Usage(host_bytes=GIB, device_bytes=None)
    seen = {"rollout": Seen(phase="rollout", peak=usage, samples=1)}
    text = shown(Watched(step=0, phase="rollout", now=usage, phases=seen), planned)
    assert text.count("there is no plan to compare with: ") == 1
    assert "nvidia-smi names no process of this run" in text
    assert "0.00" not in text
    assert "nvidia-smi" not in shown(
        Watched(step=0, phase="rollout", now=usage, phases=seen), planned, replace(FACTS, gpus=())
    )


def test_what_is_well_above_its_plan_is_told_but_not_what_an_earlier_phase_left_behind() -> None:
    planned = {
        "rollout": Usage(host_bytes=100, device_bytes=100),
        "backward": Usage(host_bytes=100, device_bytes=300),
    }

    def told(**device_bytes: int) -> str:
        phases = {
            name: Seen(phase=name, peak=Usage(host_bytes=100, device_bytes=held), samples=1)
            for name, held in device_bytes.items()
        }
        watched = Watched(step=1, phase="rollout", now=phases["rollout"].peak, phases=phases)
        return hint(watched, host_bytes=10_000, cards={}, planned=planned)

    assert told(rollout=120) == ""
    assert told(rollout=150).startswith("rollout holds 1.5 times the device memory that was planned")
    assert told(backward=290, rollout=290) == ""  # what the update took stays reserved
    assert told(backward=600, rollout=290).startswith("backward holds 2.0 times the device memory")
    on_host = Usage(host_bytes=200, device_bytes=None)
    phases = {"rollout": Seen(phase="rollout", peak=on_host, samples=1)}
    watched = Watched(step=1, phase="rollout", now=on_host, phases=phases)
    of_cpu = {"rollout": Usage(host_bytes=100, device_bytes=None)}
    assert hint(watched, host_bytes=10_000, cards={}, planned=of_cpu).startswith("rollout holds 2.0 times the host")
    assert hint(watched, host_bytes=10_000, cards={}, planned=planned) == ""  # CUDA's libraries are on the host, too
