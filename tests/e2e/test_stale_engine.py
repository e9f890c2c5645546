"""An engine that its syncs do not reach: the whole run stops at its first sync, before anything is trained on what the
old weights said."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from run_builders import Runs, metrics_of
from vllm_double import VllmDouble
from vllm_server_builders import Bench

from grpo.errors import EngineError
from grpo.preflight import RunParts
from grpo.rollout.base import RolloutEngine
from grpo.runtime.policy import Policy
from grpo.trainer import Trainer


@pytest.fixture
def runs(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    runs = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    runs.prepare()
    return runs


class Stale:
    """An engine whose `load_weights` does nothing: it samples from the weights that it was opened with."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.sample, self.close = engine.sample, engine.close

    def load_weights(self, policy: Policy) -> None:
        pass


class StaleTrainer(Trainer):
    """A trainer with such an engine."""

    @property
    def parts(self) -> RunParts:
        return dataclasses.replace(super().parts, engine=Stale(super().parts.engine))


def written(run_dir: Path) -> set[str]:
    """What a run left; without a step, a completion or a checkpoint it is its recipe and the lock."""
    return {path.name for path in run_dir.rglob("*")}


def test_a_run_whose_engine_takes_no_weights_stops_at_the_first_sync_and_can_be_taken_up_with_another(
    runs: Runs,
) -> None:
    with pytest.raises(EngineError, match=r"Stale does not follow the policy.*the same old weights for the whole run"):
        StaleTrainer(runs.config("run")).run()
    assert written(runs.folder / "run") == {"config.yaml", ".lock"}
    assert [row["step"] for row in metrics_of(runs.run("run", resume=True))] == [1, 2]


def test_the_command_ends_with_1_and_the_canarys_message_where_a_server_keeps_its_weights(runs: Runs) -> None:
    """The server answers every sync as it should, with version and checksum: only what it samples gives it away."""
    with VllmDouble(Bench.of(runs.model_dir).facts) as server:
        server.ignores_weights = True
        engine = {"type": "vllm_server", "urls": [server.url], "sync": "merged"}
        recipe = runs.write_recipe("run", rollout={"group_size": 4, "max_new_tokens": 8, "engine": engine})
        code, _, stderr = runs.command("train", str(recipe))
        assert server.weights["version"] is not None
    assert code == 1
    assert stderr.startswith("error: VllmServerEngine does not follow the policy")
    assert "rollout.engine.sync" in stderr  # what to look at
    assert stderr.count("error: ") == 1
    assert "Traceback" not in stderr
    assert written(runs.folder / "run") == {"config.yaml", ".lock"}
