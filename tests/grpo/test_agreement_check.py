"""The check of engine against trainer excuses tokens at the edge of top-p, few of them, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import END, encoded, make_policy
from sampler_agreement import check_agreement
from transformers import AutoTokenizer

from grpo.prompts import EncodedPrompt
from grpo.rollout.base import SamplingParams
from grpo.rollout.transformers_engine import TransformersEngine
from grpo.runtime.policy import Policy
from grpo.types import RolloutGroup

PARAMS = SamplingParams(end_token_ids=(END,), max_new_tokens=12)


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Path) -> tuple[TransformersEngine, Policy]:
    """Its logits are spread out, so that single tokens hold a good part of the mass."""
    policy = make_policy(tiny_model_dir)
    with torch.no_grad():
        policy.causal_lm.get_output_embeddings().weight.mul_(40.0)  # pyright: ignore[reportOptionalMemberAccess]
    return TransformersEngine(policy, AutoTokenizer.from_pretrained(tiny_model_dir)), policy


def mass_before(policy: Policy, prompt: EncodedPrompt) -> float:
    """Of the tokens likelier than some token that itself holds at least 1%, as the prompt's first: between 0.6, 0.9."""
    with torch.no_grad():
        logits = policy.causal_lm(torch.tensor([prompt.token_ids]), use_cache=False).logits[0, -1].double()
    law = logits.softmax(dim=-1).sort(descending=True).values
    before = law.cumsum(dim=-1) - law
    return float(before[(before > 0.6) & (before < 0.9) & (law > 0.01)][0])


def sampled(
    tiny: tuple[TransformersEngine, Policy], top_p: float, *, num_at_edge: int
) -> tuple[list[RolloutGroup], SamplingParams]:
    """Many tokens, with that many first ones of the first prompt among them, and their law."""
    engine, _ = tiny
    first, *others = encoded(11)
    params = replace(PARAMS, top_p=top_p)
    groups = list(engine.sample([first], num_at_edge, params=replace(params, max_new_tokens=1), seed=1))
    return [*groups, *engine.sample(others, 10, params=params, seed=1)], params


def test_a_cut_that_differs_by_less_than_the_edge_is_excused_and_counted(
    tiny: tuple[TransformersEngine, Policy],
) -> None:
    """Engine and trainer cut the first token's law on either side of one token, 0.00001 of mass apart."""
    cut = mass_before(tiny[1], encoded(1)[0])
    groups, params = sampled(tiny, cut + 5e-6, num_at_edge=2)
    found = check_agreement(tiny[1], groups, replace(params, top_p=cut - 5e-6))
    assert 2 <= found.num_excused <= 4  # both differ; the trainer may have to force them too
    assert found.num_tokens > 800
    assert found.worst_gap < 1e-4
    same = check_agreement(tiny[1], groups, params)
    assert same.num_excused == 0


def test_too_many_excuses_fail(tiny: tuple[TransformersEngine, Policy]) -> None:
    cut = mass_before(tiny[1], encoded(1)[0])
    groups, params = sampled(tiny, cut + 5e-6, num_at_edge=12)
    with pytest.raises(AssertionError, match=r"1\d of \d+ tokens are excused"):
        check_agreement(tiny[1], groups, replace(params, top_p=cut - 5e-6))


def test_a_cut_beside_the_edge_is_not_excused(tiny: tuple[TransformersEngine, Policy]) -> None:
    """The same token, with engine and trainer 0.0004 from it on either side."""
    cut = mass_before(tiny[1], encoded(1)[0])
    groups, params = sampled(tiny, cut + 4e-4, num_at_edge=2)
    with pytest.raises(AssertionError, match=r"tokens differ, by up to|is not at the edge"):
        check_agreement(tiny[1], groups, replace(params, top_p=cut - 4e-4))


def test_another_top_p_is_not_excused(tiny: tuple[TransformersEngine, Policy]) -> None:
    groups, params = sampled(tiny, 0.9, num_at_edge=1)
    with pytest.raises(AssertionError, match=r"tokens differ, by up to|is not at the edge"):
        check_agreement(tiny[1], groups, replace(params, top_p=0.88))
