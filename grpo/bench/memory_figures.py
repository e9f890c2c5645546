"""Measured memory cases <-> the JSON file of `grpo bench memory`, and what misses its target. Imports no torch."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grpo.bench.cases import CASES, MemoryCase
from grpo.bench.memory import ALLOCATOR, Measured, predicted_peaks
from grpo.errors import ConfigError
from grpo.runtime.memory_hardware import num_threads

MOST_ERROR = 0.1
"""Of a prediction, as a share of what was measured."""


def as_json(measured: Iterable[Measured], *, device: str, command: str) -> dict[str, Any]:
    """The figures, with the machine and the versions that they are of; cases in the grid's order."""
    order = {case.name: number for number, case in enumerate(CASES)}
    return {
        "command": command,
        **_circumstances(device),
        "calibrated_on": [case.name for case in CASES if case.is_calibration],
        "cases": [
            {
                **asdict(each.case),
                "peak_bytes": each.peak_bytes,
                "predicted_bytes": each.predicted_bytes,
                "error": each.error,
                "peaks": dict(each.peaks),
                "host_peaks": dict(each.host_peaks),
                "predicted": dict(each.predicted),
                "tokens_per_s": dict(each.tokens_per_s),
            }
            for each in sorted(measured, key=lambda each: order[each.case.name])
        ],
    }


def _circumstances(device: str) -> dict[str, Any]:
    """What all figures of a file have in common."""
    return {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "device": device,
        "threads": num_threads(),
        "allocator": ALLOCATOR,
    }


def held_figures(path: Path, *, device: str) -> dict[str, Measured]:
    """Name -> what the file holds of the grid's cases, their predictions made anew.

    Cases whose settings have changed since are left out.

    Raises:
        ConfigError: the file is none of `grpo bench memory`, or of another machine, device or versions.
    """
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        cases: list[Mapping[str, Any]] = document["cases"]
        found = {entry["name"]: entry for entry in cases}
    except (ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"--json {path}: no figures of `grpo bench memory` ({exc!r}). Name another file.") from exc
    for what, now in _circumstances(device).items():
        if document.get(what) != now:
            raise ConfigError(
                f"--json {path} holds figures of {what} {document.get(what)}; here it is {now}. Name another file."
            )
    return {case.name: _read(case, found[case.name], device) for case in CASES if _is_of(case, found.get(case.name))}


def _is_of(case: MemoryCase, entry: Mapping[str, Any] | None) -> bool:
    settings = json.loads(json.dumps(asdict(case)))
    return entry is not None and all(entry.get(key) == value for key, value in settings.items())


def _read(case: MemoryCase, entry: Mapping[str, Any], device: str) -> Measured:
    return Measured(
        case=case,
        peaks=entry["peaks"],
        host_peaks=entry["host_peaks"],
        predicted=predicted_peaks(case, device=device),
        tokens_per_s=entry["tokens_per_s"],
    )


def misses(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cases that nothing was calibrated on and whose prediction is off by more than `MOST_ERROR`. Args: of the JSON."""
    return [
        f"{case['name']}: predicted {case['error']:+.1%} of the measured peak; the target is {MOST_ERROR:.0%}"
        for case in cases
        if not case["is_calibration"] and abs(case["error"]) > MOST_ERROR
    ]
