"""Saves and restores a run: weights, reference, optimizer, betas, entropy bonus, counts. Safetensors and JSON only;
no pickle is ever read.

A checkpoint is written into a temporary folder, every file synced, the manifest last, and then renamed: a folder
called step-N is whole, and its manifest's hashes say so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo.errors import CheckpointError
from grpo.runtime.optim import load_named_state, named_state
from grpo.update.step import Updater

FORMAT_VERSION = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    step: int
    """Optimizer steps taken."""
    folder: Path


def save_checkpoint(run_dir: Path, updater: Updater, *, step: int, keep: int) -> Checkpoint:
    """Write checkpoints/step-N atomically, then drop all but the newest `keep`.

    Later ones are dropped too: a run that goes on from an earlier step has found them damaged. Only one process may
    save into a run directory.
    """
    parent = run_dir / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    for orphan in parent.glob(".step-*"):  # of processes that were killed while they saved
        shutil.rmtree(orphan)
    temporary = parent / f".step-{step}-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        updater.policy.save(temporary / "policy")
        remembered = named_state(updater.optimizer)
        tensors = {name: value for name, value in remembered.items() if isinstance(value, Tensor)}
        save_file(tensors, temporary / "optimizer.safetensors")
        state = {
            "step": step,
            "betas": {name: controller.state_dict() for name, controller in updater.controllers.items()},
            "entropy_bonus": updater.entropy_bonus.state_dict() if updater.entropy_bonus else None,
            "non_finite_in_a_row": updater.non_finite_in_a_row,
            "micro_batch_tokens": {"recipe": updater.recipe_budget, "now": updater.micro_batch_tokens},
            "optimizer": {name: value for name, value in remembered.items() if name not in tensors},
        }
        (temporary / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False))
        _write_manifest(temporary)
        final = parent / f"step-{step}"
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    found = list_checkpoints(run_dir)
    kept = [checkpoint for checkpoint in found if checkpoint.step <= step][-keep:]
    for dropped in (checkpoint for checkpoint in found if checkpoint not in kept):
        shutil.rmtree(dropped.folder)
    return Checkpoint(step=step, folder=final)


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Folders called step-<digits>, oldest first, damaged ones too: files are checked when one is loaded."""
    folders = [path for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]
    found = [Checkpoint(step=int(path.name.removeprefix("step-")), folder=path) for path in folders if path.is_dir()]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def latest_checkpoint(run_dir: Path) -> Checkpoint:
    """The newest checkpoint whose files are as its manifest says.

    Raises:
        CheckpointError: there is none.
    """
    found = list_checkpoints(run_dir)
    problems: list[str] = []
    for checkpoint in reversed(found):
        problem = _damage(checkpoint.folder)
        if problem is None:
            return checkpoint
        problems.append(f"{checkpoint.folder}: {problem}")
    detail = "; ".join(problems) if problems else "none was written yet"
    raise CheckpointError(f"{run_dir.absolute()} has no usable checkpoint ({detail}). Start the run anew.")


def load_checkpoint(checkpoint: Checkpoint, updater: Updater) -> int:
    """Restore all that `save_checkpoint` wrote; returns the number of steps taken. Raises CheckpointError."""
    problem = _damage(checkpoint.folder)
    if problem is not None:
        raise CheckpointError(f"{checkpoint.folder}: {problem}")
    state = json.loads((checkpoint.folder / "state.json").read_text())
    if set(state["betas"]) != set(updater.controllers):
        raise CheckpointError(
            f"{checkpoint.folder} has controllers for {sorted(state['betas'])}, but the recipe has objectives "
            f"{sorted(updater.controllers)}. Resume with the recipe that the run was started with."
        )
    updater.policy.load(checkpoint.folder / "policy")
    try:
        tensors = load_file(checkpoint.folder / "optimizer.safetensors")
        load_named_state(updater.optimizer, {**tensors, **state["optimizer"]})
    except KeyError as exc:
        raise CheckpointError(
            f"{checkpoint.folder} holds optimizer state for {exc}, a parameter that this recipe does not train. Resume "
            "with the recipe that the run was started with."
        ) from exc
    for name, controller in updater.controllers.items():
        controller.load_state_dict(state["betas"][name])
    if updater.entropy_bonus is not None:
        updater.entropy_bonus.load_state_dict(state["entropy_bonus"])
    updater.non_finite_in_a_row = int(state["non_finite_in_a_row"])
    found = state.get("micro_batch_tokens", {})
    if found.get("recipe") == updater.recipe_budget:  # else the recipe was changed since memory was found to be short
        updater.micro_batch_tokens = int(found["now"])
    return int(state["step"])


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    entries = {str(path.relative_to(folder)): {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT_VERSION, "files": entries}, indent=1))
    _sync(manifest)
    for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync(inner)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT_VERSION:
            return f"its format is {manifest['format']}, this version reads {FORMAT_VERSION}"
        entries = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        return f"its manifest cannot be read ({exc})"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            return f"{name} is damaged: its hash is not the manifest's"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
