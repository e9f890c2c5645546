"""Saves and restores a run: weights, reference, optimizer, betas, entropy bonus, counts, random generators. Safetensors
and JSON only; no pickle is ever read.

A checkpoint is written by `durable_files.new_folder`: a folder called step-N is whole, and its manifest's hashes say
so. Older ones are deleted when the new one has been read back from the disk and is as its manifest says.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo.durable_files import (
    folder_bytes,
    folder_damage,
    free_bytes,
    new_folder,
    remove_folder,
    remove_leftovers,
    write_atomically,
)
from grpo.errors import CheckpointError, GrpoError, StorageError
from grpo.phases import Announce, silent
from grpo.runtime.optim import load_named_state, named_state
from grpo.runtime.randomness import RandomState, as_tensors, from_tensors
from grpo.update.step import Updater

FORMAT_VERSION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    step: int
    """Optimizer steps taken."""
    folder: Path
    passed_over: tuple[str, ...] = ()
    """Newer ones that are damaged: each one's folder and what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a run is besides its model, optimizer and controllers. Its place in the data is its step: a step's prompts
    are a function of seed and step."""

    next_prompts: tuple[str, ...] = ()
    """Ids of the prompts of the step that comes next; other ids on resume mean other data."""
    skipped_in_a_row: int = 0
    """Steps without an update for want of verdicts, up to this one."""
    stuck_betas: tuple[str, ...] = ()
    """Objectives whose beta a person has been told of."""
    random_states: tuple[RandomState, ...] = ()
    """[R] of each rank's generators."""


def save_checkpoint(
    run_dir: Path,
    updater: Updater,
    *,
    step: int,
    keep: int,
    state: RunState | None = None,
    expected_bytes: int | None = None,
    announce: Announce = silent,
) -> Checkpoint:
    """Write checkpoints/step-N, read it back, then drop all but the newest `keep`.

    Later ones are dropped too: a run that goes on from an earlier step has found them damaged. Only one process may
    save into a run directory.

    Args:
        expected_bytes: what it will take; said where the disk has no room for it.
    Raises:
        StorageError: it could not be written, or is not on the disk what was written; what was there is still there.
    """
    state = state or RunState()
    announce("checkpoint_write")
    parent = run_dir / "checkpoints"
    remove_leftovers(parent)
    final = parent / f"step-{step}"
    with new_folder(
        final,
        format_version=FORMAT_VERSION,
        before_rename=lambda: announce("rename"),
        needed_bytes=expected_bytes,
    ) as folder:
        _write(folder, updater, step, state)
    announce("rotation")
    problem = folder_damage(final, format_version=FORMAT_VERSION)
    if problem is not None:
        raise StorageError(f"{final} was written, but reads back otherwise: {problem}. Look at the disk.")
    found = list_checkpoints(run_dir)
    kept = [checkpoint for checkpoint in found if checkpoint.step <= step][-keep:]
    for dropped in (checkpoint for checkpoint in found if checkpoint not in kept):
        remove_folder(dropped.folder)
    return Checkpoint(step=step, folder=final)


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Folders called step-<digits>, oldest first, damaged ones too: files are checked when one is loaded."""
    folders = [path for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]
    found = [Checkpoint(step=int(path.name.removeprefix("step-")), folder=path) for path in folders if path.is_dir()]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def latest_checkpoint(run_dir: Path) -> Checkpoint:
    """The newest checkpoint whose files are as its manifest says, and what is wrong with newer ones.

    Raises:
        CheckpointError: there is none.
    """
    problems: list[str] = []
    for checkpoint in reversed(list_checkpoints(run_dir)):
        problem = folder_damage(checkpoint.folder, format_version=FORMAT_VERSION)
        if problem is None:
            return Checkpoint(step=checkpoint.step, folder=checkpoint.folder, passed_over=tuple(problems))
        problems.append(f"{checkpoint.folder}: {problem}")
    detail = "; ".join(problems) if problems else "none was written yet"
    raise CheckpointError(f"{run_dir.absolute()} has no usable checkpoint ({detail}). Start the run anew.")


def checkpoint_bytes(updater: Updater, *, vocabulary_size: int, has_anchor: bool) -> int:
    """What a checkpoint will take at most, before there is one: weights, both moments, the reference, the tokenizer.

    Args: has_anchor: a supervised stage leaves a reference of its own.
    """
    trainable = sum(4 * parameter.numel() for parameter in updater.policy.trainable_parameters().values())
    weights = 4 * updater.policy.num_parameters() if updater.policy.trains_all_weights else trainable
    tokenizer = 256 * vocabulary_size  # the longest that we have seen have 130 bytes a token
    return weights + (3 if has_anchor else 2) * trainable + tokenizer + (1 << 18)


def check_room(run_dir: Path, *, checkpoint_bytes: int, count: int, error: type[GrpoError] = StorageError) -> None:
    """Raises `error`, which names the path and the bytes, where the disk has no room for so many more checkpoints."""
    needed, free = checkpoint_bytes * count, free_bytes(run_dir)
    if free < needed:
        raise error(
            f"{run_dir}: the next {count} checkpoint(s) need {needed} bytes ({checkpoint_bytes} each), but {free} "
            "bytes are free there. Make room, set a smaller checkpoint.keep, or take an output_dir on another disk."
        )


def bytes_of(checkpoint: Checkpoint) -> int:
    """What it takes on the disk."""
    return folder_bytes(checkpoint.folder)


def load_checkpoint(checkpoint: Checkpoint, updater: Updater) -> int:
    """Restore all that `save_checkpoint` wrote; returns the number of steps taken. Raises CheckpointError."""
    problem = folder_damage(checkpoint.folder, format_version=FORMAT_VERSION)
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


def read_run_state(checkpoint: Checkpoint) -> RunState:
    """The rest of what `save_checkpoint` wrote, of a checkpoint that was verified."""
    run = json.loads((checkpoint.folder / "state.json").read_bytes())["run"]
    tensors = load_file(checkpoint.folder / "random.safetensors")
    return RunState(
        next_prompts=tuple(run["next_prompts"]),
        skipped_in_a_row=int(run["skipped_in_a_row"]),
        stuck_betas=tuple(run["stuck_betas"]),
        random_states=from_tensors(tensors, run["random"]),
    )


def _write(folder: Path, updater: Updater, step: int, run: RunState) -> None:
    updater.policy.save(folder / "policy")
    remembered = named_state(updater.optimizer)
    tensors = {name: value for name, value in remembered.items() if isinstance(value, Tensor)}
    save_file(tensors, folder / "optimizer.safetensors")
    random_tensors, random_rest = as_tensors(run.random_states)
    save_file(random_tensors, folder / "random.safetensors")
    state = {
        "step": step,
        "betas": {name: controller.state_dict() for name, controller in updater.controllers.items()},
        "entropy_bonus": updater.entropy_bonus.state_dict() if updater.entropy_bonus else None,
        "non_finite_in_a_row": updater.non_finite_in_a_row,
        "micro_batch_tokens": {"recipe": updater.recipe_budget, "now": updater.micro_batch_tokens},
        "optimizer": {name: value for name, value in remembered.items() if name not in tensors},
        "run": {
            "next_prompts": run.next_prompts,
            "skipped_in_a_row": run.skipped_in_a_row,
            "stuck_betas": run.stuck_betas,
            "random": random_rest,
        },
    }
    write_atomically(folder / "state.json", json.dumps(state, indent=1, allow_nan=False).encode())
