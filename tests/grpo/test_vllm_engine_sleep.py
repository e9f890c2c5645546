"""vLLM in process sleeps while the policy learns, where the platform can, and is awake whenever it is used."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import END, encoded
from transformers import AutoTokenizer
from vllm_package import LlmDouble, put_in_place

from grpo.config import LoraTrainable, VllmEngineConfig
from grpo.errors import EngineError
from grpo.rollout.base import SamplingParams
from grpo.rollout.canary import check_engine_follows
from grpo.rollout.vllm_engine import VllmEngine
from grpo.runtime.models import load_model
from grpo.runtime.policy import Policy

PARAMS = SamplingParams(end_token_ids=(END,), max_new_tokens=3)


class OnGpu(Policy):
    """A policy that says that it is on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """An engine, its policy, and the vLLM behind it."""

    engine: VllmEngine
    policy: Policy
    llm: LlmDouble

    def sample(self, count: int = 2) -> int:
        """How many groups came."""
        return len(list(self.engine.sample(encoded(count), 2, params=PARAMS, seed=0)))

    def sync(self) -> None:
        self.engine.load_weights(self.policy)

    def since(self, do: Callable[[], object]) -> list[str]:
        """What was done to vLLM in the meantime."""
        before = len(self.llm.done)
        do()
        return self.llm.done[before:]


Open = Callable[..., Bench]


@pytest.fixture
def bench(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """`bench(kind of policy, **rollout.engine)`."""
    llms = put_in_place(tmp_path / "site", monkeypatch)

    def build(kind: type[Policy] = OnGpu, **options: Any) -> Bench:
        model = load_model(str(tiny_model_dir), dtype=torch.float32, base_dir=tiny_model_dir)
        policy = kind(model, LoraTrainable(rank=4, alpha=8), seed=0)
        config = VllmEngineConfig(**{"type": "vllm", "sync": "merged", **options})
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        engine = VllmEngine(policy, tokenizer, config, model=tiny_model_dir, params=PARAMS)
        return Bench(engine=engine, policy=policy, llm=llms.built[-1])

    return build


def test_it_sleeps_once_all_is_sampled_and_wakes_for_the_sync_before_the_next_step(bench: Open) -> None:
    on_gpu = bench()
    assert on_gpu.llm.options["enable_sleep_mode"] is True
    assert on_gpu.llm.done == ["sync"]  # the first weights; awake
    for _ in range(2):
        assert on_gpu.since(on_gpu.sample) == ["add", "step", "sleep"]
        assert on_gpu.llm.is_asleep  # the update is now
        assert on_gpu.since(on_gpu.sync) == ["wake", "sync"]
    assert not on_gpu.llm.is_asleep


def test_it_wakes_to_sample_again_from_the_same_weights(bench: Open) -> None:
    on_gpu = bench()
    assert on_gpu.sample() == 2
    assert on_gpu.since(on_gpu.sample) == ["wake", "add", "step", "sleep"]


def test_it_sleeps_too_when_the_caller_stops_listening(bench: Open) -> None:
    on_gpu = bench()

    def half() -> None:
        groups = on_gpu.engine.sample(encoded(3), 2, params=PARAMS, seed=0)
        next(groups)
        groups.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator

    assert on_gpu.since(half) == ["add", "step", "abort", "sleep"]
    assert on_gpu.sample() == 2


def test_every_sync_and_every_sample_of_the_canary_finds_it_awake(bench: Open) -> None:
    on_gpu = bench()
    with pytest.raises(EngineError, match="does not follow the policy"):  # the double's tokens are always the same
        check_engine_follows(on_gpu.engine, on_gpu.policy, encoded(1)[0], PARAMS)
    assert on_gpu.llm.done == ["sync", "add", "step", "sleep", *["wake", "sync", "add", "step", "sleep"] * 2]


@pytest.mark.parametrize(("kind", "options"), [(Policy, {}), (Policy, {"sleep": True}), (OnGpu, {"sleep": False})])
def test_it_never_sleeps_where_the_platform_cannot_or_the_recipe_does_not_want_it(
    bench: Open, kind: type[Policy], options: dict[str, Any]
) -> None:
    one = bench(kind, **options)
    assert not one.llm.options.get("enable_sleep_mode", False)
    for _ in range(2):
        assert one.sample() == 2
        one.sync()
    assert {"sleep", "wake"}.isdisjoint(one.llm.done)


def out_of_memory() -> None:
    raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:62")


@pytest.mark.parametrize(
    ("fault", "cause"), [(out_of_memory, "CUDA Error: out of memory"), (lambda: False, "some of its memory")]
)
def test_an_engine_that_does_not_wake_stops_the_run_and_says_what_to_do(
    bench: Open, fault: Callable[[], object], cause: str
) -> None:
    on_gpu = bench()
    on_gpu.sample()
    on_gpu.llm.at["wake"] = fault
    words = f"did not wake after the update: {cause}.*rollout.engine.memory_fraction lower.*rollout.engine.sleep"
    with pytest.raises(EngineError, match=words):
        on_gpu.sample()
    with pytest.raises(EngineError, match=words):
        on_gpu.sync()
    del on_gpu.llm.at["wake"]
    with pytest.raises(EngineError, match="the last weight sync failed"):  # its weights are those before the update
        on_gpu.sample()
    on_gpu.sync()
    assert on_gpu.sample() == 2


def test_an_engine_that_cannot_go_to_sleep_stops_the_run(bench: Open) -> None:
    on_gpu = bench()
    on_gpu.llm.at["sleep"] = out_of_memory
    with pytest.raises(EngineError, match="could not free its memory for the update: CUDA Error: out of memory"):
        on_gpu.sample()


def test_waking_counts_towards_the_deadline_of_the_sync(bench: Open) -> None:
    on_gpu = bench(sync_timeout_s=1.0)
    on_gpu.sample()
    on_gpu.llm.at["wake"] = lambda: time.sleep(1.05)
    with pytest.raises(EngineError, match="sync_timeout_s = 1 s; it waited for the engine to wake"):
        on_gpu.sync()
