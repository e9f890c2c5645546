"""An update in bfloat16 beside the same one in float32: log-probabilities, and where the gradient points."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from builders import make_batch, make_group, make_policy, make_updater
from torch import Tensor
from transformers import AutoTokenizer

from grpo.batching import TrainBatch
from grpo.rollout.base import SamplingParams
from grpo.runtime.policy import Policy
from grpo.types import Completion, Message, Prompt, RolloutGroup, ScoredGroup, Verdict
from grpo.update.forward import policy_pass
from grpo.update.step import UpdateStats

PARAMS = SamplingParams(end_token_ids=(2,), max_new_tokens=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One step of one policy."""

    policy: Policy
    logprobs: Tensor
    """[N] of the loss tokens, before it."""
    gradients: dict[str, Tensor]
    """Kind of matrix, as "q_proj.lora_A" -> its gradients of all layers, flat."""
    stats: UpdateStats


def outcome_of(model_dir: Path, batch: TrainBatch, *, dtype: torch.dtype, scale: float = 1.0) -> Outcome:
    """The policy's and the KL's gradient, with adapters that have moved. Args: scale: of the frozen matrices."""
    policy = make_policy(model_dir, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.causal_lm.named_parameters():
            if name.endswith("base_layer.weight"):
                parameter.mul_(scale)
        for parameter in policy.trainable_parameters().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        found = [policy_pass(policy, micro, PARAMS).logprobs[micro.completion_mask] for micro in batch.micro_batches]
    stats = make_updater(policy, beta=0.05, params=PARAMS, max_grad_norm=1e9).step(batch)
    kinds: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in policy.trainable_parameters().items():
        module, matrix = name.removesuffix(".default.weight").split(".")[-2:]
        assert parameter.grad is not None
        kinds[f"{module}.{matrix}"].append(parameter.grad.flatten())
    gradients = {kind: torch.cat(parts) for kind, parts in kinds.items()}
    return Outcome(policy=policy, logprobs=torch.cat(found), gradients=gradients, stats=stats)


def assert_close(half: Outcome, full: Outcome, *, mean: float, largest: float, cosine: float, kl: float) -> None:
    """Log-probabilities within these many nats, and every kind of matrix pulled the same way."""
    gap = (half.logprobs - full.logprobs).abs()
    cosines = {
        kind: float(torch.cosine_similarity(half.gradients[kind], gradient, dim=0))
        for kind, gradient in full.gradients.items()
    }
    lengths = {kind: float(half.gradients[kind].norm() / gradient.norm()) for kind, gradient in full.gradients.items()}
    print(f"{len(gap)} tokens: |difference| mean {gap.mean():.2g}, largest {gap.max():.2g} nats")
    print(*(f"{kind}: cosine {cosines[kind]:.5f}, length {lengths[kind]:.4f}" for kind in cosines), sep="\n")
    assert 0 < float(gap.mean()) < mean  # equal ones would not be of bfloat16
    assert float(gap.max()) < largest
    assert {kind: value for kind, value in cosines.items() if value <= cosine} == {}
    assert {kind: value for kind, value in lengths.items() if not 0.95 < value < 1.05} == {}
    assert half.stats.means["entropy"] == pytest.approx(full.stats.means["entropy"], rel=0.01)
    assert half.stats.means["kl/a"] == pytest.approx(full.stats.means["kl/a"], rel=0.1, abs=kl)


def assert_mixed(policy: Policy) -> None:
    """Frozen weights in bfloat16; what learns, and its gradient, in float32."""
    learning = policy.trainable_parameters()
    assert {parameter.dtype for parameter in learning.values()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in learning.values() if parameter.grad is not None} == {torch.float32}
    frozen = [parameter for parameter in policy.model.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}


def test_in_bfloat16_a_tiny_model_learns_in_the_direction_of_float32(tiny_model_dir: Path) -> None:
    groups = [
        make_group([{"a": 1.0}, {"a": 0.0}, {"a": 0.2}, {"a": 0.7}], lengths=[12, 30, 7, 20], prompt_length=9, seed=1),
        make_group([{"a": 0.0}, {"a": 1.0}, {"a": 0.4}], lengths=[25, 1, 16], prompt_length=21, seed=2),
    ]
    batch = make_batch(groups, max_new_tokens=64)
    # random weights are small, and their logits all alike: five times as large they are more like a model's
    full = outcome_of(tiny_model_dir, batch, dtype=torch.float32, scale=5.0)
    half = outcome_of(tiny_model_dir, batch, dtype=torch.bfloat16, scale=5.0)
    assert_mixed(half.policy)
    assert_close(half, full, mean=0.02, largest=0.1, cosine=0.99, kl=1e-4)


ANSWERS = {
    "What is the capital of France?": [
        "The capital of France is Paris.",
        "I think it is Lyon, a large city in the south-east of the country, but I am not sure about that.",
        "Paris.",
        "France is a country in Europe. Its capital, Paris, lies on the river Seine.",
    ],
    "A train leaves at nine and takes two and a half hours. When does it arrive, and how many minutes is that?": [
        "It arrives at half past eleven. Two and a half hours are 150 minutes.",
        "At 12:00.",
        "Nine plus two is eleven, and thirty minutes more make 11:30; 2 * 60 + 30 = 150 minutes.",
    ],
}
"""The first of each is right, and is scored best."""


def written_groups(model_dir: Path, answers: dict[str, list[str]]) -> list[ScoredGroup]:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def rollout(question: str, texts: Sequence[str]) -> RolloutGroup:
        messages = (Message(role="user", content=question),)
        asked = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        completions = tuple(
            Completion(token_ids=tuple(tokens), text=text, sampler_logprobs=(-1.0,) * len(tokens), finish_reason="stop")
            for text in texts
            for tokens in [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
        )
        prompt = Prompt(id=question, messages=messages, objectives=("a",))
        return RolloutGroup(prompt=prompt, prompt_token_ids=tuple(ids), completions=completions)

    return [
        ScoredGroup(
            rollout=rollout(question, texts),
            verdicts=tuple({"a": Verdict(value=1.0 / (1 + place), parts={})} for place in range(len(texts))),
        )
        for question, texts in answers.items()
    ]


@pytest.mark.long
def test_in_bfloat16_the_real_model_learns_in_the_direction_of_float32(smollm_dir: Path) -> None:
    batch = make_batch(written_groups(smollm_dir, ANSWERS), max_new_tokens=64)
    full = outcome_of(smollm_dir, batch, dtype=torch.float32)
    half = outcome_of(smollm_dir, batch, dtype=torch.bfloat16)
    assert_mixed(half.policy)
    # its KL, 0.02, came out 0.001 to 0.016 too high with three kernels of attention and five adapters
    assert_close(half, full, mean=0.1, largest=1.0, cosine=0.99, kl=0.02)  # both passes of the KL round
