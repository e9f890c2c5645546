"""A checkpoint comes back whole or is not taken at all; a save that fails costs nothing that was there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import make_batch, make_group, make_policy, make_updater

from grpo.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from grpo.errors import CheckpointError, StorageError
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
