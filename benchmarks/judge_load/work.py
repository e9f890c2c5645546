"""Judgements to measure with: what is asked, of whom, and what came of it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from judge_load.schedule import LimitHistory
from judge_load.server import MODEL, identity_of, latency_s, score_of

from judges import (
    ChatReply,
    ChatRequest,
    EndpointConfig,
    JudgeConfig,
    Judgement,
    JudgePool,
    JudgeRequest,
    Scored,
    ScriptedClient,
)
from judges.clients.base import JudgeClient
from judges.clients.openai_chat import OpenAIChatClient
from judges.clients.scripted import verdict_by
from judges.lane import LaneStats
from judges.prompts import read_fences

SLOTS = 64
SEED = 0
SCENE = (
    "Anna, Omar and Lea stood at the station early on a Monday. Anna bought a ticket to the coast, Omar bought a "
    "newspaper, and Lea waited for her sister, who was late once more. Who bought a ticket? Answer in one sentence."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How many judgements, and how long each takes."""

    judgements: int = 2000
    low_s: float = 0.05
    high_s: float = 0.4

    def requests(self) -> list[JudgeRequest]:
        """Every one about another text of some 250 characters."""
        return [
            JudgeRequest(
                id=f"p#{number}",
                question=SCENE,
                completion=f"Answer {number}: " + "it was Anna who bought the ticket, as the text says at once. " * 4,
                reference="Anna",
                criterion="fairness",
            )
            for number in range(self.judgements)
        ]

    def latencies_s(self) -> list[float]:
        """[N] of each request, in order."""
        return [latency_s(SEED, identity(one), low_s=self.low_s, high_s=self.high_s) for one in self.requests()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One batch through a pool."""

    wall_s: float
    cpu_s: float
    """Of this process."""
    judgements: list[Judgement]
    lane: LaneStats
    limits: LimitHistory
    """On a clock that begins with the batch."""

    @property
    def num_scored(self) -> int:
        """Judgements with a verdict."""
        return sum(isinstance(judgement, Scored) for judgement in self.judgements)


def identity(request: JudgeRequest) -> str:
    """As the server knows a request."""
    return identity_of({"question": request.question, "completion": request.completion})


def make_config(url: str = "http://127.0.0.1:9/v1", *, is_adaptive: bool = False, **settings: Any) -> JudgeConfig:
    """One endpoint; 64 calls at a time, or as many as it finds out, up to 64."""
    endpoint = EndpointConfig(url=url, model=MODEL)
    limit: dict[str, Any] = {} if is_adaptive else {"concurrency": SLOTS}
    return JudgeConfig(endpoints=(endpoint,), rubric="fairness", **limit, **settings)


async def judged(client: JudgeClient, config: JudgeConfig, requests: Sequence[JudgeRequest]) -> Run:
    """Judge one batch with a pool of its own, and close the client."""
    pool = JudgePool(client=client, config=config)
    clock = asyncio.get_running_loop().time
    started_s, started, cpu = clock(), time.perf_counter(), time.process_time()
    try:
        judgements = await pool.judge(requests)
    finally:
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        await client.aclose()
    (lane,) = pool.stats().lanes
    limits = [(at - started_s, limit) for at, limit in lane.limit_history]
    return Run(wall_s=wall_s, cpu_s=cpu_s, judgements=judgements, lane=lane, limits=limits)


def scripted_client(load: Load) -> ScriptedClient:
    """A judge in this process that thinks as long as the server does."""

    def thinking_s(request: ChatRequest) -> float:
        fences = read_fences(request.messages[-1].content)[1]
        return latency_s(SEED, identity_of(fences), low_s=load.low_s, high_s=load.high_s)

    return ScriptedClient(lambda request: verdict_by(request, lambda text: 1.0), latency_s=thinking_s)


class InstantClient:
    """Answers at the event loop's next turn, at next to no cost: what is left is the pool's."""

    async def complete(self, request: ChatRequest) -> ChatReply:
        """A good verdict."""
        await asyncio.sleep(0)
        nonce = request.messages[-1].content.partition("<<<question ")[2][:16]
        return ChatReply(text=f'{{"nonce": "{nonce}", "reason": "", "score": 1.0}}', finish_reason="stop")

    async def aclose(self) -> None:
        """Nothing is held."""


def http_client(config: JudgeConfig) -> OpenAIChatClient:
    """For the config's one endpoint."""
    return OpenAIChatClient(config.endpoints[0], timeout_s=config.timeout_s)


@contextmanager
def serving(load: Load, *, fault_rate: float = 0.0, slots: int = 0) -> Iterator[str]:
    """The measured judge in a process of its own; its URL."""
    command = [sys.executable, str(Path(__file__).with_name("server.py")), "--seed", str(SEED)]
    command += ["--low-s", str(load.low_s), "--high-s", str(load.high_s)]
    command += ["--fault-rate", str(fault_rate), "--slots", str(slots)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError("the measured judge did not start")
        try:
            yield url
        finally:
            process.terminate()


def read_log(url: str) -> dict[str, list[str]]:
    """Request -> how each of its calls ended, as the server saw it."""
    with urllib.request.urlopen(f"{url}/log") as answer:
        return json.load(answer)


def audited(requests: Sequence[JudgeRequest], run: Run, log: dict[str, list[str]]) -> dict[str, Any]:
    """The judgements against what the server knows it has said."""
    fake = lost = duplicated = failed = 0
    for request, judgement in zip(requests, run.judgements, strict=True):
        calls = log.get(identity(request), [])
        was_told = "verdict" in calls
        if isinstance(judgement, Scored):
            fake += not was_told or judgement.value != score_of(SEED, identity(request))
        else:
            lost += was_told
            failed += not was_told
        duplicated += len(calls) - 1 - calls.index("verdict") if was_told else 0
    ends = Counter(end for calls in log.values() for end in calls)
    return {
        "judgements": len(run.judgements),
        "scored": run.num_scored,
        "fake": fake,
        "lost": lost + len(requests) - len(run.judgements),
        "failed_all_tries": failed,
        "duplicated": duplicated,
        "calls": sum(ends.values()),
        "faults": {name: count for name, count in sorted(ends.items()) if name != "verdict"},
    }
