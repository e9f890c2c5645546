"""A loss or gradient that is not finite: the step is skipped and dumped, and after some in a row the run stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_builders import Notebook, Runs, metrics_of
from safetensors.torch import load_file

from grpo.batching import MicroBatch
from grpo.checkpoint import list_checkpoints
from grpo.errors import NonFiniteUpdate

LOSSES = '''
"""Goes wrong while the file `poison` exists, in the way that it names."""

from pathlib import Path

from grpo.update.losses import LossInput, LossOutput

HERE = Path(__file__).parent


def fragile(inputs: LossInput) -> LossOutput:
    token_loss = -inputs.advantages[:, None] * inputs.logprobs
    poison = HERE / "poison"
    how = poison.read_text() if poison.exists() else ""
    if how == "value":
        token_loss = token_loss * float("nan")
    if how == "infinite value":
        token_loss = token_loss + float("inf")
    if how == "gradient":  # the square root of 0 is 0, its slope is not finite
        token_loss = token_loss + (inputs.logprobs - inputs.logprobs.detach()).square().sqrt()
    return LossOutput(token_loss=token_loss, metrics={"own": token_loss.detach()})
'''
UPDATE = {"loss": {"type": "custom", "path": "run_losses:fragile"}, "max_non_finite_steps": 2}
OFTEN = {"every": 1, "keep": 9}


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    place = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    place.prepare()
    (tmp_path / "run_losses.py").write_text(LOSSES)
    return place


def weights_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """What the checkpoint holds of the policy and the optimizer."""
    folder = run_dir / "checkpoints" / f"step-{step}"
    files = ("policy/adapter_model.safetensors", "optimizer.safetensors")
    return {f"{file}/{name}": tensor for file in files for name, tensor in load_file(folder / file).items()}


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("value", "the loss of a micro-batch of"),
        ("infinite value", "the loss of a micro-batch of"),
        # the head is no module's call, so the norm before it is the last one
        ("gradient", "first in base_model.model.model.norm (the gradient of its output)"),
    ],
)
def test_a_step_that_is_not_finite_changes_no_parameter_is_dumped_and_told(how: str, cause: str, runs: Runs) -> None:
    poison = runs.folder / "poison"
    told = Notebook(after={1: lambda: poison.write_text(how), 2: poison.unlink})
    run_dir = runs.run("run", steps=3, update=UPDATE, checkpoint=OFTEN, observer=told, optim={"learning_rate": 1e-3})
    rows = metrics_of(run_dir)
    assert [row["update/skipped"] for row in rows] == [0, 1, 0]
    assert rows[1]["grad_norm"] is None
    assert "kl/short" not in rows[1]  # nothing was observed
    text = (run_dir / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    (warning,) = told.warnings
    assert warning.startswith("step 2 was skipped, 1 in a row: ")
    assert cause in warning
    assert warning.endswith("Check: grpo verify RECIPE (numbers)")
    before, after, later = (weights_of(run_dir, step) for step in (1, 2, 3))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []  # the optimizer's too
    assert any(not torch.equal(later[name], after[name]) for name in later)
    states = [json.loads((c.folder / "state.json").read_text()) for c in list_checkpoints(run_dir)]
    assert [state["non_finite_in_a_row"] for state in states] == [0, 1, 0]
    check_dump(run_dir, cause=cause)


def check_dump(run_dir: Path, *, cause: str) -> None:
    """Of step 2: two prompts, four completions of at most eight tokens each."""
    assert {path.name for path in (run_dir / "non_finite").iterdir()} == {
        "step-2-rank-0.safetensors",
        "step-2-rank-0.json",
    }
    told: dict[str, Any] = json.loads((run_dir / "non_finite" / "step-2-rank-0.json").read_text())
    assert (told["step"], told["objectives"], told["weights"]) == (2, ["short", "long"], [1.0, 1.0])
    assert told["micro_batch"] == 0
    assert cause in told["cause"]
    tensors = load_file(run_dir / "non_finite" / "step-2-rank-0.safetensors")
    fields = MicroBatch.__dataclass_fields__.keys() - {"images"}  # none of these prompts shows any
    batch = MicroBatch(**{name: tensors[f"0/{name}"] for name in fields})
    assert tensors.keys() == {f"0/{name}" for name in fields}
    assert batch.completion_mask.shape[0] == 8
    rows = [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]
    own = [row for row in rows if row["step"] == 2]
    assert batch.num_tokens == sum(row["num_tokens"] for row in own)
    assert sorted(batch.advantages.tolist()) == pytest.approx(sorted(row["advantage"] for row in own))


def test_too_many_in_a_row_end_the_command_with_a_checkpoint_from_which_it_goes_on(runs: Runs) -> None:
    poison = runs.folder / "poison"
    poison.write_text("gradient")
    recipe = runs.write_recipe("run", steps=4, update=UPDATE)
    code, _, stderr = runs.command("train", str(recipe))
    run_dir = runs.folder / "run"
    assert code == 1
    assert "error: step 2: 2 steps in a row without a finite gradient (update.max_non_finite_steps = 2)" in stderr
    assert "model.norm (the gradient of its output)" in stderr
    assert "Check: grpo verify RECIPE (numbers)" in stderr
    assert f"Saved after step 2; go on with: grpo train {run_dir} --resume" in stderr
    assert "Traceback" not in stderr
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [2]
    poison.unlink()
    code, _, stderr = runs.command("train", str(run_dir), "--resume")
    assert (code, stderr) == (0, "")
    assert [row["update/skipped"] for row in metrics_of(run_dir)] == [1, 1, 0, 0]
    assert (run_dir / "report.html").is_file()


def test_steps_that_were_skipped_in_a_row_are_counted_over_an_interruption(runs: Runs) -> None:
    (runs.folder / "poison").write_text("value")
    runs.run("run", steps=1, update=UPDATE)
    with pytest.raises(NonFiniteUpdate, match="step 2: 2 steps in a row"):
        runs.run("run", resume=True, steps=4, update=UPDATE)


def test_a_failure_in_the_second_iteration_leaves_what_the_first_one_learned(runs: Runs) -> None:
    losses = LOSSES.replace(
        "poison.read_text() if poison.exists()",  # as soon as the policy has moved away from where it sampled
        "'value' if bool((inputs.logprobs != inputs.old_logprobs)[inputs.mask].any())",
    )
    (runs.folder / "run_losses.py").write_text(losses)
    run_dir = runs.run("run", steps=1, update={**UPDATE, "iterations": 2})
    (row,) = metrics_of(run_dir)
    assert (row["update/skipped"], row["grad_norm"]) == (1, None)
    steps = {float(value) for name, value in weights_of(run_dir, 1).items() if name.endswith("/step")}
    assert steps == {1.0}
