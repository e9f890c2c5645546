"""vLLM servers that break, lie, hang or change under a run: the run goes on rightly, or stops and says why."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import encoded
from vllm_double import Exchange, VllmDouble
from vllm_server_builders import PARAMS, Answer, Bench, Open, changed, make_config, sample, says

from grpo.errors import ConfigError, EngineError
from grpo.rollout.vllm_fleet import Fleet
from grpo.rollout.vllm_http import ServerClient
from grpo.rollout.vllm_loop import LoopThread


@pytest.fixture(scope="module")
def bench(tiny_model_dir: Path) -> Bench:
    return Bench.of(tiny_model_dir)


@pytest.fixture
def server(bench: Bench) -> Iterator[VllmDouble]:
    with VllmDouble(bench.facts) as server:
        yield server


@pytest.fixture
def pair(bench: Bench) -> Iterator[tuple[VllmDouble, VllmDouble]]:
    with VllmDouble(bench.facts, delay_s=0.01) as one, VllmDouble(bench.facts, delay_s=0.01) as other:
        yield one, other


@pytest.fixture
def open_engine(bench: Bench) -> Iterator[Open]:
    with bench.engines() as build:
        yield build


# --- syncs


def wrong_checksum(exchange: Exchange) -> None:
    version = exchange.asked.body["kwargs"]["version"]
    exchange.reply(200, {"results": [{"version": version, "checksum": "00", "num_checked": 3}]})


def wrong_on_one_worker(exchange: Exchange) -> None:
    usual = exchange.server._rpc("grpo_load_weights_file", exchange.asked.body["kwargs"])
    exchange.reply(200, {"results": [usual, usual | {"version": 1}]})


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("grpo_load_weights_file", wrong_checksum, "not the policy's"),
        ("grpo_load_weights_file", wrong_on_one_worker, "not the policy's"),
        ("grpo_load_weights_file", says(500, {"error": "no space left"}), "no space left"),
        ("grpo_load_weights_file", says(200, {"results": []}), "no results of its workers"),
        ("grpo_load_weights_file", says(200, {"results": ["fine"]}), "weight sync with fine"),
        ("/reset_prefix_cache", says(200, {"success": False}), "kept its prefix cache"),
        ("grpo_weight_version", says(200, {"results": ["1"]}), "holds weights of version"),
    ],
)
def test_a_sync_that_is_not_taken_whole_stops_the_run_and_nothing_is_sampled_after_it(
    server: VllmDouble, open_engine: Open, bench: Bench, path: str, answer: Answer, words: str
) -> None:
    engine = open_engine(server)
    server.instead[path] = answer
    with pytest.raises(EngineError, match=words):
        engine.load_weights(bench.policy)
    assert not server.is_paused  # others may use it
    server.instead.clear()
    with pytest.raises(EngineError, match="last weight sync failed"):
        sample(engine, encoded(1))
    engine.load_weights(bench.policy)
    assert len(sample(engine, encoded(1))) == 1


@pytest.mark.parametrize(
    ("path", "waited_for"),
    [("/pause", "pause"), ("grpo_load_weights_file", "take the weights"), ("/resume", "resume")],
)
def test_a_sync_that_is_late_names_the_server_and_what_it_waited_for(
    server: VllmDouble, open_engine: Open, bench: Bench, path: str, waited_for: str
) -> None:
    engine = open_engine(server, sync_timeout_s=0.3)
    server.instead[path] = lambda exchange: exchange.wait(30.0) and None
    with pytest.raises(EngineError, match=rf"sync_timeout_s = 0\.3 s; it waited for {server.url} to {waited_for}"):
        engine.load_weights(bench.policy)


def test_weights_that_cannot_be_written_stop_the_run_and_name_the_folder(
    server: VllmDouble, open_engine: Open, bench: Bench, tmp_path: Path
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    engine = open_engine(server, transfer_dir=folder)
    folder.rmdir()
    with pytest.raises(EngineError, match=r"could not be written to .*shared.*transfer_dir"):
        engine.load_weights(bench.policy)


# --- servers that change under the run


def test_a_server_that_another_run_has_synced_is_not_sampled_from(server: VllmDouble, open_engine: Open) -> None:
    engine = open_engine(server)
    open_engine(server)
    with pytest.raises(EngineError, match="another run has synced its own"):
        sample(engine, encoded(1))


def test_a_server_started_anew_while_it_is_sampled_from_is_found(server: VllmDouble, open_engine: Open) -> None:
    engine = open_engine(server)
    groups = engine.sample(encoded(2), 2, params=PARAMS, seed=0)
    next(groups)
    server.weights = {"version": None, "checksum": ""}
    with pytest.raises(EngineError, match=r"holds weights of version \[None\]"):
        list(groups)


def test_the_rows_of_a_killed_server_are_sampled_by_another(
    pair: tuple[VllmDouble, VllmDouble], open_engine: Open, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_engine(*pair)
    prompts = encoded(6)
    expected = sample(engine, prompts)
    dying, _ = pair
    dying.delay_s = 30.0
    threading.Timer(0.1, dying.kill).start()
    with caplog.at_level(logging.WARNING):
        assert sample(engine, prompts) == expected
    assert f"{dying.url} is left out until the next weight sync" in caplog.text
    engine.load_weights(bench.policy)  # it is still away
    assert len(sample(engine, prompts)) == 6
    dying.start_anew()
    dying.delay_s = 0.01
    engine.load_weights(bench.policy)
    assert f"{dying.url} is back" in caplog.text
    dying.asked.clear()
    assert sample(engine, prompts) == expected
    assert dying.rows()


def test_the_last_server_that_dies_stops_the_run_and_is_named(server: VllmDouble, open_engine: Open) -> None:
    engine = open_engine(server)
    server.delay_s = 30.0
    threading.Timer(0.1, server.kill).start()
    with pytest.raises(EngineError, match=rf"no vLLM server is left to sample from: {server.url}"):
        sample(engine, encoded(2))


def test_a_connection_that_breaks_once_is_made_again(server: VllmDouble, open_engine: Open) -> None:
    engine = open_engine(server)
    expected = sample(engine, encoded(1))
    seen: set[int] = set()

    def once(exchange: Exchange) -> None:
        seed = exchange.asked.body["seed"]
        (exchange.usual if seed in seen else exchange.half)()
        seen.add(seed)

    server.instead["/v1/completions"] = once
    assert sample(engine, encoded(1)) == expected


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Exchange.half, "broke the connection"),
        (Exchange.reset, "broke the connection"),
        (says(500, {"error": "EngineDeadError"}), "answered 500: .*EngineDeadError"),
        (says(400, {"error": "too long"}), "answered 400: .*too long"),
        (says(200, b"<html>"), "answered no JSON: <html>"),
        (says(200, {"choices": []}), "without token ids"),
        (says(200, [1]), "without token ids"),
        (changed(token_ids=None), "without token ids"),
        (changed(logprobs=None), "without token ids"),
        (changed(logprobs={"token_logprobs": [None]}), "without token ids"),
        (changed(logprobs={"token_logprobs": [-1.0]}), "no log-probabilities"),
        (changed(logprobs=lambda good: {"token_logprobs": [-9999.0 for _ in good["token_logprobs"]]}), "no log-prob"),
        (changed(logprobs=lambda good: {"token_logprobs": [0.5 for _ in good["token_logprobs"]]}), "no log-prob"),
        (changed(prompt_token_ids=[1]), "another prompt"),
        (changed(finish_reason="abort"), "gave up a completion after .* tokens: abort"),
        (changed(token_ids=[5], logprobs={"token_logprobs": [-1.0]}, finish_reason="length"), "gave up .* after 1 tok"),
    ],
)
def test_what_is_not_a_whole_completion_stops_the_run(
    server: VllmDouble, open_engine: Open, answer: Answer, words: str
) -> None:
    engine = open_engine(server)
    server.instead["/v1/completions"] = answer
    with pytest.raises(EngineError, match=words):
        sample(engine, encoded(1))
    server.instead.clear()
    engine.close()
    engine.close()


def test_a_completion_that_takes_too_long_stops_the_run(server: VllmDouble, open_engine: Open) -> None:
    engine = open_engine(server, request_timeout_s=0.2)
    server.delay_s = 30.0
    with pytest.raises(EngineError, match=rf"{server.url}/v1/completions did not answer within 0\.2 s"):
        sample(engine, encoded(1))


def test_an_endless_answer_is_cut_off(server: VllmDouble) -> None:
    loop, config = LoopThread(), make_config(server)
    fleet = Fleet(config, ServerClient(config, max_reply_bytes=1000))
    server.instead["/version"] = says(200, b" " * 1001)
    try:
        with pytest.raises(ConfigError, match="answered more than 1000 bytes"):
            loop.run(fleet.ask_facts())
    finally:
        loop.run(fleet.aclose())
        loop.close()


def test_closing_ends_the_thread_and_a_closed_engine_samples_nothing(server: VllmDouble, open_engine: Open) -> None:
    threads = threading.active_count()
    engine = open_engine(server)
    engine.close()
    assert "vllm-server-engine" not in {thread.name for thread in threading.enumerate()}, threads
    with pytest.raises(EngineError):
        sample(engine, encoded(1))
