"""Memory cases -> measured peaks beside the plan's. Starts a process for each; imports no torch itself."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.bench.cases import MemoryCase
from grpo.errors import RunStopped
from grpo.recipe_loader import parse_recipe
from grpo.runtime.memory import MemoryPlan, plan
from grpo.runtime.memory_hardware import Hardware, num_threads
from grpo.runtime.memory_model import shape_of
from grpo.runtime.torch_environment import torch_environment

ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""glibc hands memory back as soon as it is free: what is resident is what is in use. Its defaults keep some of it. Huge
pages as in a run. Set whatever the user's own environment says."""
STAGES_OF = {
    "load": ("load", "engine"),
    "sampling": ("sampling",),
    "reference": ("reference",),
    "update": ("update",),
    "sync": ("sync",),
    "checkpoint": ("checkpoint",),
}
"""Phase of the plan -> stages that are measured."""
UNBOUNDED = 2**50


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One case, measured and predicted, in bytes."""

    case: MemoryCase
    peaks: Mapping[str, int]
    """Phase -> measured peak above the process without a model: of the device, or of the process on a CPU."""
    host_peaks: Mapping[str, int]
    """The same of the process."""
    predicted: Mapping[str, int]
    """Phase -> the plan's."""
    tokens_per_s: Mapping[str, float]
    """Stage -> completion tokens a second."""

    @property
    def peak_bytes(self) -> int:
        return max(self.peaks.values())

    @property
    def predicted_bytes(self) -> int:
        return max(self.predicted.values())

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured; above 0 it was too much."""
        return self.predicted_bytes / self.peak_bytes - 1


def measure_cases(cases: Sequence[MemoryCase], *, device: str = "cpu") -> Iterator[Measured]:
    """Each case as it is done, in a process of its own.

    Raises:
        RunStopped: a process failed; says with which error.
    """
    with tempfile.TemporaryDirectory() as place:
        for case in cases:
            yield _measured(case, Path(place), device)


def _measured(case: MemoryCase, place: Path, device: str) -> Measured:
    answer = probed(case, place, device=device)
    kind = "host_bytes" if device == "cpu" else "device_bytes"

    def peaks(kind: str) -> dict[str, int]:
        return {phase: max(answer["stages"][stage][kind] for stage in stages) for phase, stages in STAGES_OF.items()}

    return Measured(
        case=case,
        peaks=peaks(kind),
        host_peaks=peaks("host_bytes"),
        predicted=predicted_peaks(case, device=device),
        tokens_per_s=answer["tokens_per_s"],
    )


def probed(
    case: MemoryCase, place: Path, *, device: str, steps: int = 2, device_limit_bytes: int | None = None
) -> dict[str, Any]:
    """What `grpo.bench.probe` answers of a case, from a process of its own.

    Args:
        place: a folder for models, which cases share.
        steps: two at least, for the optimizer's moments to be there.
        device_limit_bytes: of the card's memory; all of it where None.
    Raises:
        RunStopped: the process failed.
    """
    spec = {
        "recipe": case.recipe(model_folder(case, place), device=device),
        "prompt_tokens": case.prompt_tokens,
        "steps": steps,
        "device_limit_bytes": device_limit_bytes,
    }
    path = place / "spec.json"
    path.write_text(json.dumps(spec))
    return json.loads(_child(str(path)).strip().splitlines()[-1])


def model_folder(case: MemoryCase, place: Path) -> Path:
    """Where the case's model of random weights lies in `place`; it is made where it is not there yet."""
    values = json.dumps(dict(case.model), sort_keys=True)
    folder = place / hashlib.sha256(f"{values} {case.dtype}".encode()).hexdigest()[:16]
    if not folder.exists():
        _child("make", str(folder), values, case.dtype)
    return folder


def predicted_peaks(case: MemoryCase, *, device: str) -> dict[str, int]:
    """Phase -> what the plan says of a case, in bytes."""
    return {phase.name: phase.peak_bytes for phase in predict(case, device=device).phases}


def predict(case: MemoryCase, *, device: str, device_bytes: int = UNBOUNDED) -> MemoryPlan:
    """The plan of a case, on hardware without bounds or of so much memory. The model need not be there: its config says
    all."""
    folder = Path("model").absolute()
    config = parse_recipe(case.recipe(folder, device=device), base_dir=folder.parent, source=case.name)
    hardware = Hardware(
        name=device, device_bytes=device_bytes, is_cpu=device == "cpu", has_bfloat16=True, threads=num_threads()
    )
    shape = shape_of({**case.model, "dtype": case.dtype}, source=case.name)
    return plan(config, hardware, prompt_tokens=case.prompt_tokens, shape=shape)


def _child(*arguments: str) -> str:
    environment = {**os.environ, **ALLOCATOR, **torch_environment(os.environ)}
    done = subprocess.run(  # the module's own file, with this interpreter
        [sys.executable, "-m", "grpo.bench.probe", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RunStopped(f"a memory case ended before its figures were there: {tail[0]}")
    return done.stdout
