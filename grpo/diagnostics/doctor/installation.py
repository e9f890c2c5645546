"""Python, torch against driver and toolkit, cards, packages: does what is installed fit together?"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from grpo.diagnostics.findings import Finding
from grpo.runtime.machine import BFLOAT16_CAPABILITY, PACKAGES, Machine, MachineFacts

DISTRIBUTION = "grpo-toolkit"
EXTRAS = {"vllm": "vllm", "flash-attn": "flash_attn", "bitsandbytes": "bitsandbytes"}
"""Compiled against one torch each: that they are installed does not say that they load."""


def check_installation(machine: Machine, facts: MachineFacts) -> Iterator[Finding]:
    """Every finding about what is installed."""
    yield _python(facts)
    yield from _torch_and_driver(facts)
    yield from _toolkit(facts)
    yield from _cards(facts)
    yield _versions(facts)
    yield from _extras(machine, facts)
    yield from _origins(facts)


def _python(facts: MachineFacts) -> Finding:
    needed = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    what = f"{facts.python} on {facts.platform}"
    if SpecifierSet(needed).contains(facts.python, prereleases=True):
        return Finding(check="python", status="ok", what=what)
    return Finding(
        check="python",
        status="failed",
        what=f"{what}; {DISTRIBUTION} needs {needed}",
        meaning="what is imported may be another version's files, or end at a syntax that this Python does not know",
        remedy=f"a virtual environment of Python {needed}: bash scripts/quickstart.sh makes one",
    )


def _torch_and_driver(facts: MachineFacts) -> Iterator[Finding]:
    torch = facts.packages.get("torch")
    built = f"torch {torch.version if torch else '?'} built for {_cuda_or_cpu(facts.torch_cuda)}"
    driver = f"driver {facts.driver_version} (up to CUDA {facts.driver_cuda})" if facts.driver_version else "no driver"
    what = f"{built}; {driver}"
    if facts.torch_cuda is None:
        if facts.gpus:
            yield Finding(
                check="torch",
                status="failed",
                what=what,
                meaning=f"the run would leave the {facts.gpus[0].name} idle and train on the CPU",
                remedy="install a CUDA build: pip install --force-reinstall torch --index-url "
                "https://download.pytorch.org/whl/<cuXXX for the driver>",
            )
        else:
            yield Finding(check="torch", status="ok", what=what)
    elif facts.driver_version is None:
        yield Finding(
            check="torch",
            status="warning",
            what=what,
            meaning="no NVIDIA driver answers, so the run trains on the CPU",
            remedy="install the driver, give the container its cards (--gpus all), or set device=cpu to say so",
        )
    elif facts.driver_cuda is not None and _major(facts.driver_cuda) < _major(facts.torch_cuda):
        yield Finding(
            check="torch",
            status="failed",
            what=what,
            meaning="the driver is too old for this build: torch finds no card, or ends at its first call",
            remedy=f"a newer driver, or a torch built for CUDA {_major(facts.driver_cuda)}.x",
        )
    else:
        yield Finding(check="torch", status="ok", what=what)


def _toolkit(facts: MachineFacts) -> Iterator[Finding]:
    if facts.toolkit_cuda is None or facts.torch_cuda is None:
        return
    what = f"CUDA toolkit {facts.toolkit_cuda} on the path, torch built for {facts.torch_cuda}"
    if _major(facts.toolkit_cuda) == _major(facts.torch_cuda):
        yield Finding(check="toolkit", status="ok", what=what)
        return
    yield Finding(
        check="toolkit",
        status="failed",
        what=what,
        meaning="torch brings its own CUDA and runs, but whatever is compiled here (flash-attn, fused optimizers) is "
        "made for another one: it does not load, or ends the process",
        remedy=f"a toolkit {_major(facts.torch_cuda)}.x first on PATH, or a torch built for "
        f"{_major(facts.toolkit_cuda)}.x; wheels that are already compiled need no toolkit at all",
    )


def _cards(facts: MachineFacts) -> Iterator[Finding]:
    for number, gpu in enumerate(facts.gpus):
        major, minor = gpu.capability
        what = (
            f"{number}: {gpu.name}, compute capability {major}.{minor}, "
            f"{gpu.free_bytes / 2**30:.1f} of {gpu.total_bytes / 2**30:.1f} GiB free"
        )
        if facts.torch_archs and not _has_code_for(gpu.capability, facts.torch_archs):
            yield Finding(
                check="card",
                status="failed",
                what=what,
                meaning=f"this torch has code for {', '.join(facts.torch_archs)} only: no kernel runs on the card",
                remedy="a torch build that lists the card's capability (torch.cuda.get_arch_list())",
            )
        elif gpu.capability < BFLOAT16_CAPABILITY:
            yield Finding(
                check="card",
                status="warning",
                what=what,
                meaning="no bfloat16 in hardware and no flash-attn below 8.0: training is in float32, and slow",
                remedy="a card of the A100's generation or later; or a smaller model in dtype=float32",
            )
        elif gpu.free_bytes < 0.9 * gpu.total_bytes:
            yield Finding(
                check="card",
                status="warning",
                what=what,
                meaning="another process holds memory of this card, which the run will lack",
                remedy="nvidia-smi names the processes; end them, or choose another card by CUDA_VISIBLE_DEVICES",
            )
        else:
            yield Finding(check="card", status="ok", what=what)


def _versions(facts: MachineFacts) -> Finding:
    """Against what our own distribution requires: the range that its tests were run in."""
    needed = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or ()]
    ranges = {each.name: each.specifier for each in needed if each.name in PACKAGES}
    outside = []
    for name, package in facts.packages.items():
        try:
            fits = name not in ranges or ranges[name].contains(Version(package.version).public, prereleases=True)
        except InvalidVersion:
            fits = False
        if not fits:
            outside.append(f"{name} {package.version} (tested: {ranges[name]})")
    if not outside:
        listed = ", ".join(f"{name} {package.version}" for name, package in facts.packages.items())
        return Finding(check="versions", status="ok", what=listed)
    return Finding(
        check="versions",
        status="warning",
        what="; ".join(outside),
        meaning="outside of the range that this version was tested with",
        remedy=f"pip install --upgrade {DISTRIBUTION} resolves them together",
    )


def _extras(machine: Machine, facts: MachineFacts) -> Iterator[Finding]:
    for name, module in EXTRAS.items():
        package = facts.packages.get(name)
        if package is None:
            continue
        problem = machine.import_problem(module)
        what = f"{name} {package.version}"
        torch = facts.packages.get("torch")
        if not problem and torch is not None and not _fits(torch.version, package.torch):
            yield Finding(
                check="extras",
                status="warning",
                what=f"{what} is importable, but says that it needs torch{package.torch}; {torch.version} is installed",
                meaning="it was compiled for that torch: a call may end the process, or give other numbers",
                remedy=f"install {name} and torch together, so that pip finds versions that fit",
            )
        elif not problem:
            yield Finding(check="extras", status="ok", what=f"{what} is importable")
        else:
            yield Finding(
                check="extras",
                status="failed",
                what=f"{what} is installed and cannot be imported: {problem}",
                meaning="it was most likely compiled for another torch; a run that asks for it ends at its start",
                remedy=f"install it again for this torch (pip uninstall {name}, then scripts/install_flash_attn.sh or "
                "scripts/install_vllm_cpu.sh where it is one of those), or uninstall it",
            )


def _origins(facts: MachineFacts) -> Iterator[Finding]:
    """Names collide on the index: another `judges` or `rewards` may be what is imported."""
    parents = {folder.parent for folder in facts.own_folders.values() if folder is not None}
    missing = [name for name, folder in facts.own_folders.items() if folder is None]
    listed = ", ".join(f"{name} from {folder}" for name, folder in facts.own_folders.items())
    if missing or len(parents) != 1:
        yield Finding(
            check="origins",
            status="failed",
            what=listed,
            meaning="grpo, rewards and judges belong to one distribution, and here they are not of one place: another "
            "package, or a folder where the command was started, stands before one of them",
            remedy="rename the folder or uninstall the other package, then pip install --force-reinstall "
            f"{DISTRIBUTION}",
        )
    else:
        yield Finding(check="origins", status="ok", what=f"grpo, rewards, judges from {parents.pop()}")
    for name, package in facts.packages.items():
        if package.home is not None and package.folder is not None and not _same_place(package.folder, package.home):
            yield Finding(
                check="origins",
                status="failed",
                what=f"{PACKAGES[name]} would be imported from {package.folder}, but {name} {package.version} lies in "
                f"{package.home}",
                meaning="a file or folder of that name stands before the installed package",
                remedy=f"rename {package.folder}, or start the command elsewhere; look at PYTHONPATH",
            )


def _fits(version: str, specifiers: str) -> bool:
    """Also where there is no telling: a version that is none."""
    try:
        return SpecifierSet(specifiers).contains(Version(version), prereleases=True)
    except (InvalidSpecifier, InvalidVersion):
        return True


def _same_place(folder: Path, home: Path) -> bool:
    return folder == home or home in folder.parents


def _has_code_for(capability: tuple[int, int], archs: tuple[str, ...]) -> bool:
    """Binary code runs on the same major with an equal or higher minor; compute_XY (PTX) on anything later."""
    major, minor = capability
    for arch in archs:
        kind, _, digits = arch.partition("_")
        digits = digits.rstrip("abcdefghijklmnopqrstuvwxyz")
        if not digits.isdigit():
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        if (kind == "sm" and built[0] == major and built[1] <= minor) or (kind == "compute" and built <= capability):
            return True
    return False


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _cuda_or_cpu(cuda: str | None) -> str:
    return "the CPU" if cuda is None else f"CUDA {cuda}"
