"""Drawing without sorting the vocabulary keeps the set that the whole sort keeps, and draws from the same law."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.rollout import drawing
from grpo.rollout.base import SamplingParams
from grpo.rollout.drawing import draw_tokens
from grpo.rollout.replay import kept_tokens


def slow_draw(logits: Tensor, draws: Tensor, params: SamplingParams) -> tuple[list[int], list[float]]:
    """The law written out: whole sort, whole softmax, one cumulative sum."""
    scaled = logits / params.temperature
    law = scaled.masked_fill(~kept_tokens(scaled, params), -torch.inf).double().log_softmax(dim=-1)
    tokens = torch.searchsorted(law.exp().cumsum(dim=-1), draws[:, None], right=True)[:, 0]
    return tokens.tolist(), law.gather(1, tokens[:, None])[:, 0].tolist()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.1, 2.0, 6.0]),
    law=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.7, 1.0, 1.3]),
            "top_p": st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]),
            "top_k": st.sampled_from([0, 1, 20, 127, 128, 500]),
            "min_p": st.sampled_from([0.0, 0.05, 0.5]),
        }
    ),
    has_ties=st.booleans(),
)
def test_tokens_and_logprobs_are_those_of_the_whole_sort(
    seed: int, spread: float, law: dict[str, Any], has_ties: bool
) -> None:
    """3000 tokens: flat laws go beyond 128 candidates, and beyond 2048; rounded logits tie at every edge."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(6, 3000, generator=generator)
    logits = logits.round() if has_ties else logits
    logits[:, 7] = -torch.inf  # a banned token
    draws = torch.rand(6, generator=generator, dtype=torch.float64)
    params = SamplingParams(end_token_ids=(2,), **law)
    tokens, logprobs = draw_tokens(logits, draws, params)
    expected_tokens, expected = slow_draw(logits, draws, params)
    if not has_ties:
        assert tokens.tolist() == expected_tokens
        assert logprobs.tolist() == pytest.approx(expected, abs=2e-5)
    # the kept mass, in logits: of a tie at the edge as many stay, though not the same ones
    scaled = logits / params.temperature
    kept_mass = [float(scaled[row, token]) - p for row, (token, p) in enumerate(zip(tokens, logprobs, strict=True))]
    theirs = [float(scaled[row, t]) - p for row, (t, p) in enumerate(zip(expected_tokens, expected, strict=True))]
    assert kept_mass == pytest.approx(theirs, abs=5e-5)


def test_a_tie_at_the_edge_of_top_p_is_cut_to_as_many_tokens_as_the_whole_sort_keeps() -> None:
    # 200 tokens of mass 1/200 each: top-p 0.5 keeps 100 of them
    params = SamplingParams(end_token_ids=(2,), top_p=0.5)
    draws = torch.linspace(0, 0.999, 64, dtype=torch.float64)
    _, logprobs = draw_tokens(torch.zeros(64, 200), draws, params)
    assert int(kept_tokens(torch.zeros(1, 200), params).sum()) == 100
    assert logprobs.tolist() == pytest.approx([-torch.tensor(100.0).log().item()] * 64, abs=1e-5)


def test_few_candidates_settle_what_a_peaked_law_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sort of the vocabulary where 128 candidates hold the kept set: the whole sort must not be reached."""

    def unreached(*_: object) -> Tensor:
        raise AssertionError("the whole vocabulary was sorted")

    monkeypatch.setattr(drawing, "kept_tokens", unreached)
    logits = 4 * torch.randn(8, 3000, generator=torch.Generator().manual_seed(0))
    logits[:, :5] += 20
    draw_tokens(logits, torch.rand(8, dtype=torch.float64), SamplingParams(end_token_ids=(2,), top_p=0.9))


def test_the_likeliest_token_at_temperature_0_with_its_plain_logprob() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0]])
    tokens, logprobs = draw_tokens(logits, torch.zeros(1), SamplingParams(end_token_ids=(2,), temperature=0.0))
    assert tokens.tolist() == [1]
    assert logprobs.tolist() == pytest.approx([logits.log_softmax(-1)[0, 1].item()])


def test_no_token_of_probability_0_is_drawn_at_either_end() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, 4)
    draws = torch.tensor([0.0, 1.0 - 1e-16], dtype=torch.float64)
    for law in ({}, {"min_p": 0.1}):
        tokens, _ = draw_tokens(logits, draws, SamplingParams(end_token_ids=(2,), **law))
        assert tokens.tolist() == [1, 2]
