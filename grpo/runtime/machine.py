"""What the machine is, as far as a run depends on it: read once, without touching a card's settings.

`Machine` asks the system; a test, or somebody who wants to see what another machine would be told, presents facts of
their own through the same questions.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil
from packaging.requirements import Requirement

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "trl": "trl",
    "datasets": "datasets",
    "safetensors": "safetensors",
    "pydantic": "pydantic",
    "httpx": "httpx",
    "vllm": "vllm",
    "flash-attn": "flash_attn",
    "bitsandbytes": "bitsandbytes",
}
"""Distribution -> the name it is imported by."""
OWN_PACKAGES = ("grpo", "rewards", "judges")
BFLOAT16_CAPABILITY = (8, 0)
TOOL_TIMEOUT_S = 20.0
IMPORT_TIMEOUT_S = 120.0
CONNECT_TIMEOUT_S = 5.0
CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
"""Which groups this process is in."""
NO_LIMIT = 1 << 60
"""cgroup v1 writes a number near 2^63 for "none"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A card as its driver names it."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    uuid: str = ""
    """What the driver calls it, where processes are listed by card."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """An installed distribution."""

    version: str
    folder: Path | None
    """Where its import name would be loaded from; None where it cannot be found."""
    home: Path | None
    """Where its distribution says that it lies; None where the two cannot be compared (an editable install)."""
    torch: str = ""
    """Versions of torch that it says it needs, such as "==2.9.0"; "" where any will do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """Everything but free disk space, environment, imports and ports, which depend on the question."""

    python: str
    platform: str
    cores: int
    host_bytes: int
    """Memory of the machine."""
    available_bytes: int
    """That can be had without swapping."""
    limit_bytes: int | None = None
    """Of this container, job or service (cgroup), the tightest; None where there is none. Above it the kernel kills
    with signal 9."""
    limit_used_bytes: int | None = None
    shared_memory_bytes: int | None = None
    """Free in /dev/shm; None where there is none."""
    packages: Mapping[str, Package] = field(default_factory=dict)
    """Distribution -> what is installed; only what is."""
    own_folders: Mapping[str, Path | None] = field(default_factory=dict)
    """grpo, rewards, judges -> the folder that each would be imported from."""
    torch_cuda: str | None = None
    """CUDA version that torch was built for; None: a build for the CPU."""
    torch_archs: tuple[str, ...] = ()
    """Architectures compiled into it, such as sm_80."""
    driver_version: str | None = None
    """None: no NVIDIA driver answers."""
    driver_cuda: str | None = None
    """The highest CUDA version that the driver can run."""
    toolkit_cuda: str | None = None
    """Of the nvcc on the path."""
    gpus: tuple[Gpu, ...] = ()


class Machine(Protocol):
    """What the doctor asks."""

    def facts(self) -> MachineFacts:
        """Read now."""
        ...

    def free_disk_bytes(self, path: Path) -> int:
        """Where `path` lies, or its nearest folder that exists."""
        ...

    def environment(self, name: str) -> str | None:
        """An environment variable; None where it is not set."""
        ...

    def import_problem(self, module: str) -> str:
        """What goes wrong when it is imported, in a process of its own; "" where nothing does."""
        ...

    def is_port_free(self, port: int) -> bool:
        """Whether a server of ours could listen there, on loopback."""
        ...

    def is_listening(self, host: str, port: int) -> bool:
        """Whether somebody takes a connection there."""
        ...


class ThisMachine:
    """The machine that this runs on."""

    def facts(self) -> MachineFacts:
        """See `Machine.facts`. Takes the time that importing torch takes."""
        import torch

        memory = psutil.virtual_memory()
        limit, used = cgroup_memory(CGROUP, MEMBERSHIP.read_text() if MEMBERSHIP.exists() else "")
        driver, driver_cuda, gpus = _driver_and_gpus()
        shared = Path("/dev/shm")
        return MachineFacts(
            python=platform.python_version(),
            platform=platform.platform(),
            cores=os.cpu_count() or 1,
            host_bytes=memory.total,
            available_bytes=memory.available,
            limit_bytes=limit,
            limit_used_bytes=used,
            shared_memory_bytes=shutil.disk_usage(shared).free if shared.is_dir() else None,
            packages={name: package for name in PACKAGES if (package := _package(name)) is not None},
            own_folders={name: _import_folder(name) for name in OWN_PACKAGES},
            torch_cuda=torch.version.cuda,
            torch_archs=tuple(torch.cuda.get_arch_list()) if torch.cuda.is_available() else (),
            driver_version=driver,
            driver_cuda=driver_cuda,
            toolkit_cuda=_toolkit_cuda(),
            gpus=gpus,
        )

    def free_disk_bytes(self, path: Path) -> int:
        """See `Machine.free_disk_bytes`."""
        existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        return shutil.disk_usage(existing).free

    def environment(self, name: str) -> str | None:
        """See `Machine.environment`."""
        return os.environ.get(name)

    def import_problem(self, module: str) -> str:
        """See `Machine.import_problem`. A package compiled for another torch may end the process."""
        command = [sys.executable, "-c", f"import {module}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return f"not imported within {IMPORT_TIMEOUT_S:g} s"
        if done.returncode == 0:
            return ""
        last = next(reversed(done.stderr.strip().splitlines()), "")
        return last or f"ended with code {done.returncode}"

    def is_listening(self, host: str, port: int) -> bool:
        """See `Machine.is_listening`. A host that cannot be found has nobody."""
        try:
            with socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S):
                return True
        except OSError:
            return False

    def is_port_free(self, port: int) -> bool:
        """See `Machine.is_port_free`."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                return False
        return True


def cgroup_memory(root: Path, membership: str = "") -> tuple[int | None, int | None]:
    """(limit, used) in bytes of the tightest group that this process is in; None where there is none.

    A limit of any group above binds too (a scheduler's job, a service, a container), so all on the path are read. Where
    a container sees its own group as the root, the path may lead outside of it: what is not there is passed over.

    Args:
        root: where the groups are mounted, /sys/fs/cgroup.
        membership: what /proc/self/cgroup says, a line `number:controllers:path` for each hierarchy; version 2's has
            no controllers.
    """
    for folder, controller, limit_name, used_name in (
        (root, "", "memory.max", "memory.current"),
        (root / "memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        own = _path_of(membership, controller)
        groups = [folder / group for group in (own, *own.parents)]
        limits = [(limit, group) for group in groups if (limit := _number_in(group / limit_name)) is not None]
        limit, group = min(limits, key=lambda pair: pair[0], default=(NO_LIMIT, folder))
        if limit < NO_LIMIT:
            return limit, _number_in(group / used_name)
    return None, None


def _path_of(membership: str, controller: str) -> Path:
    """Where a hierarchy says that the process is, below its mount; the mount itself where it says nothing."""
    for line in membership.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            return Path(*(part for part in path.split("/") if part not in ("", "..")))
    return Path()


def _number_in(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" is none


def _package(name: str) -> Package | None:
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    module = PACKAGES[name]
    lies_there = any(file.parts[:1] == (module,) for file in found.files or ())
    home = Path(str(found.locate_file(module))).resolve() if lies_there else None
    return Package(version=found.version, folder=_import_folder(module), home=home, torch=_torch_for(found))


def _torch_for(found: importlib.metadata.Distribution) -> str:
    needed = [Requirement(text) for text in found.requires or ()]
    return next((str(one.specifier) for one in needed if one.name == "torch" and _applies(one)), "")


def _applies(requirement: Requirement) -> bool:
    """Here, and without any extra."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _import_folder(module: str) -> Path | None:
    """The folder that `import module` would take; imports nothing."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: a module without a spec stands in its place
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.origin else None


def _driver_and_gpus() -> tuple[str | None, str | None, tuple[Gpu, ...]]:
    """(driver, the CUDA version it can run, its cards) by nvidia-smi, which needs no CUDA context."""
    fields = "driver_version,name,compute_cap,memory.total,memory.free,uuid"
    listed = _output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.splitlines()]
    rows = [row for row in rows if len(row) == 6]
    if not rows:
        return None, None, ()
    said = re.search(r"CUDA Version:\s*([\d.]+)", _output_of("nvidia-smi"))
    gpus = tuple(
        Gpu(
            name=name,
            capability=_pair(capability),
            total_bytes=int(total) << 20,
            free_bytes=int(free) << 20,
            uuid=uuid,
        )
        for _, name, capability, total, free, uuid in rows
        if total.isdigit() and free.isdigit()  # some cards say [N/A]
    )
    return rows[0][0], said.group(1) if said else None, gpus


def _pair(version: str) -> tuple[int, int]:
    major, _, minor = version.partition(".")
    return int(major), int(minor or 0)


def _toolkit_cuda() -> str | None:
    said = re.search(r"release ([\d.]+)", _output_of("nvcc", "--version"))
    return said.group(1) if said else None


def _output_of(*command: str) -> str:
    """What a tool writes; "" where it is not there, fails or hangs: then nothing is known, which is what is told."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
