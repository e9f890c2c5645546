"""Pools that ask one endpoint share what it allows."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from virtual_clock import run_virtually

from judges import ChatRequest, EndpointConfig, JudgeConfig, JudgeOverloaded, JudgePool, JudgeRequest, Scored
from judges.clients.scripted import ScriptedClient, verdict_by
from judges.errors import JudgeDenied
from judges.limits.endpoint import SharedLimits


def make_config(*, endpoint: dict[str, Any] | None = None, **settings: Any) -> JudgeConfig:
    one = EndpointConfig(**{"url": "http://127.0.0.1:9/v1", "model": "m", **(endpoint or {})})
    return JudgeConfig(**{"endpoints": (one,), "rubric": "fairness", "backoff_s": 0.001, **settings})


def make_requests(number: int, *, of: str) -> list[JudgeRequest]:
    return [
        JudgeRequest(id=f"{of}#{i}", question="Who?", completion=f"{of} {i}", reference="Anna", criterion="fairness")
        for i in range(number)
    ]


class Counting:
    """Takes a second a call, and knows how many were made at a time."""

    def __init__(self) -> None:
        self.num_running = self.most_running = 0
        self.client = ScriptedClient(lambda request: verdict_by(request, lambda text: 1.0))

    async def complete(self, request: ChatRequest) -> Any:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        await asyncio.sleep(1.0)
        self.num_running -= 1
        return await self.client.complete(request)

    async def aclose(self) -> None:
        return


def judged_by_two(config: JudgeConfig, other: JudgeConfig | None = None) -> tuple[Counting, float]:
    """Eight texts by each of two pools at a time; the client, and the seconds."""
    client, shared = Counting(), SharedLimits()

    async def main() -> float:
        pools = [JudgePool(client=client, config=one, limits=shared) for one in (config, other or config)]
        started = asyncio.get_running_loop().time()
        found = await asyncio.gather(*(pool.judge(make_requests(8, of=f"{n}")) for n, pool in enumerate(pools)))
        assert all(isinstance(one, Scored) for judgements in found for one in judgements)
        return asyncio.get_running_loop().time() - started

    return client, run_virtually(main())


def test_two_pools_have_no_more_calls_in_flight_than_one() -> None:
    client, seconds = judged_by_two(make_config(concurrency=4))
    assert client.most_running == 4
    assert seconds == pytest.approx(4.0, abs=1e-3)  # 16 calls, 4 at a time


def test_two_pools_together_keep_an_endpoints_rate() -> None:
    # 60 a minute, 5 at once: the last of 16 leaves after 11 s, and takes 1
    _, seconds = judged_by_two(make_config(endpoint={"requests_per_minute": 60.0}))
    assert seconds == pytest.approx(12.0, abs=1e-3)


def test_other_endpoints_and_other_rules_are_not_shared() -> None:
    for other in (make_config(concurrency=4, endpoint={"model": "n"}), make_config(concurrency=3)):
        client, _ = judged_by_two(make_config(concurrency=4), other)
        assert client.most_running > 4


def test_what_one_pool_learns_of_a_key_or_a_limit_the_other_knows() -> None:
    shared, config = SharedLimits(), make_config()
    failures = [JudgeDenied("no such key", status=401), JudgeOverloaded("too many", status=429)]

    async def main(failure: Exception) -> tuple[str, int]:
        first, second = (
            JudgePool(client=ScriptedClient(lambda request: failure), config=config, limits=shared) for _ in range(2)
        )
        await first.judge(make_requests(1, of="a"))
        (judgement,) = await second.judge(make_requests(1, of="b"))
        return "" if isinstance(judgement, Scored) else judgement.kind, second.stats().lanes[0].calls

    assert run_virtually(main(failures[0])) == ("auth", 0)  # nobody asks again with that key
    assert run_virtually(main(failures[1]))[0] == "deadline"  # another loop: the denial above is forgotten


def test_without_sharing_each_pool_has_limits_of_its_own() -> None:
    client = Counting()

    async def main() -> None:
        pools = [JudgePool(client=client, config=make_config(concurrency=4)) for _ in range(2)]
        await asyncio.gather(*(pool.judge(make_requests(8, of=f"{n}")) for n, pool in enumerate(pools)))

    run_virtually(main())
    assert client.most_running == 8
