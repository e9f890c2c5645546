"""A checkpoint comes back whole or is not taken at all; a save that fails costs nothing that was there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import make_batch, make_group, make_policy, make_updater

from grpo.checkpoint import (
    RunState,
    bytes_of,
    check_room,
    checkpoint_bytes,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_run_state,
    save_checkpoint,
)
from grpo.config import FullTrainable, LoraTrainable, TrainableConfig
from grpo.durable_files import free_bytes
from grpo.errors import CheckpointError, ConfigError, StorageError
from grpo.phases import Phase
from grpo.runtime.models import load_model, load_tokenizer
from grpo.runtime.policy import Policy
from grpo.runtime.randomness import random_state
from grpo.update.beta import BandBeta
from grpo.update.step import Updater


def make_band_updater(model_dir: Path) -> Updater:
    updater = make_updater(make_policy(model_dir))
    updater.controllers["a"] = BandBeta(initial=0.05, low=0.01, high=0.1)
    return updater


def train(updater: Updater, steps: int = 1) -> None:
    for seed in range(steps):
        group = make_group([{"a": 1.0}, {"a": 0.0}], seed=seed)
        batch = make_batch([group], budget=64)
        updater.step(batch)


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path) -> Updater:
    """After one step. Only to be saved."""
    updater = make_band_updater(tiny_model_dir)
    train(updater)
    return updater


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- what comes back


def test_weights_optimizer_and_betas_come_back_and_the_next_step_is_the_same_bit_for_bit(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    first, second = make_band_updater(tiny_model_dir), make_band_updater(tiny_model_dir)
    train(first, 2)
    saved_beta = first.controllers["a"].state_dict()
    checkpoint = save_checkpoint(tmp_path, first, step=2, keep=2)
    assert load_checkpoint(checkpoint, second) == 2
    assert second.controllers["a"].state_dict() == saved_beta
    assert saved_beta != BandBeta(initial=0.05, low=0.01, high=0.1).state_dict()  # it has moved
    for updater in (first, second):
        train(updater)
    ours, theirs = first.policy.trainable_parameters(), second.policy.trainable_parameters()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    states = [updater.optimizer.state_dict()["state"] for updater in (first, second)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        assert [name for name in state if not torch.equal(state[name], states[1][index][name])] == []
    assert first.controllers["a"].state_dict() == second.controllers["a"].state_dict()


def test_a_checkpoint_holds_no_pickle(trained: Updater, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, trained, step=1, keep=2).folder
    assert {Path(name).suffix for name in files_of(folder)} <= {".safetensors", ".json", ".md"}
    heads = {path: path.read_bytes()[:2] for path in folder.rglob("*") if path.is_file()}
    assert [path for path, head in heads.items() if head in {b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"}] == []


def test_a_checkpoint_of_other_objectives_is_refused(trained: Updater, tiny_model_dir: Path, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, trained, step=1, keep=2)
    other = make_updater(make_policy(tiny_model_dir), objectives=("b",))
    with pytest.raises(CheckpointError, match=r"controllers for \['a'\], but the recipe has objectives \['b'\]"):
        load_checkpoint(checkpoint, other)


# --- damage


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink], ids=["bit flip", "missing file"])
def test_damage_of_any_file_falls_back_to_the_checkpoint_before(
    damage: Callable[[Path], None], trained: Updater, tmp_path: Path
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / "whole", trained, step=step, keep=2)
    files = files_of(tmp_path / "whole" / "checkpoints" / "step-2")
    assert {"manifest.json", "state.json", "optimizer.safetensors", "policy/adapter_model.safetensors"} <= set(files)
    for number, name in enumerate(files):
        run_dir = Path(shutil.copytree(tmp_path / "whole", tmp_path / str(number)))
        damage(run_dir / "checkpoints" / "step-2" / name)
        assert latest_checkpoint(run_dir).step == 1, name


def test_where_all_are_damaged_each_ones_damage_is_told_and_loading_one_is_refused(
    trained: Updater, tmp_path: Path
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, trained, step=step, keep=2)
    first, second = list_checkpoints(tmp_path)
    flip_a_bit(first.folder / "optimizer.safetensors")
    (second.folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        latest_checkpoint(tmp_path)
    assert f"{first.folder}: optimizer.safetensors is damaged" in str(caught.value)
    assert f"{second.folder}: its manifest cannot be read" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is damaged"):
        load_checkpoint(first, trained)


# --- saving


def test_the_newest_keep_checkpoints_stay(trained: Updater, tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):  # by number: "step-11" < "step-9" as text
        save_checkpoint(tmp_path, trained, step=step, keep=2)
    assert names(tmp_path) == ["step-10", "step-11"]


def test_a_damaged_later_checkpoint_never_pushes_out_the_one_that_was_just_saved(
    trained: Updater, tmp_path: Path
) -> None:
    for step in (5, 10):
        save_checkpoint(tmp_path, trained, step=step, keep=2)
    (tmp_path / "checkpoints" / "step-10" / "state.json").unlink()
    save_checkpoint(tmp_path, trained, step=6, keep=1)
    assert names(tmp_path) == ["step-6"]
    assert latest_checkpoint(tmp_path).step == 6


def test_a_save_that_fails_midway_leaves_the_one_before_and_nothing_else(
    trained: Updater, tiny_model_dir: Path, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, trained, step=1, keep=1)
    broken = make_band_updater(tiny_model_dir)

    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_text("written")
        raise OSError(28, "No space left on device")

    broken.policy.save = save
    with pytest.raises(StorageError, match="No space left") as caught:
        save_checkpoint(tmp_path, broken, step=2, keep=1)
    assert str(tmp_path / "checkpoints" / "step-2") in str(caught.value)
    assert names(tmp_path) == ["step-1"]
    assert latest_checkpoint(tmp_path).step == 1


def test_what_a_killed_process_left_half_written_is_removed_at_the_next_save(trained: Updater, tmp_path: Path) -> None:
    orphan = tmp_path / "checkpoints" / f".step-3-{'0' * 32}" / "policy"
    orphan.mkdir(parents=True)
    (orphan / "adapter_model.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, trained, step=4, keep=2)
    assert names(tmp_path) == ["step-4"]


def test_only_step_and_digits_is_a_checkpoint_and_other_folders_stay(trained: Updater, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, trained, step=4, keep=1)
    for name in ("step-4-copy", "step-", "step-best", "best"):
        shutil.copytree(tmp_path / "checkpoints" / "step-4", tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / "step-9").write_text("a file")
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [4]
    save_checkpoint(tmp_path, trained, step=5, keep=1)
    assert names(tmp_path) == ["best", "step-", "step-4-copy", "step-5", "step-9", "step-best"]


# --- reading back, and room


def test_older_checkpoints_stay_where_the_new_one_does_not_read_back(trained: Updater, tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, trained, step=step, keep=2)

    def spoil(phase: Phase) -> None:
        if phase == "rotation":  # the new one has its name
            flip_a_bit(tmp_path / "checkpoints" / "step-3" / "state.json")

    with pytest.raises(StorageError, match=r"step-3 was written, but reads back otherwise: state\.json is damaged"):
        save_checkpoint(tmp_path, trained, step=3, keep=1, announce=spoil)
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]
    found = latest_checkpoint(tmp_path)
    assert found.step == 2
    assert [problem.partition(": ")[0] for problem in found.passed_over] == [str(tmp_path / "checkpoints" / "step-3")]


def test_phases_of_a_save_are_told_in_their_order_and_each_finds_the_disk_as_it_says(
    trained: Updater, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, trained, step=1, keep=1)
    seen: list[tuple[Phase, list[str]]] = []

    def look(phase: Phase) -> None:
        seen.append((phase, [re.sub("-[0-9a-f]{32}$", "", name) for name in names(tmp_path)]))

    save_checkpoint(tmp_path, trained, step=2, keep=1, announce=look)
    assert seen == [
        ("checkpoint_write", ["step-1"]),
        ("rename", [".step-2", "step-1"]),
        ("rotation", ["step-1", "step-2"]),
    ]
    assert names(tmp_path) == ["step-2"]


def test_the_state_of_a_run_comes_back(trained: Updater, tmp_path: Path) -> None:
    state = RunState(
        next_prompts=("p1", "p7"),
        skipped_in_a_row=2,
        stuck_betas=("a",),
        random_states=(random_state(), random_state()),
    )
    found = read_run_state(save_checkpoint(tmp_path, trained, step=1, keep=1, state=state))
    assert (found.next_prompts, found.skipped_in_a_row, found.stuck_betas) == (("p1", "p7"), 2, ("a",))
    for ours, theirs in zip(found.random_states, state.random_states, strict=True):
        assert (ours.python, ours.numpy, ours.numpy_place) == (theirs.python, theirs.numpy, theirs.numpy_place)
        assert torch.equal(ours.torch, theirs.torch)


@pytest.mark.parametrize("trainable", [LoraTrainable(rank=2), FullTrainable(type="full")], ids=["lora", "full"])
@pytest.mark.parametrize("has_anchor", [False, True])
def test_the_room_that_is_asked_for_is_enough_and_not_much_more(
    trainable: TrainableConfig, has_anchor: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir), base_dir=tmp_path)
    model = load_model(str(tiny_model_dir), dtype=torch.float32, base_dir=tmp_path, attention="sdpa")
    policy = Policy(model, trainable, seed=0, tokenizer=tokenizer)
    if has_anchor:
        policy.take_as_reference()
    updater = make_updater(policy)
    train(updater)
    expected = checkpoint_bytes(updater, vocabulary_size=len(tokenizer), has_anchor=has_anchor)
    taken = bytes_of(save_checkpoint(tmp_path, updater, step=1, keep=1))
    assert taken <= expected <= taken + (1 << 19)


def test_no_room_is_said_with_the_path_and_the_bytes(tmp_path: Path) -> None:
    free = free_bytes(tmp_path)
    check_room(tmp_path, checkpoint_bytes=1, count=2)
    with pytest.raises(ConfigError, match=rf"{tmp_path}: the next 2 checkpoint\(s\) need {4 * free} bytes"):
        check_room(tmp_path, checkpoint_bytes=2 * free, count=2, error=ConfigError)
