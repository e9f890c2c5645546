"""What a judge has said and what was written down is never bought again: counted by the judge's own server."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kill_harness.file_faults import refuse
from kill_harness.file_operations import Operation, watched
from run_builders import Notebook, Runs, lines_of, metrics_of, tensors_of, what_was_computed, write_rows

from grpo.errors import StorageError
from grpo.phases import Phase
from grpo.trainer import Trainer
from judges.demo_server import serve

ROWS = [
    {
        "id": f"p{n}",
        "prompt": f"Anna and Omar waited. One of them forgot the keys. Who forgot the {n} keys?",
        "reference": "Anna",
        "objectives": ["short"],
    }
    for n in range(8)
]


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    made = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    made.prepare()
    write_rows(tmp_path / "train.jsonl", ROWS)
    return made


def judged(url: str) -> dict[str, Any]:
    price = {"input": 1.0, "output": 2.0}
    endpoint = {"url": url, "model": "demo-judge", "price": price}
    params = {"endpoint": endpoint, "rubric": "fairness", "backoff_s": 0.001}
    return {"short": {"rewards": [{"name": "judged", "params": params}], "beta": {"type": "fixed", "value": 0.05}}}


class Crash(Exception):
    """Stands for a kill."""


def crashed_at(phase: Phase, runs: Runs, name: str, *, resume: bool = False, **changes: Any) -> None:
    def announce(now: Phase) -> None:
        if now == phase:
            raise Crash

    with pytest.raises(Crash):
        Trainer(runs.config(name, **changes), announce=announce).run(resume=resume)


def computed(run_dir: Path) -> dict[str, Any]:
    """Without the nonces, which are drawn anew for every call so that no completion can know one."""
    return json.loads(re.sub(r'[0-9a-f]{16}\\"', r'\\"', json.dumps(what_was_computed(run_dir))))


def judge_figures(run_dir: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name.startswith("judge/")} for row in metrics_of(run_dir)]


def test_verdicts_that_were_received_before_a_kill_are_not_asked_for_again_and_the_figures_say_what_was_bought(
    runs: Runs,
) -> None:
    with serve() as server:
        changes: dict[str, Any] = {"objectives": judged(server.url), "steps": 2}
        whole = runs.run("whole", **changes)
        asked_at_once = server.stats()["verdicts"]
        crashed_at("journal", runs, "run", **changes)
        asked = server.stats()["verdicts"]
        (journal,) = (runs.folder / "run" / "journal").iterdir()
        lines = journal.read_bytes().splitlines(keepends=True)
        verdicts = [number for number, line in enumerate(lines) if b'"kind": "verdict"' in line]
        num_lost = 3
        # as if it had been killed in the middle of judging: the last three replies were on their way
        journal.write_bytes(
            b"".join(
                line
                for number, line in enumerate(lines)
                if number < verdicts[-num_lost] or (number not in verdicts and b'"kind": "scores"' not in line)
            )
        )
        run_dir = runs.run("run", resume=True, **changes)
        assert server.stats()["verdicts"] - asked_at_once == asked_at_once + num_lost
        assert asked > asked_at_once
    assert computed(run_dir) == computed(whole)
    assert judge_figures(run_dir) == judge_figures(whole)


def test_a_step_whose_verdicts_are_all_there_is_finished_without_a_judge(runs: Runs) -> None:
    with serve() as server:
        objectives = judged(server.url)
        whole = runs.run("whole", steps=1, objectives=objectives)
        crashed_at("backward", runs, "run", steps=1, objectives=objectives)
        before = server.stats()["verdicts"]
        run_dir = runs.run("run", resume=True, steps=1, objectives=objectives)
        assert server.stats()["verdicts"] == before
    assert computed(run_dir) == computed(whole)
    assert judge_figures(run_dir) == judge_figures(whole)
    requests = [line["id"] for line in lines_of(run_dir / "judge_audit.jsonl") if "id" in line]
    assert len(requests) == len(set(requests)) > 0  # none twice, none missing
    assert tensors_of(run_dir).keys() == tensors_of(whole).keys()


@pytest.mark.parametrize("has_budget", [True, False])
def test_a_verdict_that_the_audit_has_no_room_for_stops_the_run_and_is_no_missing_score(
    has_budget: bool, runs: Runs
) -> None:
    def fill(operation: Operation, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        act = refuse(errno.ENOSPC) if operation.path.name == "judge_audit.jsonl" else None
        is_written = operation.name in ("open", "write")
        return act(operation, call, arguments) if act and is_written else call(*arguments)

    with serve() as server:
        objectives = judged(server.url)
        if has_budget:  # then each call is written down as it ends, else each judgement
            objectives["short"]["rewards"][0]["params"]["budget"] = {"per_run": 1.0}
        whole = runs.run("whole", steps=1, objectives=objectives)
        with (
            watched(runs.folder.resolve() / "run", fill),
            pytest.raises(StorageError, match=r"run/judge_audit\.jsonl cannot be written: .* \d+ bytes were to be"),
        ):
            runs.run("run", steps=1, objectives=objectives)
        assert not (runs.folder / "run" / "metrics.jsonl").exists()
        run_dir = runs.run("run", resume=True, steps=1, objectives=objectives)
    assert computed(run_dir) == computed(whole)


def test_an_evaluation_whose_result_could_not_be_written_buys_no_verdict_twice(runs: Runs) -> None:
    obstacle = runs.folder / "run" / ".eval.json.new"
    evaluated = {"before": True, "after": False, "num_prompts": 4}
    with serve() as server:
        changes: dict[str, Any] = {"objectives": judged(server.url), "steps": 1, "eval": evaluated}
        whole = runs.run("whole", **changes)
        asked_at_once = server.stats()["verdicts"]
        with pytest.raises(StorageError, match=r"eval\.json cannot be written"):
            runs.run("run", observer=Notebook(at={"evaluating": obstacle.mkdir}), **changes)
        assert server.stats()["verdicts"] - asked_at_once > 0
        obstacle.rmdir()
        run_dir = runs.run("run", resume=True, **changes)
        assert server.stats()["verdicts"] == 2 * asked_at_once
    assert json.loads((run_dir / "eval.json").read_text()) == json.loads((whole / "eval.json").read_text())
    assert list((run_dir / "journal").iterdir()) == []
