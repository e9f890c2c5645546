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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import full_training, make_batch, make_policy, make_prompt
from transformers import PreTrainedTokenizerBase

from grpo.cli import main
from grpo.config import VllmServerConfig
from grpo.errors import ConfigError, EngineError
from grpo.metrics import read_metrics
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import SamplingParams
from grpo.rollout.canary import check_engine_follows
from grpo.rollout.vllm_server import VllmServerEngine
from grpo.runtime.distributed import Ranks
from grpo.runtime.models import load_tokenizer
from grpo.runtime.policy import Policy
from grpo.types import RolloutGroup, ScoredGroup, Verdict
from grpo.update.forward import policy_pass

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

END = 2
PARAMS = SamplingParams(end_token_ids=(END,), max_new_tokens=8)
TEXTS = [
    "The capital of France is",
    "Count: 1 2 3 4 1 2 3 4 1 2",
    "Once upon a time there was a little",
    "List: apples, pears,",
]
BLOCK = 128
"""Tokens that vLLM's prefix cache keeps together on a CPU: shorter prompts are never cached."""
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
def tokenizer(smollm_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(smollm_dir), base_dir=smollm_dir)


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[EncodedPrompt]:
    return [
        EncodedPrompt(prompt=make_prompt(f"q{number}"), token_ids=tuple(tokenizer.encode(text)))
        for number, text in enumerate(TEXTS)
    ]


@pytest.fixture(scope="module")
def long_prompt(tokenizer: PreTrainedTokenizerBase) -> EncodedPrompt:
    """One token longer than a block, so that the block is served from the cache."""
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 12)
    return EncodedPrompt(prompt=make_prompt("long"), token_ids=tuple(ids[: BLOCK + 1]))


@pytest.fixture(scope="module")
def policy(smollm_dir: Path) -> Policy:
    return disturbed(make_policy(smollm_dir), seed=1)


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
    config = VllmServerConfig(type="vllm_server", urls=(server.url,), max_connections=16, **options)
    return VllmServerEngine(policy, tokenizer, config, params=PARAMS, ranks=Ranks(use_cpu=True))


def disturbed(policy: Policy, *, seed: int) -> Policy:
    """With noise on its trainable part, so that its log-probabilities are its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_A" not in name:
                scale = 0.02 if "lora_B" in name else 0.02 * float(parameter.std(correction=0))
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return policy


def sample(
    engine: VllmServerEngine, prompts: Sequence[EncodedPrompt], params: SamplingParams, *, k: int = 4, seed: int = 0
) -> list[RolloutGroup]:
    groups = {group.prompt.id: group for group in engine.sample(prompts, k, params=params, seed=seed)}
    return [groups[prompt.prompt.id] for prompt in prompts]


def gaps(policy: Policy, groups: Sequence[RolloutGroup], params: SamplingParams) -> list[float]:
    """|sampler - trainer| of every token, the trainer's as the update computes them."""
    scored = [
        ScoredGroup(
            rollout=group,
            verdicts=tuple({"a": Verdict(value=float(k), parts={})} for k in range(len(group.completions))),
        )
        for group in groups
    ]
    (micro,) = make_batch(scored, budget=100_000, max_new_tokens=params.max_new_tokens).micro_batches
    with torch.no_grad():
        logprobs = policy_pass(policy, micro, params).logprobs
    trainer = {}
    for row, place in enumerate(micro.prompt_of_row.tolist()):
        prompt, length = int(micro.prompt_mask[place].sum()), int(micro.completion_mask[row].sum())
        ids = (*micro.prompt_ids[place, :prompt].tolist(), *micro.completion_ids[row, :length].tolist())
        trainer[ids] = logprobs[row, :length].tolist()
    return [
        abs(ours - theirs)
        for group in groups
        for completion in group.completions
        for ours, theirs in zip(
            trainer[(*group.prompt_token_ids, *completion.token_ids)], completion.sampler_logprobs, strict=True
        )
    ]


# --- the adapter alone


def test_an_adapter_is_replaced_under_its_name_and_every_row_has_it(
    adapter_engine: VllmServerEngine, policy: Policy, prompts: list[EncodedPrompt], smollm_dir: Path
) -> None:
    assert adapter_engine.sync == "adapter"
    assert max(gaps(policy, sample(adapter_engine, prompts, PARAMS), PARAMS)) < 1e-4
    other = make_policy(smollm_dir)
    for seed in (7, 8):
        adapter_engine.load_weights(disturbed(other, seed=seed))
        groups = sample(adapter_engine, prompts, PARAMS, seed=seed)
        assert max(gaps(other, groups, PARAMS)) < 1e-4
        assert max(gaps(policy, groups, PARAMS)) > 0.05
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


LAWS: dict[str, dict[str, Any]] = {
    "no processor": {},
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2, "min_new_tokens": 4},
    "bans, and one's own": {
        "banned": ((28,), (216, 33)),
        "no_repeat_ngram": 2,
        "custom": (("vllm_bias:Bias", '{"by": 4.0, "token": 29}'),),
    },
}


@pytest.mark.parametrize(
    "law",
    ["penalties", *(pytest.param(law, marks=pytest.mark.slow) for law in ("no processor", "bans, and one's own"))],
)
def test_sampler_and_trainer_agree_on_every_token(
    engine: VllmServerEngine, policy: Policy, prompts: list[EncodedPrompt], law: str
) -> None:
    assert engine.sync == "merged"  # auto, on a CPU
    num_compared = num_apart = 0
    for temperature, top_p in ((0.7, 1.0), (1.0, 0.9), (1.3, 0.9)):
        params = replace(PARAMS, temperature=temperature, top_p=top_p, **LAWS[law])
        found = gaps(policy, sample(engine, prompts, params), params)
        if top_p == 1:
            assert max(found) < 1e-4, (temperature, max(found))
        # beside the edge of top-p rounding decides whether a token counts: see the in-process engine's tests
        num_compared, num_apart = num_compared + len(found), num_apart + sum(gap > 1e-4 for gap in found)
    assert num_compared > 200
    assert num_apart <= 0.005 * num_compared


@pytest.mark.slow
def test_the_agreement_would_notice_a_law_that_is_not_replayed(
    engine: VllmServerEngine, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    assert max(gaps(policy, sample(engine, prompts, replace(PARAMS, temperature=0.7)), PARAMS)) > 0.05
    assert max(gaps(policy, sample(engine, prompts, replace(PARAMS, presence_penalty=0.7)), PARAMS)) > 0.05


def test_a_completion_does_not_depend_on_its_batch(engine: VllmServerEngine, prompts: list[EncodedPrompt]) -> None:
    params = replace(PARAMS, presence_penalty=0.3, top_p=0.95)
    together = sample(engine, prompts, params, k=8)  # 32 rows, 16 at a time
    alone = [sample(engine, [prompt], params, k=8)[0] for prompt in prompts]
    for group, other in zip(together, alone, strict=True):
        assert [c.token_ids for c in group.completions] == [c.token_ids for c in other.completions]
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


def test_a_prompt_cached_under_the_old_weights_is_computed_again(
    engine: VllmServerEngine, policy: Policy, long_prompt: EncodedPrompt, smollm_dir: Path
) -> None:
    sample(engine, [long_prompt], PARAMS)
    other = disturbed(make_policy(smollm_dir, trainable=full_training()), seed=3)  # its tied head too
    engine.load_weights(other)
    assert max(gaps(other, sample(engine, [long_prompt], PARAMS), PARAMS)) < 1e-4
    engine.load_weights(policy)
    assert max(gaps(policy, sample(engine, [long_prompt], PARAMS), PARAMS)) < 1e-4


def test_a_caller_who_stops_listening_ends_what_the_server_does(
    engine: VllmServerEngine, server: RunningServer, prompts: list[EncodedPrompt]
) -> None:
    # 32 rows, of which 16 at a time are asked for
    groups = engine.sample(prompts, 8, params=replace(PARAMS, max_new_tokens=32), seed=0)
    assert len(next(groups).completions) == 8
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
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    waiting_or_running = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(waiting_or_running))
