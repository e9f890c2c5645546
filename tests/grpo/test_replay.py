"""Claims about replay: all positions at once are the law that was sampled from token by token, and the filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from builders import END as TINY_END
from builders import make_batch, make_group
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_law import slow_logits
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from grpo.rollout.base import SamplingParams
from grpo.rollout.processors import Prefix, build_processors, right_padded
from grpo.rollout.replay import Replay, ReplayedPrompts, kept_tokens
from grpo.update.forward import replay_of
from grpo.update.logprobs import token_logprobs

V, END = 6, 5
INF = math.inf
NO_PROMPT = ReplayedPrompts(
    token_ids=torch.zeros(1, 0, dtype=torch.int64), lengths=torch.tensor([0]), of_row=torch.tensor([0])
)
"""Of one completion."""


def make_params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"end_token_ids": (END,), **changes})


def ragged_places(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """rows [N], offsets [N] of every token of completions with these lengths."""
    places = [(row, offset) for row, length in enumerate(lengths) for offset in range(length)]
    return torch.tensor([row for row, _ in places]), torch.tensor([offset for _, offset in places])


LAWS = st.fixed_dictionaries(
    {
        "presence_penalty": st.sampled_from([0.0, 0.5, -0.25]),
        "frequency_penalty": st.sampled_from([0.0, 0.75, -0.5]),
        "penalties_over": st.sampled_from(["completion", "prompt", "both"]),
        "repetition_penalty": st.sampled_from([0.8, 1.0, 1.5]),
        "repetition_over": st.sampled_from(["completion", "prompt", "both"]),
        "min_new_tokens": st.integers(0, 6),
        "no_repeat_ngram": st.integers(0, 3),
        "banned": st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
    }
)
TOKENS = st.integers(0, V - 1)


@settings(max_examples=100, deadline=None)
@given(
    law=LAWS,
    prompts=st.lists(st.lists(TOKENS, max_size=4), min_size=1, max_size=3),
    completions=st.lists(st.lists(TOKENS, min_size=1, max_size=7), min_size=1, max_size=4),
    data=st.data(),
)
def test_replaying_all_positions_at_once_equals_going_token_by_token(
    law: dict[str, Any], prompts: list[list[int]], completions: list[list[int]], data: st.DataObject
) -> None:
    params = make_params(**law)
    of_row = data.draw(st.lists(st.integers(0, len(prompts) - 1), min_size=len(completions), max_size=len(completions)))
    prompt_ids, prompt_lengths = right_padded(prompts)
    rows, offsets = ragged_places([len(row) for row in completions])
    logits = torch.randn(len(rows), V, generator=torch.Generator().manual_seed(len(rows)))
    replayed = ReplayedPrompts(token_ids=prompt_ids, lengths=prompt_lengths, of_row=torch.tensor(of_row))
    replay = Replay(params, right_padded(completions)[0], rows, offsets, prompts=replayed)

    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))  # chunks may come in any order
    got = replay.process(logits[order], order)

    for place, n in enumerate(order.tolist()):
        prompt, before = prompts[of_row[int(rows[n])]], completions[int(rows[n])][: int(offsets[n])]
        assert got[place].tolist() == pytest.approx(slow_logits(logits[n].tolist(), prompt, before, params), abs=1e-6)
    for step in range(max(map(len, completions))):  # what an engine does: the rows that go on, a prefix that grows
        alive = [row for row, completion in enumerate(completions) if len(completion) > step]
        prefix = Prefix.of([prompts[of_row[row]] for row in alive], [completions[row][:step] for row in alive])
        places = [int(((rows == row) & (offsets == step)).nonzero()) for row in alive]
        decoded = logits[places]
        for processor in build_processors(params):
            decoded = processor(decoded, prefix)
        assert torch.equal(decoded, got[order.argsort()[places]])


CALLS: list[tuple[int, ...]] = []


class Recorder:
    """Writes the shapes it is called with to CALLS."""

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        CALLS.append((*logits.shape, *prefix.token_ids.shape, *prefix.prompt_ids.shape))
        return logits + 0


def test_a_chunk_of_positions_is_one_call_whatever_their_number_and_rows() -> None:
    params = make_params(custom=((f"{__name__}:Recorder", "{}"),))
    rows, offsets = ragged_places([40, 7, 60])
    prompts = ReplayedPrompts(
        token_ids=torch.zeros(2, 9, dtype=torch.int64), lengths=torch.tensor([9, 2]), of_row=torch.tensor([0, 0, 1])
    )
    replay = Replay(params, torch.zeros(3, 60, dtype=torch.int64), rows, offsets, prompts=prompts)
    CALLS.clear()
    for positions in torch.arange(107).split(64):
        replay.process(torch.zeros(len(positions), V), positions)
    assert CALLS == [(64, V, 64, 60, 64, 9), (43, V, 43, 60, 43, 9)]


def test_a_law_that_looks_at_the_text_is_not_replayed_without_the_prompts() -> None:
    places = (torch.tensor([[1, 2]]), torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(ValueError, match="replayed with its prompts"):
        Replay(make_params(presence_penalty=1.0), *places)
    Replay(make_params(top_p=0.5), *places)


def test_a_micro_batch_is_replayed_with_the_prompt_of_each_row() -> None:
    groups = [
        make_group([{"a": 1.0}, {"a": 0.0}], lengths=[3, 2], prompt_length=6, seed=1),
        make_group([{"a": 0.0}, {"a": 1.0}], lengths=[4, 1], prompt_length=3, seed=2),
    ]
    (micro,) = make_batch(groups, budget=1000).micro_batches
    params = SamplingParams(end_token_ids=(TINY_END,), repetition_penalty=2.0, frequency_penalty=0.5)
    replay = replay_of(micro, params)
    rows, offsets = micro.completion_mask.nonzero(as_tuple=True)
    assert len(rows) == 10
    vocabulary = int(torch.cat([micro.prompt_ids.flatten(), micro.completion_ids.flatten()]).max()) + 2
    logits = torch.randn(10, vocabulary, generator=torch.Generator().manual_seed(0))
    got = replay.process(logits, torch.arange(10))
    for n, (row, offset) in enumerate(zip(rows.tolist(), offsets.tolist(), strict=True)):
        group = micro.prompt_of_row[row]
        prompt = micro.prompt_ids[group, : int(micro.prompt_mask[group].sum())].tolist()
        before = micro.completion_ids[row, :offset].tolist()
        assert got[n].tolist() == pytest.approx(slow_logits(logits[n].tolist(), prompt, before, params), abs=1e-6)


def test_penalties_come_before_the_temperature() -> None:
    # logits (1, 0) with token 0 repeated once, presence 1: (0, 0), so 1/2 at every temperature;
    # after the temperature they would be (1 / 0.5 - 1, 0) = (1, 0)
    params = make_params(presence_penalty=1.0, temperature=0.5)
    replay = Replay(params, torch.tensor([[0, 1]]), torch.tensor([0]), torch.tensor([1]), prompts=NO_PROMPT)
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
    process = Replay(params, *places, prompts=NO_PROMPT).process
    logprobs, _ = token_logprobs(torch.ones(2, 1), head, torch.tensor([0, 1]), temperature=0.5, process=process)
    # top_k 2 keeps 16 and 4 of the first, 16 / 20; of the second 4 and both ones (a tie stays whole), 4 / 6
    assert logprobs.tolist() == pytest.approx([math.log(16 / 20), math.log(4 / 6)], abs=1e-6)


def test_a_law_of_temperature_alone_changes_no_logits() -> None:
    places = (torch.tensor([[1, 2]]), torch.tensor([0]), torch.tensor([1]))
    assert not Replay(make_params(temperature=0.7), *places).changes_logits
    for changes in (
        {"top_k": 2},
        {"top_p": 0.9},
        {"min_new_tokens": 1},
        {"frequency_penalty": 0.1},
        {"no_repeat_ngram": 2},
    ):
        assert Replay(make_params(**changes), *places, prompts=NO_PROMPT).changes_logits, changes


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
