"""Which rows are decoded side by side: limits hold, room that ends is refilled, and no completion notices."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import END, encoded, make_policy
from transformers import AutoTokenizer, Cache

from grpo.errors import OutOfMemory
from grpo.rollout import decoding
from grpo.rollout.base import SamplingParams
from grpo.rollout.decoding import Work
from grpo.rollout.transformers_engine import TransformersEngine
from grpo.runtime.filling import filler
from grpo.runtime.policy import Policy
from grpo.types import RolloutGroup

ENDS = (END, *range(100, 180))
PARAMS = SamplingParams(end_token_ids=ENDS, max_new_tokens=20)


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return make_policy(tiny_model_dir)


def make_engine(policy: Policy, tiny_model_dir: Path, **limits: Any) -> TransformersEngine:
    return TransformersEngine(policy, AutoTokenizer.from_pretrained(tiny_model_dir), **limits)


def make_work(lengths: Sequence[int], *, k: int = 2, max_rows: int = 64, max_tokens: int | None = None) -> Work:
    return Work(
        prompts=[[3] * length for length in lengths],
        num_samples=k,
        params=SamplingParams(end_token_ids=(END,), max_new_tokens=10),
        draws=torch.zeros(len(lengths) * k, 10, dtype=torch.float64),
        max_rows=max_rows,
        max_tokens=max_tokens,
    )


def forward_sizes(engine: TransformersEngine) -> list[tuple[int, int]]:
    """[rows, tokens] of every forward pass from now on."""
    sizes: list[tuple[int, int]] = []

    def note(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        sizes.append(tuple(arguments["input_ids"].shape))

    engine._model.register_forward_pre_hook(note, with_kwargs=True)
    return sizes


def by_prompt(groups: Sequence[RolloutGroup]) -> dict[str, list[tuple[int, ...]]]:
    return {group.prompt.id: [c.token_ids for c in group.completions] for group in groups}


def test_a_prompt_joins_while_rows_and_tokens_allow_it() -> None:
    work = make_work([30, 10], max_rows=4, max_tokens=100)
    assert work.tokens_of(0) == 2 * (30 + 10)
    assert work.fits(0, rows=0, tokens=0)
    assert work.fits(1, rows=2, tokens=60)  # 60 + 2 * 20 = 100
    assert not work.fits(1, rows=2, tokens=61)
    assert not work.fits(1, rows=3, tokens=0)  # 3 + 2 rows


def test_one_prompt_is_sampled_even_where_it_alone_exceeds_the_limits() -> None:
    assert make_work([30], k=8, max_rows=4, max_tokens=10).fits(0, rows=0, tokens=0)


def test_turns_hold_neighbours_of_like_length_longest_first() -> None:
    work = make_work([5, 40, 6, 39], max_rows=4)
    assert list(work.turns(of_one_length=False)) == [[1, 3], [2, 0]]
    assert list(work.turns(of_one_length=True)) == [[1], [3], [2], [0]]
    # 2 * (40 + 10) = 100; 2 * (39 + 10) = 98; 2 * 16 = 32; 2 * 15 = 30
    assert list(make_work([5, 40, 6, 39], max_tokens=165).turns(of_one_length=False)) == [[1], [3, 2, 0]]


def test_no_forward_pass_has_more_rows_or_tokens_than_the_limits(policy: Policy, tiny_model_dir: Path) -> None:
    engine = make_engine(policy, tiny_model_dir, max_rows=8, max_batch_tokens=200)
    sizes = forward_sizes(engine)
    list(engine.sample(encoded(8), 2, params=PARAMS, seed=0))
    steps = [rows for rows, tokens in sizes if tokens == 1]
    # the shortest prompt has 4 tokens: at most 200 / (4 + 20) = 8 rows; the longest 18: 200 / 38 = 5
    assert max(steps) <= 8
    assert steps[0] <= 5


def test_waiting_prompts_take_the_room_of_rows_that_ended(policy: Policy, tiny_model_dir: Path) -> None:
    engine = make_engine(policy, tiny_model_dir, max_rows=8)
    sizes = forward_sizes(engine)
    groups = list(engine.sample(encoded(12), 2, params=PARAMS, seed=0))
    num_tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
    prefills = [place for place, (_, tokens) in enumerate(sizes) if tokens > 1]
    assert len(prefills) > 2  # not one turn after another
    computed = sum(rows for rows, tokens in sizes if tokens == 1)
    # every token but a row's first takes a row of a step; of the rest, at most a quarter is thrown away
    assert computed <= 1.25 * (num_tokens - 24) + 8


def test_ended_rows_that_stay_for_the_sake_of_their_number_change_no_completion(
    policy: Policy, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not decoding.fills_up(make_engine(policy, tiny_model_dir)._model)
    assert decoding.fills_up(make_engine(make_policy(tiny_model_dir, dtype=torch.bfloat16), tiny_model_dir)._model)
    monkeypatch.setattr(decoding, "fills_up", lambda _: True)  # in float32, where a batch's size changes no completion
    engine = make_engine(policy, tiny_model_dir)
    sizes = forward_sizes(engine)
    wide = list(engine.sample(encoded(20), 3, params=PARAMS, seed=4))
    steps = [rows for rows, tokens in sizes if tokens == 1]
    assert len({rows for rows in steps if rows > 32}) > 1
    assert all(filler(rows) == 0 for rows in steps)
    assert all(filler(tokens) == 0 for _, tokens in sizes)
    monkeypatch.undo()
    narrow = list(make_engine(policy, tiny_model_dir, max_rows=7).sample(encoded(20), 3, params=PARAMS, seed=4))
    assert by_prompt(wide) == by_prompt(narrow)


@pytest.mark.parametrize(
    "law",
    [
        {},
        {"top_p": 0.9, "presence_penalty": 0.5, "penalties_over": "both"},
        {"repetition_penalty": 1.3, "no_repeat_ngram": 2, "min_new_tokens": 3},
        {"temperature": 0.0},
    ],
)
def test_limits_and_refilled_rows_change_no_completion(
    policy: Policy, tiny_model_dir: Path, law: dict[str, Any]
) -> None:
    params = replace(PARAMS, **law)
    wide = list(make_engine(policy, tiny_model_dir).sample(encoded(9), 3, params=params, seed=4))
    narrow = list(make_engine(policy, tiny_model_dir, max_rows=7).sample(encoded(9), 3, params=params, seed=4))
    assert by_prompt(wide) == by_prompt(narrow)
    for group in narrow:
        (same,) = (other for other in wide if other.prompt.id == group.prompt.id)
        for one, other in zip(group.completions, same.completions, strict=True):
            assert one.sampler_logprobs == pytest.approx(other.sampler_logprobs, abs=1e-5)


def test_completions_longer_than_the_room_at_first_are_those_of_plain_generate(
    policy: Policy, tiny_model_dir: Path
) -> None:
    """80 tokens: a row's own room of 32 is doubled twice."""
    params = SamplingParams(end_token_ids=(END,), max_new_tokens=80, temperature=0.0)
    (group,) = make_engine(policy, tiny_model_dir).sample(encoded(1), 2, params=params, seed=0)
    ids = torch.tensor([group.prompt_token_ids])
    plain: Any = policy.causal_lm.generate
    expected = plain(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=80, eos_token_id=END, pad_token_id=END
    )[0, ids.shape[1] :].tolist()
    assert [list(c.token_ids) for c in group.completions] == [expected, expected]


def test_groups_leave_before_the_whole_batch_is_done(policy: Policy, tiny_model_dir: Path) -> None:
    engine = make_engine(policy, tiny_model_dir)
    sizes = forward_sizes(engine)
    groups = iter(engine.sample(encoded(6), 2, params=PARAMS, seed=0))
    next(groups)
    after_first = len(sizes)
    list(groups)
    assert after_first < len(sizes)


def run_out_beyond(engine: TransformersEngine, rows: int) -> None:
    """The allocator refuses a decoding pass over more rows."""

    def refuse(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        if len(arguments["input_ids"]) > rows:
            torch.empty(2**56, dtype=torch.uint8)

    engine._model.register_forward_pre_hook(refuse, with_kwargs=True)


def test_where_memory_runs_out_fewer_rows_go_side_by_side_and_no_completion_changes(
    policy: Policy, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = encoded(5)
    expected = by_prompt(list(make_engine(policy, tiny_model_dir).sample(prompts, 2, params=PARAMS, seed=3)))
    engine = make_engine(policy, tiny_model_dir)
    run_out_beyond(engine, 6)
    assert by_prompt(list(engine.sample(prompts, 2, params=PARAMS, seed=3))) == expected
    assert ["with 10 rows" in r.getMessage() and "rollout.max_rows=5" in r.getMessage() for r in caplog.records] == [
        True
    ]
    caplog.clear()
    assert by_prompt(list(engine.sample(prompts, 2, params=PARAMS, seed=3))) == expected
    assert caplog.records == []  # it has been learned


def test_a_single_group_that_does_not_fit_ends_the_sampling(policy: Policy, tiny_model_dir: Path) -> None:
    engine = make_engine(policy, tiny_model_dir)
    run_out_beyond(engine, 1)
    with pytest.raises(OutOfMemory, match=r"on 2 completions of a single prompt.*rollout\.group_size"):
        list(engine.sample(encoded(3), 2, params=PARAMS, seed=3))


def test_any_other_error_while_sampling_stays_itself(policy: Policy, tiny_model_dir: Path) -> None:
    engine = make_engine(policy, tiny_model_dir)
    engine._model.register_forward_pre_hook(lambda *_: torch.zeros(3) + torch.zeros(2))
    with pytest.raises(RuntimeError, match="must match"):
        list(engine.sample(encoded(3), 2, params=PARAMS, seed=3))


def test_no_cache_outlives_its_rollout(policy: Policy, tiny_model_dir: Path) -> None:
    engine = make_engine(policy, tiny_model_dir)
    gc.collect()
    gc.disable()  # whatever hangs in a cycle stays
    try:
        list(engine.sample(encoded(3), 2, params=PARAMS, seed=0))
        held = [one for one in gc.get_objects() if issubclass(type(one), Cache)]
    finally:
        gc.enable()
    assert held == []


def test_no_prompts_give_no_groups(policy: Policy, tiny_model_dir: Path) -> None:
    assert list(make_engine(policy, tiny_model_dir).sample([], 2, params=PARAMS, seed=0)) == []
