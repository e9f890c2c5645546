"""One of two processes is killed, in each phase: the other ends too, and the resumed run is the undisturbed one."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from kill_harness.nursery import AtOperation, Nursery
from rank_runs import check_same, recipe_of

from grpo.checkpoint import list_checkpoints

pytestmark = pytest.mark.long

KILLED = -9


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """SIGKILL to one rank."""

    victim: int
    phase: str
    occurrence: int = 1
    """Of the phase in this process, from 1."""
    operation: int | None = 1
    """Right before this file operation of the victim's; None: from outside, when rank 0 has told the phase, which the
    others do not know."""


@pytest.fixture(scope="module")
def nurseries() -> Iterator[Sequence[Nursery]]:
    """One a rank; they import at the same time."""
    with Nursery() as first, Nursery() as second:
        yield first, second


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Runs of one recipe in two processes."""

    nurseries: Sequence[Nursery]
    folder: Path

    def run(self, name: str, *, kill: Kill | None = None, learn_imports: bool = False) -> list[int]:
        """Begin or resume a run; the exit codes, or minus the signals, of both."""
        run_dir = self.folder / name
        recipe = [str(self.folder / "recipe.yaml"), f"output_dir={json.dumps(str(run_dir))}"]
        arguments = ["train", *([str(run_dir), "--resume"] if run_dir.exists() else recipe)]
        meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        runs, pipes = [], []
        with ExitStack() as at_end:
            for rank, nursery in enumerate(self.nurseries):
                phases = self.folder / f"phases-{rank}"
                if not phases.exists():
                    os.mkfifo(phases)
                pipes.append(os.open(phases, os.O_RDONLY | os.O_NONBLOCK))
                at_end.callback(os.close, pipes[rank])
                at = None
                if kill is not None and kill.victim == rank and kill.operation is not None:
                    at = AtOperation(phase=kill.phase, occurrence=kill.occurrence, operation=kill.operation)
                started = nursery.start(
                    arguments,
                    run_dir=run_dir,
                    output=self.folder / f"output-{rank}",
                    phases=phases,
                    kill=at,
                    learn_imports=learn_imports,
                    environment={"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true", **meeting},
                )
                runs.append(at_end.enter_context(started))
            if kill is not None and kill.operation is None:
                os.set_blocking(pipes[0], True)
                told = b""
                while told.count(f"{kill.phase}\n".encode()) < kill.occurrence and (more := os.read(pipes[0], 4096)):
                    told += more
                runs[kill.victim].kill()
            return [run.wait() for run in runs]

    def said(self, rank: int) -> str:
        return (self.folder / f"output-{rank}").read_text()


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.fixture(scope="module")
def pair(nurseries: Sequence[Nursery], tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """With its undisturbed run, "whole"."""
    folder = tmp_path_factory.mktemp("pair")
    evaluation = {"num_prompts": 3, "every": 2}
    (folder / "recipe.yaml").write_text(
        json.dumps(recipe_of(folder, tiny_model_dir, "whole", steps=3, eval=evaluation))
    )
    made = Pair(nurseries=nurseries, folder=folder)
    assert made.run("whole", learn_imports=True) == [0, 0], made.said(0)
    return made


def check_told(said: str, run_dir: Path, *, rank: int) -> None:
    """What the process that is left says: once, in words, and with the command that goes on."""
    words = " ".join(said.split())
    assert "Traceback" not in said, said
    error = "error: " if rank == 0 else f"error in process {rank}: "
    assert said.count("error: ") + said.count("error in process") == 1, said
    assert f"{error}another process of this run is gone: it has ended or was killed" in words, said
    assert "start all of them again by the same command" in words, said
    if (run_dir / "config.yaml").is_file():
        kept = [f"its last checkpoint is of step {checkpoint.step}" for checkpoint in list_checkpoints(run_dir)]
        what_is_there = kept[-1] if kept else "no checkpoint yet"
        assert f"{run_dir}: {what_is_there}; go on with: grpo train {run_dir} --resume." in words, said
        assert "What was sampled and judged since is in the journal." in words, said
    else:
        assert "No run directory was written here." in words, said


@pytest.mark.parametrize(
    "kills",
    [
        [
            Kill(victim=0, phase="rollout", occurrence=2, operation=2),  # in the second step
            Kill(victim=1, phase="backward"),
            Kill(victim=0, phase="checkpoint_write", operation=2),
            Kill(victim=1, phase="checkpoint_write", operation=None),
            Kill(victim=0, phase="rotation"),
        ],
        pytest.param(
            [
                Kill(victim=1, phase="rollout", occurrence=2, operation=2),
                Kill(victim=0, phase="judging", operation=2),
                Kill(victim=1, phase="journal"),
                Kill(victim=0, phase="backward"),
                Kill(victim=1, phase="optimizer"),
                Kill(victim=1, phase="rename", operation=None),
                Kill(victim=0, phase="rename"),
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["rollout, update, checkpoint", "the other rank, and the phases between"],
)
def test_whichever_of_two_ranks_is_killed_in_whatever_phase_the_resumed_run_is_the_undisturbed_one(
    kills: Sequence[Kill], pair: Pair, request: pytest.FixtureRequest
) -> None:
    """One run, killed and resumed again and again."""
    name = request.node.callspec.id.partition(",")[0].replace(" ", "-")
    for kill in kills:
        codes = pair.run(name, kill=kill)
        other = 1 - kill.victim
        assert codes[kill.victim] == KILLED, kill
        assert codes[other] == 1, (kill, pair.said(other))  # it does not go on alone, nor wait for ever
        check_told(pair.said(other), pair.folder / name, rank=other)
    assert pair.run(name) == [0, 0], pair.said(0)
    resumed, whole = pair.folder / name, pair.folder / "whole"
    check_same(resumed, whole)
    ours, theirs = (
        (list_checkpoints(run)[-1].folder / "policy" / "adapter_model.safetensors").read_bytes()
        for run in (resumed, whole)
    )
    assert ours == theirs
