"""vLLM servers and settings that cannot serve a run are bad input, found before its first step; and the key."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import encoded
from run_builders import Runs
from vllm_double import Exchange, VllmDouble
from vllm_server_builders import Answer, Bench, Open, changed, make_config, sample, says, told

from grpo.config import VllmServerConfig
from grpo.errors import ConfigError, EngineError
from grpo.rollout.vllm_server import check_servers

KEY = "sk-a-secret-key-of-ours"


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


def no_rpc(exchange: Exchange) -> None:
    exchange.reply(404, {"detail": "Not Found"})


Spoil = Callable[[VllmDouble], None]


def fact(**changes: Any) -> Spoil:
    return lambda server: server.facts.update(changes)


def instead(path: str, answer: Answer) -> Spoil:
    return lambda server: server.instead.update({path: answer})


def old(server: VllmDouble) -> None:
    server.vllm_version = "0.17.3"


def without_model(server: VllmDouble) -> None:
    server.facts["shape"] = server.facts["shape"] | {"vocab_size": 49152}


def keyed(server: VllmDouble) -> None:
    server.key = "another key altogether"


REFUSED: dict[str, tuple[Spoil, dict[str, Any], str]] = {
    "nobody there": (VllmDouble.kill, {}, "no vLLM server answers at .*vllm_serve"),
    "no vLLM": (instead("/version", no_rpc), {}, "is no vLLM server .*404"),
    "another service": (instead("/version", says(200, {"version": [1]})), {}, "is no vLLM server"),
    "no version": (instead("/version", says(200, {"version": "latest"})), {}, "is no vLLM server"),
    "elsewhere": (instead("/version", lambda x: x.reply(307, b"", Location="http://a/")), {}, "answered 307"),
    "too old": (old, {}, r"runs vLLM 0\.17\.3, but 0\.18 or newer"),
    "plain vllm serve": (instead("grpo_facts", no_rpc), {}, "cannot take weights"),
    "without our worker": (instead("grpo_facts", says(500, {"error": "no attribute"})), {}, "cannot take weights"),
    "an older version of ours": (instead("grpo_facts", says(200, {"results": [{"a": 1}]})), {}, "not started by this"),
    "another key": (keyed, {}, "does not take our key .*rollout.engine.api_key"),
    "another model": (without_model, {}, "serves another model.*vocab_size 49152 where the recipe's has"),
    "another dtype": (fact(dtype="bfloat16"), {}, "computes in bfloat16, the trainer in float32"),
    "raw log-probabilities": (fact(logprobs_mode="raw_logprobs"), {}, "answers raw_logprobs.*vllm_serve"),
    "no processors": (fact(logits_processors=[]), {}, "vllm_serve"),
    "no room for a completion": (fact(max_model_len=12), {}, "room for 12 tokens.*max_new_tokens"),
    "no room for a prompt": (fact(max_model_len=30), {"longest_prompt": 19}, "prompt of 19 tokens .* 30 tokens"),
    "no LoRA": (fact(max_lora_rank=None), {"sync": "adapter"}, "sync is adapter, but .*--max-lora-rank"),
    "a small LoRA": (fact(max_lora_rank=2), {"sync": "adapter"}, "no room for one of rank 4"),
    "shards": (fact(num_shards=2), {"sync": "adapter"}, "split over"),
    "no base": (fact(has_base_weights=False), {"sync": "adapter"}, "base model's weights"),
    "a law that it does not take": (
        instead("/v1/completions", says(400, {"error": "'mine:Own' is not among those"})),
        {},
        "cannot sample as the recipe asks.*mine:Own.*--processor",
    ),
    "no token ids": (instead("/v1/completions", changed(token_ids=None)), {}, "without token ids.*vllm_serve"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_server_that_does_not_fit_is_bad_input(server: VllmDouble, open_engine: Open, case: str) -> None:
    spoil, options, words = REFUSED[case]
    spoil(server)
    with pytest.raises(ConfigError, match=words):
        open_engine(server, **options)
    assert "vllm-server-engine" not in {thread.name for thread in threading.enumerate()}


def test_one_of_two_servers_that_does_not_fit_is_named(pair: tuple[VllmDouble, VllmDouble], open_engine: Open) -> None:
    _, unfit = pair
    unfit.facts["dtype"] = "float16"
    with pytest.raises(ConfigError, match=f"{unfit.url} computes in float16"):
        open_engine(*pair)


def test_an_adapter_for_another_base_model_is_refused(server: VllmDouble, open_engine: Open) -> None:
    server.instead["grpo_check_base_file"] = says(500, {"error": "the engine's o_proj is not what was sent"})
    with pytest.raises(ConfigError, match=r"does not hold the weights of the recipe's model.*o_proj"):
        open_engine(server, sync="adapter")
    server.instead["grpo_check_base_file"] = says(200, {"results": ["0"]})
    with pytest.raises(ConfigError, match="could not compare its base model"):
        open_engine(server, sync="adapter")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"urls": ("127.0.0.1:8000",)}, "must look like"),
        ({"urls": ("ftp://127.0.0.1:1",)}, "must look like"),
        ({"urls": ("http://user:pw@127.0.0.1:1",)}, "must look like"),
        ({"urls": ("http://10.0.0.5:8000",), "transfer_dir": Path("/")}, "another machine, and no https"),
        ({"urls": ("https://gpu.example:8000",)}, "transfer_dir"),
        ({"transfer_dir": Path("/nowhere/at/all")}, "no folder that can be written to"),
        ({"api_key": "env:GRPO_TEST_NO_SUCH_KEY"}, "GRPO_TEST_NO_SUCH_KEY, which is not set"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anyone_is_asked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_servers(
            VllmServerConfig(**{"type": "vllm_server", "urls": ("http://127.0.0.1:9",), **options}), max_new_tokens=4
        )


def test_servers_are_checked_before_a_model_is_read(server: VllmDouble) -> None:
    check_servers(make_config(server), max_new_tokens=255)
    with pytest.raises(ConfigError, match="room for 256 tokens"):
        check_servers(make_config(server), max_new_tokens=256)
    assert server.rows() == []


# --- the key


def test_the_key_goes_over_and_into_no_error(
    server: VllmDouble, open_engine: Open, monkeypatch: pytest.MonkeyPatch, bench: Bench
) -> None:
    monkeypatch.setenv("GRPO_TEST_KEY", KEY)
    server.key = KEY
    engine = open_engine(server, api_key="env:GRPO_TEST_KEY")
    assert {asked.headers["authorization"] for asked in server.asked} == {f"Bearer {KEY}"}
    assert len(sample(engine, encoded(1))) == 1
    echoes: list[Answer] = [
        says(500, {"seen": KEY}),
        says(400, {"seen": KEY}),
        says(200, KEY.encode()),
        says(200, {"choices": [{"token_ids": [KEY]}]}),
        changed(finish_reason=KEY),
    ]
    for echo in echoes:
        server.instead["/v1/completions"] = echo
        with pytest.raises(EngineError) as caught:
            sample(engine, encoded(1))
        assert KEY not in told(caught.value)
        assert "[key]" in told(caught.value)
        engine.load_weights(bench.policy)
    server.instead = {"grpo_load_weights_file": says(200, {"results": [{KEY: KEY}]})}
    with pytest.raises(EngineError) as caught:
        engine.load_weights(bench.policy)
    assert KEY not in told(caught.value)
    server.instead = {"grpo_facts": says(200, {"results": [{KEY: KEY}]})}
    with pytest.raises(ConfigError) as refused:
        open_engine(server, api_key="env:GRPO_TEST_KEY")
    assert KEY not in told(refused.value)


def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(
    server: VllmDouble, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_TEST_KEY", "two words\n")
    with pytest.raises(ConfigError, match="GRPO_TEST_KEY") as refused:
        open_engine(server, api_key="env:GRPO_TEST_KEY")
    assert "two words" not in told(refused.value)


def test_the_command_ends_with_2_and_writes_nothing_where_a_server_does_not_fit(
    server: VllmDouble,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = Runs(model_dir=tiny_model_dir, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    runs.prepare()
    rollout = {"group_size": 4, "max_new_tokens": 8, "engine": {"type": "vllm_server", "urls": [server.url]}}
    server.facts["max_model_len"] = 20  # shorter than the recipe's prompts, which the policy's own context holds
    runs.check_refused(["a prompt of", "20 tokens that the servers have room for"], rollout=rollout)
    server.kill()
    runs.check_refused([f"no vLLM server answers at {server.url}"], rollout=rollout)
