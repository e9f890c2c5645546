"""The command line and the environment that vLLM's server is started with."""

from __future__ import annotations

import sys

import pytest

from grpo.errors import ConfigError
from grpo.rollout.vllm_facts import SERVER_EXTENSION, is_loopback, server_url
from grpo.rollout.vllm_law import PROCESSOR, PROCESSORS_VARIABLE
from grpo.rollout.vllm_serve import command, environment, main


def option(line: list[str], name: str) -> str:
    assert line.count(name) == 1
    return line[line.index(name) + 1]


def test_the_server_gets_what_a_run_depends_on_and_further_flags_as_they_are() -> None:
    line = command("some/model", ["--dtype", "float32", "--enable-lora"], is_cpu=False)
    assert line[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert option(line, "--model") == "some/model"
    assert option(line, "--worker-extension-cls") == SERVER_EXTENSION
    assert option(line, "--logits-processors") == PROCESSOR
    assert option(line, "--logprobs-mode") == "processed_logprobs"
    assert option(line, "--generation-config") == "vllm"
    assert "--enable-prefix-caching" in line
    assert line[-3:] == ["--dtype", "float32", "--enable-lora"]


def test_it_listens_on_this_machine_alone_unless_told_otherwise() -> None:
    assert option(command("m", [], is_cpu=False), "--host") == "127.0.0.1"
    assert option(command("m", ["--host", "10.0.0.5"], is_cpu=False), "--host") == "10.0.0.5"
    assert not [part for part in command("m", ["--host=10.0.0.5"], is_cpu=False) if part == "--host"]


@pytest.mark.parametrize("flag", ["--logprobs-mode=raw_logprobs", "--logprobs_mode", "--no-enable-prefix-caching"])
def test_a_flag_that_would_break_a_run_is_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match="no other value fits"):
        command("m", [flag], is_cpu=False)


def test_on_a_cpu_prompts_are_computed_whole() -> None:
    assert "--no-enable-chunked-prefill" in command("m", [], is_cpu=True)
    assert "--no-enable-chunked-prefill" not in command("m", [], is_cpu=False)
    assert "--enable-chunked-prefill" in command("m", ["--enable-chunked-prefill"], is_cpu=False)
    with pytest.raises(ConfigError, match="no other value fits"):
        command("m", ["--enable-chunked-prefill"], is_cpu=True)


def test_weight_sync_is_switched_on_and_what_else_is_set_stays() -> None:
    inherited = {"VLLM_SERVER_DEV_MODE": "0", "OMP_WAIT_POLICY": "ACTIVE", PROCESSORS_VARIABLE: "a:B"}
    found = environment(inherited, ["c:D", "a:B"])
    assert found == {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_WAIT_POLICY": "ACTIVE",
        PROCESSORS_VARIABLE: "a:B,c:D",
    }


def test_a_flag_that_is_refused_ends_the_command_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["some/model", "--generation-config", "auto"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err != ""


def test_an_address_is_taken_with_and_without_its_end() -> None:
    for written in ("http://127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1/"):
        assert server_url(written) == "http://127.0.0.1:8000"
    for wrong in ("127.0.0.1:8000", "http://", "http://a:b@host", "http://host/?key=1", "http://host:99999"):
        with pytest.raises(ConfigError, match="must look like"):
            server_url(wrong)


def test_only_this_machine_is_loopback() -> None:
    assert [is_loopback(f"http://{host}:1") for host in ("127.0.0.1", "127.8.8.8", "[::1]", "localhost")] == [True] * 4
    assert not any(is_loopback(f"http://{host}:1") for host in ("10.0.0.1", "localhost.example", "[fe80::1]"))
