"""What a file of results says of how it came about: the command, the machine, the versions."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


def command() -> str:
    """The one that this process was started with."""
    return " ".join(["python", *sys.argv])


def circumstances(*packages: str, computes: bool = False) -> dict[str, Any]:
    """The head of a document.

    Args:
        packages: whose versions bear on the figures, besides Python's and this project's.
        computes: torch does, on the device and in the dtype that `auto` stands for.
    """
    names = ("grpo-toolkit", *packages)
    return {
        "command": command(),
        "machine": {"platform": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()}
        | (_device() if computes else {}),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
    }


def _device() -> dict[str, Any]:
    import torch  # slow to import, and read at its import is how threads wait

    from grpo.runtime.devices import choose_device, choose_dtype

    device = choose_device("auto")
    return {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(choose_dtype("auto", device)).removeprefix("torch."),
    }


def held_figures(path: Path | None, begun: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The document that a file holds already, to be added to; `begun` where there is none.

    Exits where it differs in one of the keys: figures of two machines, or of two versions, do not go into one file.
    """
    if path is None or not path.exists():
        return {**begun}
    held = json.loads(path.read_text())
    for key in keys:
        if held.get(key) != begun[key]:
            sys.exit(f"{path} holds figures of another {key}: {held.get(key)}, not {begun[key]}. Name another file.")
    return held


def write_results(path: Path, document: Mapping[str, Any]) -> None:
    """As JSON; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
