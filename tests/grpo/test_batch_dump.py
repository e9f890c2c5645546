"""The dump of a batch that was not finite, on a disk that refuses it: told, nothing half there, no step lost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_batch, make_group
from kill_harness.file_faults import FAULTS, failing, operations_of
from kill_harness.file_operations import Operation, watched
from real_disks import disk_of
from run_builders import Runs, tensors_of, what_was_computed

from grpo.batch_dump import dump_batch
from grpo.batching import TrainBatch
from grpo.errors import StorageError
from grpo.update.step import NonFiniteStep

SKIPPED = NonFiniteStep(cause="the loss is not finite", in_a_row=1, micro_batch=0)


def batch() -> TrainBatch:
    return make_batch([make_group([{"a": 1.0}, {"a": 0.0}], seed=1)], budget=64)


def dump(run_dir: Path) -> Path:
    return dump_batch(run_dir, 2, batch(), SKIPPED, rank=0)


def files_in(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "non_finite").glob("*")}


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "a short write, then ENOSPC"])
def test_whichever_file_operation_of_a_dump_fails_is_told_with_path_and_bytes_and_leaves_no_half_file(
    fault: str, tmp_path: Path
) -> None:
    operations = operations_of(lambda: dump(tmp_path / "whole"), tmp_path / "whole")
    whole = files_in(tmp_path / "whole")
    assert sorted(whole) == ["step-2-rank-0.json", "step-2-rank-0.safetensors"]
    assert {one.name for one in operations} >= {"mkdir", "open", "write", "fsync", "replace"}
    told = 0
    for planned in operations:
        if "short" in fault and planned.name != "write":
            continue
        run_dir = tmp_path / f"trial-{planned.number}"
        with failing(run_dir, planned.number, FAULTS[fault]):
            try:
                dump(run_dir)
            except StorageError as exc:
                told += 1
                assert str(run_dir / "non_finite" / "step-2-rank-0") in str(exc), planned  # noqa: PT017
                assert re.search(r"\d+ bytes were to be written", str(exc)), planned  # noqa: PT017
        left = files_in(run_dir)
        assert {name: whole[name] for name in left} == left, planned
        dump(run_dir)
        assert files_in(run_dir) == whole
    assert told >= (1 if "short" in fault else 6)


def test_on_a_real_full_disk_a_dump_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with disk_of("4k", tmp_path / "disk") as disk:
        (disk / "filling").write_bytes(b"0" * 4096)
        with pytest.raises(
            StorageError, match=r"step-2-rank-0\.safetensors cannot be written: .*bytes were to be"
        ) as at:
            dump(disk)
        assert "are free there" in str(at.value)
        assert files_in(disk) == {}


LOSSES = '''
"""Never a number."""


def fragile(inputs):
    from grpo.update.losses import LossOutput

    token_loss = -inputs.advantages[:, None] * inputs.logprobs
    return LossOutput(token_loss=token_loss * float("nan"), metrics={})
'''
CHANGES: dict[str, Any] = {
    "update": {"loss": {"type": "custom", "path": "run_losses:fragile"}, "max_non_finite_steps": 9},
    "checkpoint": {"every": 1},
}


def test_a_run_whose_dump_finds_no_room_ends_with_exit_code_1_and_goes_on_with_the_step_that_it_stopped_in(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(model_dir=tiny_model_dir, folder=tmp_path.resolve(), monkeypatch=monkeypatch, capsys=capsys)
    runs.prepare()
    (tmp_path / "run_losses.py").write_text(LOSSES)
    runs.command("train", str(runs.write_recipe("whole", **CHANGES)))
    whole, run_dir = runs.folder / "whole", runs.folder / "run"
    recipe = runs.write_recipe("run", **CHANGES)

    def full(operation: Operation, call: Any, arguments: tuple[Any, ...]) -> Any:
        is_second = operation.path.name == "step-2-rank-0.safetensors"
        return FAULTS["ENOSPC"](operation, call, arguments) if is_second else call(*arguments)

    with watched(run_dir, full):
        code, _, stderr = runs.command("train", str(recipe))
    assert code == 1
    assert "Traceback" not in stderr
    assert f"error: {run_dir}/non_finite/step-2-rank-0.safetensors cannot be written: " in stderr
    assert re.search(r"\d+ bytes were to be written, \d+ are free there", stderr)
    assert f"Once there is room: grpo train {run_dir} --resume" in stderr
    assert [name for name in files_in(run_dir) if "step-2" in name] == []
    code, _, _ = runs.command("train", str(run_dir), "--resume")
    assert code == 0
    ours, theirs = tensors_of(run_dir), tensors_of(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert what_was_computed(run_dir) == what_was_computed(whole)
    assert files_in(run_dir) == files_in(whole)
