"""Ctrl-C and SIGTERM while judges are asked: a step is finished, or left at once, and no verdict is paid twice."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from run_builders import ROWS, Runs, lines_of, tensors_of, write_rows

from grpo.checkpoint import list_checkpoints
from grpo.recipe_loader import parse_recipe
from grpo.trainer import Trainer
from judges.prompts import read_fences

pytestmark = pytest.mark.faults

CONCURRENCY = 2
STEPS = 3
PER_STEP = 2 * 4
"""Prompts times completions: calls of a step, since no two completions of this model are alike."""
AT_ONCE_S = 10.0
"""Far below the 60 s for which the judge holds its tongue; far above what the processes of a busy machine need."""


class Judge(ThreadingHTTPServer):
    """Scores a text by its hash, and counts the verdicts that it has delivered."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.num_asked = 0
        self.delivered: Counter[str] = Counter()
        self.at: dict[int, Callable[[], object]] = {}
        """The number of a call, from 1 -> what to do before it is answered."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Judge  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self._send({"data": [{"id": "counted"}]})

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        with self.server.lock:
            self.server.num_asked += 1
            do = self.server.at.get(self.server.num_asked, list)
        do()
        nonce, fences = read_fences(prompt)
        what = f"{fences['question']}\n{fences['completion']}"
        score = hashlib.sha256(what.encode("utf-8", "surrogatepass")).digest()[0] / 255
        verdict = json.dumps({"nonce": nonce, "reason": "", "score": score})
        self._send({"choices": [{"message": {"content": verdict}, "finish_reason": "stop"}]})
        with self.server.lock:
            self.server.delivered[what] += 1

    def _send(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def judging() -> Iterator[Judge]:
    server = Judge()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def recipe_of(server: Judge) -> dict[str, Any]:
    """A recipe whose only reward is the judge."""
    params = {"endpoint": {"url": server.url, "model": "counted"}, "rubric": "fairness", "concurrency": CONCURRENCY}
    params |= {"timeout_s": 120.0, "deadline_s": 120.0, "on_completion_fault": {"penalise": 0.0}}
    objective = {"rewards": [{"name": "judged", "params": params}], "beta": {"type": "fixed", "value": 0.05}}
    return {"steps": STEPS, "objectives": {"short": objective, "long": objective}}


def train(runs: Runs, server: Judge) -> int:
    """`grpo train` until something ends it; the exit code."""
    return runs.command("train", str(runs.write_recipe("ended", **recipe_of(server))))[0]


def resume(runs: Runs) -> None:
    assert runs.command("train", str(runs.folder / "ended"), "--resume")[0] == 0


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    built = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    built.prepare()
    return built


@pytest.fixture(scope="module")
def whole(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Counter[str]]]:
    """An uninterrupted run, and what its judge was paid for."""
    folder = tmp_path_factory.mktemp("whole")
    write_rows(folder / "train.jsonl", ROWS)
    with judging() as server, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "path", list(sys.path))
        runs = Runs(model_dir=tiny_model_dir, folder=folder, monkeypatch=monkeypatch, capsys=None)  # pyright: ignore[reportArgumentType]
        recipe = runs.recipe("whole", **recipe_of(server))
        yield Trainer(parse_recipe(recipe, base_dir=folder, source="recipe.yaml")).run().run_dir, server.delivered


def send(*signals: signal.Signals) -> Callable[[], None]:
    def do() -> None:
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    return do


def check_same_run(ours: Path, whole: Path) -> None:
    mine, theirs = tensors_of(ours), tensors_of(whole)
    assert [name for name in theirs if not mine[name].equal(theirs[name])] == []
    scored = [
        [
            (line["completion"], line["advantage"], {name: one["value"] for name, one in line["verdicts"].items()})
            for line in lines_of(run_dir / "completions.jsonl")
        ]
        for run_dir in (ours, whole)
    ]
    assert scored[0] == scored[1]


def test_a_sigterm_in_a_judged_batch_lets_the_step_be_judged_and_saved_and_nothing_is_paid_twice(
    runs: Runs, whole: tuple[Path, Counter[str]]
) -> None:
    with judging() as server:
        server.at[PER_STEP + 3] = send(signal.SIGTERM)  # the third call of step 2
        assert train(runs, server) == 130
        assert [checkpoint.step for checkpoint in list_checkpoints(runs.folder / "ended")][-1] == 2
        assert sum(server.delivered.values()) == 2 * PER_STEP
        resume(runs)
        assert server.delivered == whole[1]
    check_same_run(runs.folder / "ended", whole[0])


def test_a_second_ctrl_c_leaves_a_judged_batch_at_once_and_only_calls_in_flight_are_made_again(
    runs: Runs, whole: tuple[Path, Counter[str]]
) -> None:
    left = threading.Event()
    signalled_at: list[float] = []

    def hang() -> None:
        left.wait(60.0)

    def signal_twice() -> None:
        signalled_at.append(time.monotonic())
        send(signal.SIGINT, signal.SIGINT)()
        hang()

    with judging() as server:
        first_hung = PER_STEP + 4
        server.at = {first_hung: signal_twice, **{first_hung + n: hang for n in range(1, 2 * CONCURRENCY)}}
        code = train(runs, server)
        took_s = time.monotonic() - signalled_at[0]
        left.set()  # whoever hung up has left nobody to answer to
        assert (code, took_s < AT_ONCE_S) == (130, True)
        num_asked = server.num_asked
        server.at = {}
        resume(runs)
        num_in_flight = num_asked - PER_STEP - 3  # of step 2, three were answered before
        assert 1 <= num_in_flight <= 2 * CONCURRENCY
        # every verdict that was had is used; only what was in flight is asked for again
        assert server.num_asked == STEPS * PER_STEP + num_in_flight
    check_same_run(runs.folder / "ended", whole[0])
