"""The row signal with a real judge over HTTP on loopback: one that stands by its verdicts, and one that does not."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from verify_subjects import make_config, scored_groups

from grpo.diagnostics.checks.signal import check_signal
from grpo.diagnostics.checks.subject import make_subject
from grpo.diagnostics.findings import Finding
from grpo.diagnostics.verify import without_traces
from grpo.preflight import open_run
from grpo.types import RolloutGroup
from judges.demo_server import DemoServer, DemoSettings
from judges.prompts import read_fences


class Judge(DemoServer):
    """Scores a completion by its hash; one that is moody says the opposite whenever it is asked again."""

    def __init__(self, *, is_moody: bool) -> None:
        super().__init__(port=0, settings=DemoSettings())
        self.is_moody = is_moody
        self.asked: Counter[str] = Counter()

    def answer(self, prompt: str) -> tuple[int, dict[str, Any]]:
        try:
            nonce, texts = read_fences(prompt)
        except ValueError as exc:  # the question whether anybody is there
            return 400, {"error": {"message": str(exc)}}
        self.asked[texts["completion"]] += 1
        score = hashlib.sha256(texts["completion"].encode()).digest()[0] / 255
        if self.is_moody and self.asked[texts["completion"]] > 1:
            score = 1 - score
        verdict = json.dumps({"nonce": nonce, "reason": "", "score": score})
        return 200, {"choices": [{"message": {"role": "assistant", "content": verdict}, "finish_reason": "stop"}]}


@contextmanager
def judging(*, is_moody: bool) -> Iterator[Judge]:
    with Judge(is_moody=is_moody) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def with_texts(rollout: RolloutGroup) -> RolloutGroup:
    texts = (f"It was {name}." for name in ("Anna", "Omar", "nobody", "both of them"))
    completions = tuple(replace(one, text=text) for one, text in zip(rollout.completions, texts, strict=True))
    return replace(rollout, completions=completions)


def steadiness(server: Judge, model_dir: Path, folder: Path) -> Finding:
    """What `grpo verify` makes of four completions that it has judged twice; the recipe has a cache."""
    endpoint = {"url": server.url, "model": "moody"}
    params = {"endpoint": endpoint, "rubric": "fairness", "cache": "verdicts.sqlite"}
    judged = {"rewards": [{"name": "judged", "params": params}], "beta": {"type": "fixed", "value": 0.05}}
    prompts = {"type": "tasks", "names": ["fairness"], "per_step": 2}
    config = without_traces(make_config(model_dir, folder, objectives={"fairness": judged}, prompts=prompts))
    with closing(open_run(config)) as parts:
        parts.scorer.begin_step(1)
        rollout = with_texts(scored_groups(["fairness"])[0].rollout)
        subject = make_subject(config, parts, [parts.scorer.submit(rollout).result()])
        _, finding = check_signal(subject)
    return finding


@pytest.mark.parametrize(
    ("is_moody", "status", "told"),
    [(False, "ok", "4 of 4 scores the same"), (True, "warning", "0 of 4 scores the same")],
)
def test_a_judge_is_asked_twice_over_http_and_one_that_changes_its_mind_is_a_warning(
    is_moody: bool, status: str, told: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    with judging(is_moody=is_moody) as server:
        finding = steadiness(server, tiny_model_dir, tmp_path)
    assert sorted(server.asked.values())[-4:] == [2] * 4  # whatever a cache would have answered
    assert finding.status == status
    assert finding.what.startswith(f"fairness: scored twice, {told}")
    assert finding.figures["agreement"] == (0.0 if is_moody else 1.0)
    assert ("advantages are chance" in finding.meaning) == is_moody
    assert not (tmp_path / "verdicts.sqlite").exists()
