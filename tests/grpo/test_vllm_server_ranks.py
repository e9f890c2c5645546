"""Two ranks with one vLLM server: the main one syncs, both sample, and what one meets both are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import encoded
from rank_processes import RankPair
from vllm_double import Exchange, VllmDouble
from vllm_server_builders import PARAMS, Bench

from grpo.config import VllmServerConfig
from grpo.errors import ConfigError, EngineError
from grpo.rollout.canary import check_engine_follows
from grpo.rollout.vllm_server import VllmServerEngine
from grpo.runtime.distributed import Ranks

pytestmark = pytest.mark.slow  # two processes that import torch


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPair]:
    with RankPair(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


@pytest.fixture
def server(tiny_model_dir: Path) -> Iterator[VllmDouble]:
    with VllmDouble(Bench.of(tiny_model_dir).facts) as server:
        yield server


def run(model_dir: Path, url: str, lone_url: str = "") -> Any:
    """The tokens that this rank was given. Args: lone_url: of the second rank's server, where it is another one."""
    ranks, bench = Ranks(use_cpu=True), Bench.of(model_dir)
    config = VllmServerConfig(type="vllm_server", urls=(lone_url if lone_url and ranks.index == 1 else url,))
    engine = VllmServerEngine(bench.policy, bench.tokenizer, config, params=PARAMS, ranks=ranks)
    try:
        check_engine_follows(engine, bench.policy, encoded(1)[0], PARAMS, together=ranks.together)
        own = ranks.own(encoded(4))
        return [group.completions for group in engine.sample(own, 2, params=PARAMS, seed=0)]
    finally:
        engine.close()


def test_the_main_rank_syncs_and_both_sample(two: RankPair, server: VllmDouble, tiny_model_dir: Path) -> None:
    first, second = two.run(run, tiny_model_dir, server.url)
    assert (len(first), len(second)) == (2, 2)
    assert server.paths().count("grpo_load_adapter_file") == 4  # the first, and the canary's three


def test_a_server_that_one_rank_cannot_reach_stops_both(
    two: RankPair, server: VllmDouble, tiny_model_dir: Path
) -> None:
    answers = two.run(run, tiny_model_dir, server.url, "http://127.0.0.1:9")
    assert [type(answer) for answer in answers] == [ConfigError, ConfigError]
    assert all("no vLLM server answers at http://127.0.0.1:9" in str(answer) for answer in answers)


def once_at(count: int, answer: Callable[[Exchange], None]) -> Callable[[Exchange], None]:
    seen = 0

    def replaced(exchange: Exchange) -> None:
        nonlocal seen
        seen += 1
        (answer if seen == count else exchange.server.answer)(exchange)

    return replaced


def test_an_error_of_one_rank_in_the_middle_of_the_canary_stops_both(
    two: RankPair, server: VllmDouble, tiny_model_dir: Path
) -> None:
    # two probes, then 8 rows of each rank after each of the canary's three syncs: one of the second sync's
    server.instead["/v1/completions"] = once_at(2 + 16 + 5, lambda x: x.reply(400, {"error": "not this one"}))
    answers = two.run(run, tiny_model_dir, server.url)
    assert all(isinstance(answer, EngineError) and "not this one" in str(answer) for answer in answers), answers
    server.instead.clear()
    assert [len(groups) for groups in two.run(run, tiny_model_dir, server.url)] == [2, 2]  # the ranks are still in step
