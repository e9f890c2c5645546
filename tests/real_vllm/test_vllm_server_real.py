"""A real `python -m grpo.rollout.vllm_serve` on the CPU with the 135M model in float32, over HTTP: it samples from the
law that the trainer differentiates, from the weights that were synced last, and a run trains through it.

One server for whole weights, which the last test kills, and one for adapters.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import full_training, make_policy
from real_vllm_builders import (
    END,
    LAWS,
    PARAMS,
    check_every_temperature_and_top_p,
    check_same_as_alone,
    fresh_policy,
    largest_gap,
    sample,
)
from transformers import PreTrainedTokenizerBase

from grpo.cli import main
from grpo.config import VllmServerConfig
from grpo.errors import ConfigError, EngineError
from grpo.metrics import read_metrics
from grpo.prompts import EncodedPrompt
from grpo.rollout.canary import check_engine_follows
from grpo.rollout.vllm_server import VllmServerEngine
from grpo.runtime.distributed import Ranks
from grpo.runtime.policy import Policy

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

READY_WITHIN_S = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """The server's process group, its URL and what it printed."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@contextmanager
def serving(model: Path, log: Path, *flags: str) -> Iterator[RunningServer]:
    """A server of this model with vLLM's further flags, until the end of the block."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    line = [sys.executable, "-m", "grpo.rollout.vllm_serve", str(model), "--port", str(port)]
    line += ["--processor", "vllm_bias:Bias", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", *flags]
    tests = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH", "")])),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "2",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(line, env=environment, stdout=output, stderr=output, start_new_session=True)
    running = RunningServer(process=process, url=f"http://127.0.0.1:{port}", log=log)
    try:
        wait_until_ready(running)
        yield running
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


@pytest.fixture(scope="module")
def server(smollm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(smollm_dir, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def adapter_server(smollm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Another, for vLLM computes otherwise where adapters are enabled."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(smollm_dir, log, "--enable-lora", "--max-lora-rank", "8", "--max-loras", "1") as running:
        yield running


def wait_until_ready(server: RunningServer) -> None:
    end = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{server.log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def adapter_engine(
    adapter_server: RunningServer, policy: Policy, tokenizer: PreTrainedTokenizerBase
) -> Iterator[VllmServerEngine]:
    engine = open_engine(adapter_server, policy, tokenizer, sync="adapter")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def engine(server: RunningServer, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Iterator[VllmServerEngine]:
    engine = open_engine(server, policy, tokenizer)
    yield engine
    engine.close()


def open_engine(
    server: RunningServer, policy: Policy, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> VllmServerEngine:
    config = VllmServerConfig(type="vllm_server", urls=(server.url,), max_connections=32, **options)
    return VllmServerEngine(policy, tokenizer, config, params=PARAMS, ranks=Ranks(use_cpu=True))


# --- the adapter alone


def test_an_adapter_is_replaced_under_its_name_and_every_row_has_it(
    adapter_engine: VllmServerEngine, policy: Policy, prompts: list[EncodedPrompt], smollm_dir: Path
) -> None:
    assert adapter_engine.sync == "adapter"
    assert largest_gap(policy, sample(adapter_engine, prompts, PARAMS)) < 1e-4
    for seed in (7, 8):
        other = fresh_policy(smollm_dir, seed=seed)
        adapter_engine.load_weights(other)
        groups = sample(adapter_engine, prompts, PARAMS, seed=seed)
        assert largest_gap(other, groups) < 1e-4
        assert largest_gap(policy, groups) > 0.05
    adapter_engine.load_weights(policy)


def test_a_prompt_cached_under_the_old_adapter_is_computed_again(
    adapter_engine: VllmServerEngine,
    adapter_server: RunningServer,
    policy: Policy,
    long_prompt: EncodedPrompt,
    smollm_dir: Path,
) -> None:
    hits_before = figure(adapter_server, "vllm:prefix_cache_hits_total")
    sample(adapter_engine, [long_prompt], PARAMS)
    sample(adapter_engine, [long_prompt], PARAMS)
    assert figure(adapter_server, "vllm:prefix_cache_hits_total") > hits_before
    other = fresh_policy(smollm_dir, seed=9)
    adapter_engine.load_weights(other)
    assert largest_gap(other, sample(adapter_engine, [long_prompt], PARAMS)) < 1e-4
    adapter_engine.load_weights(policy)


def test_the_canary_finds_that_an_adapter_follows_the_policy(
    adapter_engine: VllmServerEngine, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    check_engine_follows(adapter_engine, policy, prompts[0], PARAMS)


def test_an_adapter_for_another_base_model_is_refused(
    adapter_server: RunningServer, tokenizer: PreTrainedTokenizerBase, smollm_dir: Path
) -> None:
    """One of the same shape, so that nothing else would tell."""
    other = make_policy(smollm_dir)
    with torch.no_grad():
        next(p for name, p in other.causal_lm.named_parameters() if name.endswith("base_layer.weight")).mul_(1.01)
    with pytest.raises(ConfigError, match=r"does not hold the weights of the recipe's model.*self_attn"):
        open_engine(adapter_server, other, tokenizer, sync="adapter")


# --- whole weights


QUICK_LAW = "all"


@pytest.mark.parametrize(
    "law", [law if law == QUICK_LAW else pytest.param(law, marks=pytest.mark.slow) for law in LAWS]
)
def test_sampler_and_trainer_agree_on_every_token(
    engine: VllmServerEngine,
    policy: Policy,
    prompts_32: list[EncodedPrompt],
    law: str,
    record_property: Callable[[str, object], None],
) -> None:
    assert engine.sync == "merged"  # auto, on a CPU
    found = check_every_temperature_and_top_p(engine, policy, prompts_32[::2], LAWS[law])
    record_property("agreement", found)


@pytest.mark.slow
def test_the_agreement_would_notice_a_law_that_is_not_replayed(
    engine: VllmServerEngine, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    assert largest_gap(policy, sample(engine, prompts, replace(PARAMS, temperature=0.7))) > 0.05
    assert largest_gap(policy, sample(engine, prompts, replace(PARAMS, presence_penalty=0.7))) > 0.05


def test_a_completion_alone_is_that_of_a_batch_of_32(engine: VllmServerEngine, prompts_32: list[EncodedPrompt]) -> None:
    params = replace(PARAMS, presence_penalty=0.3, top_p=0.95)
    together = sample(engine, prompts_32, params, k=1, seed=1)
    for group, prompt in zip(together, prompts_32, strict=True):
        (alone,) = sample(engine, [prompt], params, k=1, seed=1)[0].completions
        assert alone.token_ids == group.completions[0].token_ids
        assert alone.sampler_logprobs == pytest.approx(group.completions[0].sampler_logprobs, abs=1e-4)


def test_prompts_that_do_not_fit_in_one_step_are_sampled_as_alone(
    engine: VllmServerEngine, too_many_prompts: list[EncodedPrompt]
) -> None:
    check_same_as_alone(engine, too_many_prompts)


def test_the_completions_of_a_group_differ(engine: VllmServerEngine, prompts: list[EncodedPrompt]) -> None:
    for group in sample(engine, prompts, PARAMS, k=8):
        assert len({c.token_ids for c in group.completions}) > 1


def test_a_completion_ends_at_the_first_of_the_laws_end_tokens_and_at_no_other(
    engine: VllmServerEngine, prompts: list[EncodedPrompt]
) -> None:
    wants_end = (("vllm_bias:Bias", f'{{"by": 40.0, "token": {END}, "until": 3}}'),)
    (ended,) = sample(engine, prompts[:1], replace(PARAMS, custom=wants_end), k=1)
    assert (ended.completions[0].token_ids, ended.completions[0].finish_reason) == ((END,), "stop")
    (later,) = sample(engine, prompts[:1], replace(PARAMS, custom=wants_end, min_new_tokens=2), k=1)
    assert END not in later.completions[0].token_ids[:2]
    assert later.completions[0].token_ids[2] == END
    (unended,) = sample(engine, prompts[:1], replace(PARAMS, custom=wants_end, end_token_ids=(0,)), k=1)
    assert unended.completions[0].token_ids[:3] == (END, END, END)
    assert (len(unended.completions[0].token_ids), unended.completions[0].finish_reason) == (8, "length")


def test_a_sync_of_all_weights_reaches_the_tied_head(
    engine: VllmServerEngine, policy: Policy, prompts: list[EncodedPrompt], smollm_dir: Path
) -> None:
    other = fresh_policy(smollm_dir, seed=3, trainable=full_training())
    engine.load_weights(other)
    assert largest_gap(other, sample(engine, prompts, PARAMS)) < 1e-4
    engine.load_weights(policy)
    assert largest_gap(policy, sample(engine, prompts, PARAMS)) < 1e-4


def test_a_prompt_cached_under_the_old_weights_is_computed_again(
    engine: VllmServerEngine, server: RunningServer, policy: Policy, long_prompt: EncodedPrompt, smollm_dir: Path
) -> None:
    hits_before = figure(server, "vllm:prefix_cache_hits_total")
    sample(engine, [long_prompt], PARAMS)
    sample(engine, [long_prompt], PARAMS)
    assert figure(server, "vllm:prefix_cache_hits_total") > hits_before
    other = fresh_policy(smollm_dir, seed=3)
    engine.load_weights(other)
    assert largest_gap(other, sample(engine, [long_prompt], PARAMS)) < 1e-4
    engine.load_weights(policy)
    assert largest_gap(policy, sample(engine, [long_prompt], PARAMS)) < 1e-4


def test_a_caller_who_stops_listening_ends_what_the_server_does(
    engine: VllmServerEngine, server: RunningServer, prompts: list[EncodedPrompt]
) -> None:
    # 64 rows, of which 32 at a time are asked for
    groups = engine.sample(prompts, 16, params=replace(PARAMS, max_new_tokens=32), seed=0)
    assert len(next(groups).completions) == 16
    assert requests_running(server) > 0
    groups.close()  # pyright: ignore[reportAttributeAccessIssue]
    end = time.monotonic() + 20
    while (running := requests_running(server)) and time.monotonic() < end:
        time.sleep(0.2)
    assert running == 0
    assert len(sample(engine, prompts[:1], PARAMS)) == 1


def test_a_run_trains_through_the_server(
    server: RunningServer, smollm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {
        "model": str(smollm_dir),
        "steps": 2,
        "output_dir": "run",
        "device": "cpu",
        "dtype": "float32",
        "prompts": {"type": "file", "path": "data.jsonl", "per_step": 2},
        "objectives": {
            "brevity": {
                "rewards": [{"name": "length", "params": {"target_tokens": 4, "limit_tokens": 16}}],
                "beta": {"type": "fixed", "value": 0.05},
            }
        },
        "rollout": {
            "group_size": 4,
            "max_new_tokens": 16,
            "temperature": 0.8,
            "presence_penalty": 0.3,
            "engine": {"type": "vllm_server", "urls": [server.url]},
        },
        "optim": {"learning_rate": 1e-3},
        "trainable": {"type": "lora", "rank": 4},
        "eval": {"before": False, "after": False},
    }
    rows = [{"id": f"row-{n}", "prompt": f"Add {n} and 1."} for n in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "argv", ["grpo", "train", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2]
    # the engine has each step's weights and the trainer's law: the ratio is 1 but for rounding
    assert all(float(step["sampler/ratio_p99"] or 0.0) == pytest.approx(1.0, abs=1e-3) for step in steps)


def test_a_server_that_another_run_has_synced_is_not_sampled_from(
    engine: VllmServerEngine, prompts: list[EncodedPrompt]
) -> None:
    """The run above has."""
    with pytest.raises(EngineError, match=r"another run has synced its own"):
        sample(engine, prompts, PARAMS)


def test_a_server_that_is_killed_while_it_samples_stops_the_run_and_is_named(
    engine: VllmServerEngine, server: RunningServer, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    engine.load_weights(policy)
    threading.Timer(2.0, server.kill).start()
    with pytest.raises(EngineError, match=rf"no vLLM server is left.*{server.url}"):
        sample(engine, prompts, replace(PARAMS, max_new_tokens=400, end_token_ids=(0,)), k=8)


def requests_running(server: RunningServer) -> float:
    return figure(server, "vllm:num_requests_running") + figure(server, "vllm:num_requests_waiting")


def figure(server: RunningServer, name: str) -> float:
    """One of the server's metrics, over all its labels."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    values = [line.rsplit(" ", 1)[1] for line in lines if line.startswith((f"{name}{{", f"{name} "))]
    assert values, f"{name} is no metric of this server"
    return sum(map(float, values))
