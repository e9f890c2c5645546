"""Claims about penalties and bans: what each does to logits, and that it looks at the prefix alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_law import slow_logits
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from grpo.rollout.base import SamplingParams
from grpo.rollout.processors import (
    BannedSequences,
    MinNewTokens,
    NoRepeatNgram,
    OccurrencePenalties,
    Prefix,
    RepetitionPenalty,
    build_processors,
    right_padded,
)

V, END = 6, 5
INF = math.inf

SCOPES = st.sampled_from(["completion", "prompt", "both"])
TEXTS = st.lists(st.integers(0, V - 1), max_size=8)
SEQUENCES = st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=3).map(tuple), max_size=4).map(tuple)
LAWS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "minimum": st.fixed_dictionaries({"min_new_tokens": st.integers(1, 6), "end_token_ids": st.just((2, END))}),
    "banned": st.fixed_dictionaries({"banned": SEQUENCES}),
    "ngram": st.fixed_dictionaries({"no_repeat_ngram": st.integers(1, 4)}),
    "repetition": st.fixed_dictionaries(
        {"repetition_penalty": st.sampled_from([0.5, 1.25, 2.0]), "repetition_over": SCOPES}
    ),
    "occurrence": st.fixed_dictionaries(
        {
            "presence_penalty": st.sampled_from([0.0, 0.5, -0.25]),
            "frequency_penalty": st.sampled_from([0.0, 0.75, -0.5]),
            "penalties_over": SCOPES,
        }
    ),
}
"""The parameters of each kind of processor."""


def make_params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"end_token_ids": (END,), **changes})


def after(*completions: Sequence[int], prompts: Sequence[Sequence[int]] | None = None) -> Prefix:
    return Prefix.of(prompts or [[]] * len(completions), completions)


def processed(logits: Tensor, prefix: Prefix, params: SamplingParams) -> Tensor:
    for processor in build_processors(params):
        logits = processor(logits, prefix)
    return logits


def random_logits(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stretched(prefix: Prefix, extra: int, filling: int) -> Prefix:
    """The same prefix with more behind it."""

    def wider(ids: Tensor, lengths: Tensor) -> Tensor:
        result = torch.full((ids.shape[0], ids.shape[1] + extra), filling)
        for row, length in enumerate(lengths.tolist()):
            result[row, :length] = ids[row, :length]
        return result

    return Prefix(
        prompt_ids=wider(prefix.prompt_ids, prefix.prompt_lengths),
        prompt_lengths=prefix.prompt_lengths,
        token_ids=wider(prefix.token_ids, prefix.lengths),
        lengths=prefix.lengths,
    )


# Worked by hand


def test_a_token_that_occurred_c_times_loses_presence_plus_c_times_frequency() -> None:
    penalties = OccurrencePenalties(presence=0.5, frequency=0.25, over="completion")
    got = penalties(torch.zeros(2, V), after([1, 1, 3], [2]))
    # token 1 twice: 0.5 + 2 * 0.25 = 1; tokens 3 and 2 once: 0.75
    assert got.tolist() == [[0.0, -1.0, 0.0, -0.75, 0.0, 0.0], [0.0, 0.0, -0.75, 0.0, 0.0, 0.0]]


def test_a_negative_penalty_rewards_repetition() -> None:
    got = OccurrencePenalties(presence=-1.0, frequency=-0.5, over="completion")(torch.zeros(1, V), after([4, 4]))
    assert got.tolist() == [[0.0, 0.0, 0.0, 0.0, 2.0, 0.0]]  # 1 + 2 * 0.5


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ("completion", [0.0, -1.0, -1.0, 0.0, 0.0, 0.0]),
        ("prompt", [0.0, -2.0, 0.0, -1.0, 0.0, 0.0]),
        ("both", [0.0, -3.0, -1.0, -1.0, 0.0, 0.0]),  # token 1 twice in the prompt, once after it
    ],
)
def test_occurrences_are_counted_in_the_completion_the_prompt_or_both(over: Any, expected: list[float]) -> None:
    penalties = OccurrencePenalties(presence=0.0, frequency=1.0, over=over)
    assert penalties(torch.zeros(1, V), after([1, 2], prompts=[[1, 3, 1]])).tolist() == [expected]


def test_the_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones_once() -> None:
    logits = torch.tensor([[4.0, -4.0, 0.0, 4.0, -4.0, 1.0]])
    got = RepetitionPenalty(penalty=2.0, over="both")(logits, after([0, 0, 2], prompts=[[1]]))
    # tokens 0 (twice, divided once), 1 and 2 occurred; 3, 4 and 5 did not
    assert got.tolist() == [[2.0, -8.0, 0.0, 4.0, -4.0, 1.0]]


def test_end_tokens_are_banned_among_the_first_tokens_only() -> None:
    ban = MinNewTokens(count=2, end_token_ids=(1, END))
    got = ban(torch.zeros(3, V), after([], [3], [3, 3]))
    banned = [0.0, -INF, 0.0, 0.0, 0.0, -INF]
    assert got.tolist() == [banned, banned, [0.0] * V]


def test_the_last_token_of_a_banned_sequence_is_ruled_out_where_the_others_came_before_it() -> None:
    ban = BannedSequences(sequences=((4,), (1, 2), (3, 1, 0)))
    got = ban(torch.zeros(4, V), after([], [1], [3, 1], [1, 3]))
    assert got.isneginf().tolist() == [
        [False, False, False, False, True, False],  # 4 always
        [False, False, True, False, True, False],  # 2 after 1
        [True, False, True, False, True, False],  # 0 after 3 1 too
        [False, False, False, False, True, False],
    ]


def test_an_ngram_of_the_completion_is_not_completed_twice() -> None:
    ban = NoRepeatNgram(size=3)
    got = ban(torch.zeros(3, V), after([1, 2, 3, 1, 2], [1, 2, 1], [1, 1, 1]))
    # 1 2 3 was there: no 3 after the second 1 2. 2 1 is new. 1 1 1 was there: no fourth 1
    assert got.isneginf().tolist() == [
        [False, False, False, True, False, False],
        [False] * V,
        [False, True, False, False, False, False],
    ]


def test_an_ngram_of_one_token_bans_every_token_that_occurred() -> None:
    got = NoRepeatNgram(size=1)(torch.zeros(1, V), after([0, 3]))
    assert got.isneginf().tolist() == [[True, False, False, True, False, False]]


def test_prompt_tokens_that_the_head_has_no_logit_of_count_nowhere() -> None:
    prefix = after([V + 3], prompts=[[V, V + 7, 1]])
    assert OccurrencePenalties(presence=0.0, frequency=1.0, over="both")(torch.zeros(1, V), prefix).tolist() == [
        [0.0, -1.0, 0.0, 0.0, 0.0, 0.0]
    ]
    got = RepetitionPenalty(penalty=2.0, over="both")(torch.ones(1, V), prefix)
    assert got.tolist() == [[1.0, 0.5, 1.0, 1.0, 1.0, 1.0]]


# The law


def test_only_what_the_law_asks_for_is_built() -> None:
    assert build_processors(make_params(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1)) == []
    assert build_processors(make_params(frequency_penalty=0.2)) == [
        OccurrencePenalties(presence=0.0, frequency=0.2, over="completion"),
    ]


def test_the_order_is_bans_then_repetition_then_occurrences_then_ones_own() -> None:
    built = build_processors(
        make_params(
            min_new_tokens=3,
            presence_penalty=0.5,
            penalties_over="prompt",
            repetition_penalty=1.5,
            banned=((1, 2),),
            no_repeat_ngram=2,
            custom=((f"{__name__}:Shift", '{"token": 2, "by": 0.5}'),),
        )
    )
    assert built[:-1] == [
        MinNewTokens(count=3, end_token_ids=(END,)),
        BannedSequences(sequences=((1, 2),)),
        NoRepeatNgram(size=2),
        RepetitionPenalty(penalty=1.5, over="both"),
        OccurrencePenalties(presence=0.5, frequency=0.0, over="prompt"),
    ]
    assert isinstance(built[-1], Shift)
    # logit 3 of a token that occurred: 3 / 1.5 - 0.5 = 1.5; the other way round (3 - 0.5) / 1.5 = 1.67
    params = make_params(presence_penalty=0.5, repetition_penalty=1.5)
    assert processed(torch.full((1, V), 3.0), after([1]), params)[0, 1].item() == pytest.approx(1.5)


class Shift:
    """A processor of one's own, as a user would write it."""

    def __init__(self, *, token: int, by: float) -> None:
        self._token, self._by = token, by

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        return logits + self._by * (torch.arange(logits.shape[1]) == self._token) * prefix.lengths[:, None]


def test_a_processor_of_ones_own_is_part_of_the_law() -> None:
    params = make_params(custom=((f"{__name__}:Shift", '{"token": 2, "by": 0.5}'),))
    assert processed(torch.zeros(1, V), after([1, 1, 1]), params).tolist() == [[0.0, 0.0, 1.5, 0.0, 0.0, 0.0]]


@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("kind", [*LAWS, "all"])
@given(data=st.data(), texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), seed=st.integers(0, 10**6))
def test_every_processor_and_all_of_them_equal_loops_over_the_text(
    kind: str, data: st.DataObject, texts: list[tuple[list[int], list[int]]], seed: int
) -> None:
    kinds = LAWS if kind == "all" else [kind]
    params = make_params(**{key: value for name in kinds for key, value in data.draw(LAWS[name]).items()})
    logits = random_logits(len(texts), seed, torch.float64)
    prefix = after(*(completion for _, completion in texts), prompts=[prompt for prompt, _ in texts])
    got = processed(logits, prefix, params)
    for row, (prompt, completion) in enumerate(texts):
        assert got[row].tolist() == pytest.approx(slow_logits(logits[row].tolist(), prompt, completion, params))


@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("kind", list(LAWS))
@given(data=st.data(), texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), filling=st.integers(-1, V))
def test_tokens_behind_the_prefix_and_the_other_rows_change_nothing(
    kind: str, data: st.DataObject, texts: list[tuple[list[int], list[int]]], filling: int
) -> None:
    params = make_params(**data.draw(LAWS[kind]))
    logits = random_logits(len(texts))
    prefix = after(*(completion for _, completion in texts), prompts=[prompt for prompt, _ in texts])
    got = processed(logits, prefix, params)
    assert torch.equal(processed(logits, stretched(prefix, 3, filling), params), got)
    for row, (prompt, completion) in enumerate(texts):
        alone = processed(logits[row : row + 1], after(completion, prompts=[prompt]), params)
        assert torch.equal(alone[0], got[row])


@pytest.mark.parametrize("kind", list(LAWS))
def test_processors_leave_the_logits_they_are_given_alone(kind: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "minimum": {"min_new_tokens": 9},
        "banned": {"banned": ((1,), (2, 3))},
        "ngram": {"no_repeat_ngram": 4},
        "repetition": {"repetition_penalty": 2.0},
        "occurrence": {"presence_penalty": 1.0},
    }
    logits = random_logits(1)
    before = logits.clone()
    got = processed(logits, after([2]), make_params(**changes[kind]))
    assert got is not logits
    got.zero_()
    assert torch.equal(logits, before)


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("kind", list(LAWS))
@given(data=st.data(), texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), seed=st.integers(0, 10**6))
def test_the_gradient_of_the_law_is_that_of_finite_differences(
    kind: str, data: st.DataObject, texts: list[tuple[list[int], list[int]]], seed: int
) -> None:
    params = make_params(**data.draw(LAWS[kind]))
    prefix = after(*(completion for _, completion in texts), prompts=[prompt for prompt, _ in texts])
    logits = random_logits(len(texts), seed, torch.float64)
    logits = torch.where(logits >= 0, logits + 0.1, logits - 0.1).requires_grad_()  # away from the repetition's kink

    def law(given: Tensor) -> Tensor:
        """[N, V] probabilities: finite where a logit is ruled out."""
        result = processed(given, prefix, params)
        return result.masked_fill(result.isneginf().all(dim=-1, keepdim=True), 0.0).softmax(dim=-1)

    assert torch.autograd.gradcheck(law, (logits,))


# transformers' own


def theirs(processor: LogitsProcessor, text: Sequence[int], logits: Tensor) -> Tensor:
    return processor(torch.tensor([text], dtype=torch.long).view(1, -1), logits.clone())  # pyright: ignore[reportArgumentType]


@settings(max_examples=60, deadline=None)
@given(
    prompt=TEXTS.filter(bool), completion=TEXTS, penalty=st.sampled_from([0.5, 1.3, 2.0]), seed=st.integers(0, 10**6)
)
def test_repetition_over_both_is_transformers_and_over_the_completion_what_ignores_the_prompt(
    prompt: list[int], completion: list[int], penalty: float, seed: int
) -> None:
    logits, prefix = random_logits(1, seed), after(completion, prompts=[prompt])
    text = [*prompt, *completion]
    both = RepetitionPenalty(penalty=penalty, over="both")(logits, prefix)
    assert torch.equal(both, theirs(RepetitionPenaltyLogitsProcessor(penalty), text, logits))
    ignoring = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=len(prompt))
    alone = RepetitionPenalty(penalty=penalty, over="completion")(logits, prefix)
    assert torch.equal(alone, theirs(ignoring, text, logits))


@settings(max_examples=60, deadline=None)
@given(prompt=TEXTS, completion=TEXTS, count=st.integers(0, 8))
def test_the_minimum_of_new_tokens_is_transformers(prompt: list[int], completion: list[int], count: int) -> None:
    logits = random_logits(1)
    their_ban = MinNewTokensLengthLogitsProcessor(len(prompt), count, [1, END])
    got = MinNewTokens(count=count, end_token_ids=(1, END))(logits, after(completion, prompts=[prompt]))
    assert torch.equal(got, theirs(their_ban, [*prompt, *completion], logits))


@settings(max_examples=60, deadline=None)
@given(completion=TEXTS, size=st.integers(1, 4))
def test_no_repeat_ngram_is_transformers_without_a_prompt(completion: list[int], size: int) -> None:
    logits = random_logits(1)
    got = NoRepeatNgram(size=size)(logits, after(completion))
    assert torch.equal(got, theirs(NoRepeatNGramLogitsProcessor(size), completion, logits))


def test_an_ngram_of_the_prompt_may_be_said_again_other_than_in_transformers() -> None:
    logits, prompt, completion = torch.zeros(1, V), [1, 2, 3], [1, 2]
    assert theirs(NoRepeatNGramLogitsProcessor(3), [*prompt, *completion], logits)[0, 3] == -INF
    assert NoRepeatNgram(size=3)(logits, after(completion, prompts=[prompt])).tolist() == [[0.0] * V]


@settings(max_examples=60, deadline=None)
@given(completion=TEXTS, sequences=SEQUENCES.filter(bool))
def test_banned_sequences_are_transformers_without_a_prompt(
    completion: list[int], sequences: tuple[tuple[int, ...], ...]
) -> None:
    logits = random_logits(1)
    their_ban = NoBadWordsLogitsProcessor([list(sequence) for sequence in dict.fromkeys(sequences)])
    got = BannedSequences(sequences=sequences)(logits, after(completion))
    assert torch.equal(got, theirs(their_ban, completion, logits))


def test_a_banned_sequence_that_begins_in_the_prompt_may_be_ended_other_than_in_transformers() -> None:
    logits, prompt, completion = torch.zeros(1, V), [1], [2]
    assert theirs(NoBadWordsLogitsProcessor([[1, 2, 3]]), [*prompt, *completion], logits)[0, 3] == -INF
    got = BannedSequences(sequences=((1, 2, 3),))(logits, after(completion, prompts=[prompt]))
    assert got.tolist() == [[0.0] * V]  # the completion holds no more of it than 2 3


# Prefixes


def test_a_prefix_is_made_of_prompts_and_completions_of_any_length() -> None:
    prefix = after([3], [], prompts=[[], [1, 2]])
    assert prefix.prompt_lengths.tolist() == [0, 2]
    assert prefix.prompt_ids[1].tolist() == [1, 2]
    assert prefix.lengths.tolist() == [1, 0]
    assert prefix.token_ids[0].tolist() == [3]
    with pytest.raises(ValueError, match="2 prompts for 1 completions"):
        Prefix.of([[], []], [[1]])


def test_padding_no_sequences_or_empty_ones_gives_empty_tensors() -> None:
    assert [tensor.shape for tensor in right_padded([])] == [(0, 0), (0,)]
    assert [tensor.shape for tensor in right_padded([[], []])] == [(2, 0), (2,)]
