"""Claims about penalties, bans and filters: one law, whether it is sampled from or replayed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from grpo.rollout.base import SamplingParams
from grpo.rollout.processors import MinNewTokens, Prefix, RepetitionPenalties, build_processors
from grpo.rollout.replay import Replay, kept_tokens
from grpo.update.logprobs import token_logprobs

V, END = 6, 5
INF = math.inf


def make_params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"end_token_ids": (END,), **changes})


def prefix_of(*rows: Sequence[int], width: int = 4, padding: int = 0) -> Prefix:
    """Right-padded with a token that must not count."""
    padded = [[*row, *[padding] * (width - len(row))] for row in rows]
    return Prefix(token_ids=torch.tensor(padded), lengths=torch.tensor([len(row) for row in rows]))


def ragged_places(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """rows [N], offsets [N] of every token of completions with these lengths."""
    places = [(row, offset) for row, length in enumerate(lengths) for offset in range(length)]
    return torch.tensor([row for row, _ in places]), torch.tensor([offset for _, offset in places])


# One processor at a time


def test_a_token_that_occurred_c_times_loses_presence_plus_c_times_frequency() -> None:
    penalties = RepetitionPenalties(presence=0.5, frequency=0.25)
    got = penalties(torch.zeros(2, V), prefix_of([1, 1, 3], [2]))
    # token 1 twice: 0.5 + 2 * 0.25 = 1; tokens 3 and 2 once: 0.75; the padding token 0 never occurred
    assert got.tolist() == [[0.0, -1.0, 0.0, -0.75, 0.0, 0.0], [0.0, 0.0, -0.75, 0.0, 0.0, 0.0]]


def test_a_negative_penalty_rewards_repetition() -> None:
    got = RepetitionPenalties(presence=-1.0, frequency=-0.5)(torch.zeros(1, V), prefix_of([4, 4]))
    assert got.tolist() == [[0.0, 0.0, 0.0, 0.0, 2.0, 0.0]]  # 1 + 2 * 0.5


def test_tokens_behind_the_prefix_and_padding_do_not_count() -> None:
    whole = Prefix(token_ids=torch.tensor([[1, 2, 3, 3]]), lengths=torch.tensor([1]))
    got = RepetitionPenalties(presence=1.0, frequency=1.0)(torch.zeros(1, V), whole)
    assert got.tolist() == [[0.0, -2.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("width", [0, 3])
def test_an_empty_prefix_changes_no_logit(width: int) -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(0))
    empty = prefix_of([], width=width, padding=1)
    assert torch.equal(RepetitionPenalties(presence=1.0, frequency=1.0)(logits, empty), logits)


def test_end_tokens_are_banned_among_the_first_tokens_only() -> None:
    ban = MinNewTokens(count=2, end_token_ids=(1, END))
    got = ban(torch.zeros(3, V), prefix_of([], [3], [3, 3]))
    banned = [0.0, -INF, 0.0, 0.0, 0.0, -INF]
    assert got.tolist() == [banned, banned, [0.0] * V]


def test_processors_leave_the_logits_they_are_given_alone() -> None:
    logits = torch.zeros(1, V)
    for processor in build_processors(make_params(min_new_tokens=2, presence_penalty=1.0)):
        processor(logits, prefix_of([2]))
    assert logits.tolist() == [[0.0] * V]


def test_only_what_the_law_asks_for_is_built() -> None:
    assert build_processors(make_params(temperature=0.5, top_k=3)) == []
    built = build_processors(make_params(min_new_tokens=3, frequency_penalty=0.2))
    assert built == [
        MinNewTokens(count=3, end_token_ids=(END,)),
        RepetitionPenalties(presence=0.0, frequency=0.2),
    ]


# Replay


def slow_logits(logits: list[float], prefix: list[int], params: SamplingParams) -> list[float]:
    """The law's logits after a prefix, as a loop over the vocabulary."""
    result: list[float] = []
    for token, logit in enumerate(logits):
        count = prefix.count(token)
        penalty = params.frequency_penalty * count + (params.presence_penalty if count else 0.0)
        is_banned = token in params.end_token_ids and len(prefix) < params.min_new_tokens
        result.append(-INF if is_banned else logit - penalty)
    return result


@settings(max_examples=50, deadline=None)
@given(
    completions=st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=5), min_size=1, max_size=4),
    presence=st.sampled_from([0.0, 0.5, -0.25]),
    frequency=st.sampled_from([0.0, 0.75, -0.5]),
    min_new_tokens=st.integers(0, 6),
    data=st.data(),
)
def test_replaying_all_positions_at_once_equals_going_token_by_token(
    completions: list[list[int]], presence: float, frequency: float, min_new_tokens: int, data: st.DataObject
) -> None:
    params = make_params(presence_penalty=presence, frequency_penalty=frequency, min_new_tokens=min_new_tokens)
    width = max(map(len, completions))
    token_ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in completions])
    rows, offsets = ragged_places([len(row) for row in completions])
    logits = torch.randn(len(rows), V, generator=torch.Generator().manual_seed(len(rows)))
    replay = Replay(params, token_ids, rows, offsets)

    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))  # chunks may come in any order
    got = replay.process(logits[order], order)

    for place, n in enumerate(order.tolist()):
        prefix = completions[int(rows[n])][: int(offsets[n])]
        assert got[place].tolist() == pytest.approx(slow_logits(logits[n].tolist(), prefix, params), abs=1e-6)
        step = logits[n : n + 1]  # what the engine does: one position, a prefix that grows
        for processor in build_processors(params):
            step = processor(step, prefix_of(prefix, width=len(prefix)))
        assert torch.equal(got[place], step[0])


def test_penalties_come_before_the_temperature() -> None:
    # logits (1, 0) with token 0 repeated once, presence 1: (0, 0), so 1/2 at every temperature;
    # after the temperature they would be (1 / 0.5 - 1, 0) = (1, 0)
    params = make_params(presence_penalty=1.0, temperature=0.5)
    replay = Replay(params, torch.tensor([[0, 1]]), torch.tensor([0]), torch.tensor([1]))
    logprobs, _ = token_logprobs(
        torch.ones(1, 1),
        torch.tensor([[1.0], [0.0]]),
        torch.tensor([1]),
        temperature=0.5,
        process=replay.process,
    )
    assert logprobs.item() == pytest.approx(math.log(0.5))


def test_the_filter_sees_logits_after_penalties_and_temperature() -> None:
    # logits (ln 4, ln 2, ln 1), temperature 0.5: (16, 4, 1); after token 0 was sampled and lost ln 4: (1, 4, 1)
    head = torch.tensor([[math.log(4)], [math.log(2)], [0.0]])
    places = (torch.tensor([[0, 1]]), torch.tensor([0, 0]), torch.tensor([0, 1]))
    params = make_params(presence_penalty=math.log(4), temperature=0.5, top_k=2, end_token_ids=(2,))
    process = Replay(params, *places).process
    logprobs, _ = token_logprobs(torch.ones(2, 1), head, torch.tensor([0, 1]), temperature=0.5, process=process)
    # top_k 2 keeps 16 and 4 of the first, 16 / 20; of the second 4 and both ones (a tie stays whole), 4 / 6
    assert logprobs.tolist() == pytest.approx([math.log(16 / 20), math.log(4 / 6)], abs=1e-6)


def test_a_law_of_temperature_alone_changes_no_logits() -> None:
    places = (torch.tensor([[1, 2]]), torch.tensor([0]), torch.tensor([1]))
    assert not Replay(make_params(temperature=0.7), *places).changes_logits
    for changes in ({"top_k": 2}, {"top_p": 0.9}, {"min_new_tokens": 1}, {"frequency_penalty": 0.1}):
        assert Replay(make_params(**changes), *places).changes_logits, changes


# Filters


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.99, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    has_ties=st.booleans(),
)
def test_the_kept_tokens_are_those_of_transformers_top_k_then_top_p(
    seed: int, top_k: int, top_p: float, temperature: float, has_ties: bool
) -> None:
    logits = 2 * torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
    scaled = (logits.round() if has_ties else logits) / temperature
    scaled[0, 3] = -INF  # a banned token
    theirs, no_ids = scaled, torch.empty(8, 0, dtype=torch.long)
    if top_k > 0:
        theirs = TopKLogitsWarper(top_k)(no_ids, theirs)  # pyright: ignore[reportArgumentType]
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(no_ids, theirs)  # pyright: ignore[reportArgumentType]
    kept = kept_tokens(scaled, make_params(top_k=top_k, top_p=top_p))
    assert torch.equal(scaled.masked_fill(~kept, -INF), theirs)
    assert kept.any(dim=-1).all()


def test_top_p_keeps_a_token_while_the_mass_above_it_is_below_the_limit() -> None:
    scaled = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    # mass above: 0, 0.5, 0.8, 0.95
    assert kept_tokens(scaled, make_params(top_p=0.4)).tolist() == [[True, False, False, False]]
    assert kept_tokens(scaled, make_params(top_p=0.7)).tolist() == [[True, True, False, False]]
    assert kept_tokens(scaled, make_params(top_p=0.9)).tolist() == [[True, True, True, False]]
    # after top_k 2 the masses are 0.625 and 0.375: at 0.6 the first one is enough
    assert kept_tokens(scaled, make_params(top_p=0.6, top_k=2)).tolist() == [[True, False, False, False]]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), top_k=st.integers(0, 3), top_p=st.sampled_from([0.1, 0.5, 0.9]))
def test_the_sampled_token_is_always_kept_and_forced_ones_are_counted(seed: int, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = make_params(top_k=top_k, top_p=top_p, temperature=0.8)
    token_ids = torch.randint(0, V, (2, 4), generator=generator)
    rows, offsets = ragged_places([4, 3])
    logits = torch.randn(7, V, generator=generator)
    replay = Replay(params, token_ids, rows, offsets)
    got = replay.process(logits, torch.arange(7))
    sampled = token_ids[rows, offsets]
    kept = kept_tokens(logits / 0.8, params)
    assert torch.equal(got[range(7), sampled], logits[range(7), sampled])
    assert replay.num_forced == sum(not kept[n, sampled[n]] for n in range(7))
    others = torch.arange(V) != sampled[:, None]
    assert torch.equal(got.isneginf() & others, ~kept & others)


def test_a_forced_token_is_counted_once_though_the_backward_pass_replays_it() -> None:
    hidden = torch.ones(2, 1, requires_grad=True)
    head = torch.tensor([[3.0], [2.0], [1.0]])
    replay = Replay(
        make_params(top_k=1, end_token_ids=(0,)), torch.tensor([[2, 0]]), torch.tensor([0, 0]), torch.tensor([0, 1])
    )
    logprobs, _ = token_logprobs(hidden, head, torch.tensor([2, 0]), process=replay.process, chunk_tokens=1)
    logprobs.sum().backward()
    # the first sampled 2 beside the kept 0: exp(1) / (exp(1) + exp(3)); the second sampled what is kept
    assert logprobs.tolist() == pytest.approx([-math.log1p(math.exp(2)), 0.0])
    assert replay.num_forced == 1


def test_the_gradient_stays_within_the_kept_set() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    replay = Replay(make_params(top_k=2, end_token_ids=(0,)), torch.tensor([[0]]), torch.tensor([0]), torch.tensor([0]))
    law = torch.log_softmax(replay.process(logits, torch.tensor([0])), dim=-1)
    (gradient,) = torch.autograd.grad(law[0, 0], logits)
    # probabilities over the two kept: e / (e + 1) = 0.7310586 and 0.2689414; slope one_hot - probabilities
    assert gradient[0].tolist() == pytest.approx([0.2689414, -0.2689414, 0.0], abs=1e-6)
