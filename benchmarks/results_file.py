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

from grpo.runtime.torch_environment import torch_environment


def command() -> str:
    """The one that this process was started with."""
    return " ".join(["python", *sys.argv])


def circumstances(*packages: str, device: str | None = None, dtype: str = "auto") -> dict[str, Any]:
    """The head of a document.

    Args:
        packages: whose versions bear on the figures, besides Python's and this project's.
        device: where torch computes, `auto` as in a recipe; None: it does not.
        dtype: in which it does, likewise.
    """
    names = ("grpo-toolkit", *packages)
    return {
        "command": command(),
        "machine": {"platform": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()}
        | ({} if device is None else _device(device, dtype)),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
    }


def _device(name: str, dtype: str) -> dict[str, Any]:
    import torch  # imported late: it is slow, and reads the environment as it loads

    from grpo.runtime.devices import choose_device, choose_dtype

    device = choose_device(name)
    return {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(choose_dtype(dtype, device)).removeprefix("torch."),
        "environment": {name: os.environ[name] for name in torch_environment({}) if name in os.environ},
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
