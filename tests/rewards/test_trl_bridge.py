"""A TRL reward function works unchanged as a reward, and ours as one of TRL's: same arguments, None for missing."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rewards import (
    AnyReward,
    RewardConfigError,
    RewardContext,
    RewardInput,
    RewardSpec,
    RewardUnavailable,
    Score,
    build_reward,
    close_reward,
    score_group,
)
from rewards.base import begin_step
from rewards.trl_bridge import as_trl_reward
from rewards.trl_functions import TrlReward, TrlRewardParams

CHAT = ({"role": "system", "content": "Be short."}, {"role": "user", "content": "1 + 1?"})

TRL_MODULE = '''
"""As people write them for TRL: nothing here knows of this toolkit."""


def exact(prompts, completions, solution, **kwargs):
    return [float(completion[0]["content"] == right) for completion, right in zip(completions, solution)]


async def shorter(completions, *, limit=3, **kwargs):
    return [float(len(completion[0]["content"]) <= limit) for completion in completions]


class Callable:
    def __call__(self, completions, **kwargs):
        return [1.0 for _ in completions]


ready = Callable()
number = 3
'''


@pytest.fixture
def beside_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "made_for_trl.py").write_text(TRL_MODULE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("made_for_trl", None)


def group(*completions: str, reference: str | None = "2", **fields: Any) -> list[RewardInput]:
    return [
        RewardInput(prompt_id="p", prompt="1 + 1?", completion=text, reference=reference, **fields)
        for text in completions
    ]


def scores_of(reward: AnyReward, inputs: list[RewardInput]) -> list[Score]:
    async def scored() -> list[Score]:
        try:
            return await score_group(reward, inputs)
        finally:
            await close_reward(reward)

    return asyncio.run(scored())


def values_of(reward: AnyReward, inputs: list[RewardInput]) -> list[float | None]:
    return [score.value for score in scores_of(reward, inputs)]


def named(name: str, base_dir: Path, **params: Any) -> AnyReward:
    return build_reward(RewardSpec(name=name, params=params), RewardContext(base_dir=base_dir))


def seen_by(inputs: list[RewardInput], **params: Any) -> dict[str, Any]:
    """What a TRL function that takes anything is called with."""
    seen: dict[str, Any] = {}

    def watch(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0] * len(kwargs["completions"])

    assert values_of(TrlReward(watch, TrlRewardParams(**params)), inputs) == [0.0] * len(inputs)
    return seen


# TRL's function -> ours


def test_a_recipe_names_a_trl_function_as_it_is(beside_recipe: Path) -> None:
    inputs = group("2", "3")
    assert values_of(named("trl:made_for_trl:exact", beside_recipe, reference_as="solution"), inputs) == [1.0, 0.0]
    assert values_of(named("trl:made_for_trl:shorter", beside_recipe), group("abc", "abcd")) == [1.0, 0.0]
    limited = named("trl:made_for_trl:shorter", beside_recipe, arguments={"limit": 4})
    assert values_of(limited, group("abc", "abcd")) == [1.0, 1.0]
    assert values_of(named("trl:made_for_trl:ready", beside_recipe), inputs) == [1.0, 1.0]


def test_trls_own_reward_functions_score_here_as_they_do_there(tmp_path: Path) -> None:
    from trl.rewards import accuracy_reward, think_format_reward

    texts = [r"\boxed{2}", r"\boxed{3}", "<think>\n1 + 1\n</think>\n2"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    accuracy = named("trl:trl.rewards:accuracy_reward", tmp_path, reference_as="solution")
    scores = scores_of(accuracy, group(*texts, reference="$2$"))
    assert [score.value for score in scores] == accuracy_reward(chats, solution=["$2$"] * 3)
    assert [score.value for score in scores[:2]] == [1.0, 0.0]
    assert "answer_parsed: [2" in scores[0].reason  # what it gives to log_extra
    thoughts = named("trl:trl.rewards:think_format_reward", tmp_path)
    assert values_of(thoughts, group(*texts)) == think_format_reward(chats) == [0.0, 0.0, 1.0]


def test_the_arguments_are_those_of_trls_trainer() -> None:
    inputs = [
        RewardInput(
            prompt_id="p",
            prompt="1 + 1?",
            completion=text,
            reference="2",
            meta={"kind": "sum", "prompt": "not TRL's"},
            messages=CHAT,
            token_ids=(number, 7),
        )
        for number, text in enumerate(["2", "3"])
    ]
    seen = seen_by(inputs)
    assert seen["prompts"] == [list(CHAT)] * 2
    assert seen["completions"] == [[{"role": "assistant", "content": "2"}], [{"role": "assistant", "content": "3"}]]
    assert seen["completion_ids"] == [[0, 7], [1, 7]]
    assert (seen["kind"], seen["reference"]) == (["sum"] * 2, ["2"] * 2)
    others = {"trainer_state", "log_extra", "log_metric"}
    assert seen.keys() == {"prompts", "completions", "completion_ids", "kind", "reference"} | others


def test_texts_are_given_where_the_function_was_written_for_them() -> None:
    seen = seen_by(group("2"), form="text", reference_as="answer")
    assert (seen["prompts"], seen["completions"], seen["answer"]) == (["1 + 1?"], ["2"], ["2"])
    score = scores_of(TrlReward(lambda completions: [1.0], TrlRewardParams(form="text")), group("2", messages=CHAT))[0]
    assert score.value is None
    assert "a prompt of 2 messages is no text" in score.reason


def test_what_is_not_known_is_left_out_and_missed_by_name() -> None:
    assert "completion_ids" not in seen_by(group("2"))
    assert "reference" not in seen_by(group("2", reference=None))

    def punish(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [-1.0 for _ in completion_ids]

    assert values_of(TrlReward(punish), group("2", token_ids=(1, 2))) == [-1.0]
    missing = scores_of(TrlReward(punish), group("2"))[0]
    assert missing.value is None
    assert "punish wants completion_ids; known here are prompts, completions and reference" in missing.reason


def test_a_function_without_further_keywords_gets_what_it_names() -> None:
    def first(completions: list[Any], trainer_state: Any) -> list[float]:
        return [float(trainer_state.global_step) for _ in completions]

    reward = TrlReward(first)
    assert values_of(reward, group("a")) == [0.0]
    begin_step(reward, 5)  # the fifth step: four are done
    assert values_of(reward, group("a")) == [4.0]
    other = scores_of(TrlReward(lambda completions, trainer_state: [trainer_state.max_steps]), group("a"))[0]
    assert other.value is None  # how long TRL would train is not known here, and not made up
    assert "max_steps" in other.reason


def test_none_and_nan_are_missing_and_other_numbers_are_floats() -> None:
    import numpy
    import torch

    answers = [None, math.nan, True, 2, numpy.float32(0.5), torch.tensor(0.25)]
    scores = scores_of(TrlReward(lambda completions: answers), group(*"abcdef"))
    assert [score.value for score in scores] == [None, None, 1.0, 2.0, 0.5, 0.25]
    assert scores[0].reason == "the function gave no value"
    assert values_of(TrlReward(lambda completions: torch.tensor([1.0, math.nan])), group(*"ab")) == [1.0, None]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda completions: [1.0], "answered 1 rewards for 2 completions"),
        (lambda completions: ["1", "0"], "got the text '1'"),
        (lambda completions: [math.inf, 0.0], "inf"),
        (lambda completions: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_broken_function_gives_missing_scores_and_the_cause(answer: Callable[..., Any], words: str) -> None:
    score = scores_of(TrlReward(answer), group("a", "b"))[0]
    assert score.value is None
    assert words in score.reason


def test_what_a_function_logs_is_the_scores_reason() -> None:
    def logging(completions: list[Any], log_extra: Any, log_metric: Any) -> list[float | None]:
        log_extra("letters", [len(completion[0]["content"]) for completion in completions])
        log_metric("share", 0.5)
        return [1.0, None]

    one, other = scores_of(TrlReward(logging), group("a", "bc"))
    assert one.reason == "letters: 1; share: 0.5"
    assert other.reason == "the function gave no value; letters: 2; share: 0.5"


def test_a_plain_function_runs_beside_the_loop_one_group_at_a_time() -> None:
    # TRL calls it from one thread, one batch at a time: state of its own must not be raced for
    running: list[str] = []
    most: list[int] = []
    gate = threading.Event()

    def slow(completions: list[Any]) -> list[float]:
        running.append(threading.current_thread().name)
        most.append(len(running))
        gate.wait(0.05)
        running.pop()
        return [1.0 for _ in completions]

    async def three() -> list[list[Score]]:
        reward = TrlReward(slow)
        try:
            return await asyncio.gather(*(score_group(reward, group("a")) for _ in range(3)))
        finally:
            await close_reward(reward)

    assert [one[0].value for one in asyncio.run(three())] == [1.0, 1.0, 1.0]
    assert most == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("trl:made_for_trl:exat", {}, "has no 'exat' (did you mean 'exact'"),
        ("trl:made_for_trl:Callable", {}, "is a class; TRL takes a function or an instance"),
        ("trl:made_for_trl:number", {}, "is int; TRL takes a function"),
        ("trl:exact_match", {}, "must read trl:package.module:name"),
        ("trl:nowhere:exact", {}, "module 'nowhere' cannot be imported"),
        ("trl:made_for_trl:exact", {"refrence_as": "x"}, "no param 'refrence_as' (did you mean 'reference_as'"),
        ("trl:made_for_trl:exact", {"form": "chat"}, "param 'form' is 'chat'"),
    ],
)
def test_a_wrong_trl_name_or_param_is_the_users_error(
    beside_recipe: Path, name: str, params: dict[str, Any], words: str
) -> None:
    with pytest.raises(RewardConfigError) as caught:
        named(name, beside_recipe, **params)
    assert words in str(caught.value)


# ours -> TRL's function


def chats(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def called(function: Any, completions: list[Any], **columns: Any) -> list[float | None]:
    """As TRL's trainer calls it, for one prompt."""
    prompts = columns.pop("prompts", [[{"role": "user", "content": "1 + 1?"}]] * len(completions))
    return asyncio.run(function(prompts=prompts, completions=completions, **columns))


def test_a_built_in_becomes_a_trl_function_by_its_name() -> None:
    with as_trl_reward("exact_match", reference_column="solution") as function:
        assert function.__name__ == "exact_match"
        assert called(function, chats("2", "3"), solution=["2", "2"]) == [1.0, 0.0]
        assert called(function, ["2", "3"], prompts=["1 + 1?"] * 2, solution=["2", "2"]) == [1.0, 0.0]
        assert called(function, chats("2", "3"), solution=["2", None]) == [1.0, None]  # missing, which TRL takes out


def test_params_specs_and_rewards_of_ones_own_become_trl_functions() -> None:
    long = {"target_tokens": 1, "limit_tokens": 3}
    with as_trl_reward("length", params=long, name="short") as function:
        assert function.__name__ == "short"
        # (2 - 1) / (3 - 1), and no length without the tokens
        assert called(function, chats("a", "b"), completion_ids=[[5], [5, 6]]) == [0.0, -0.5]
        assert called(function, chats("a")) == [None]
    with as_trl_reward(RewardSpec(name="exact_match", params={"ignore_case": False})) as function:
        assert called(function, chats("A"), reference=["a"]) == [0.0]

    def vowels(inputs: list[RewardInput]) -> list[float]:
        return [float(sum(letter in "aeiou" for letter in one.completion)) for one in inputs]

    with as_trl_reward(vowels) as function:
        assert function.__name__ == "vowels"
        assert called(function, chats("aunt", "xyz")) == [2.0, 0.0]
    with pytest.raises(RewardConfigError, match="params are for a reward given by its name"):
        as_trl_reward(vowels, params={"a": 1})


def test_columns_reach_the_reward_and_rows_of_one_prompt_are_one_group() -> None:
    groups: list[list[RewardInput]] = []

    def watch(inputs: list[RewardInput]) -> list[float]:
        groups.append(inputs)
        return [float(len(inputs))] * len(inputs)

    with as_trl_reward(watch) as function:
        answer = called(
            function,
            chats("a", "b", "c"),
            prompts=[[{"role": "user", "content": text}] for text in ("x", "x", "y")],
            kind=["k"] * 3,
            reference=["r"] * 3,
        )
    assert answer == [2.0, 2.0, 1.0]
    first = min(groups, key=lambda rows: rows[0].prompt)[0]
    assert (first.prompt, first.completion, first.reference, first.meta) == ("x", "a", "r", {"kind": "k"})
    assert first.messages == ({"role": "user", "content": "x"},)
    assert len({rows[0].prompt_id for rows in groups}) == 2


def test_the_reasons_are_logged_as_a_column_and_the_step_is_told() -> None:
    class Stepped:
        step = 0

        def begin_step(self, step: int) -> None:
            self.step = step

        async def score(self, inputs: list[RewardInput]) -> list[Score]:
            return [Score(value=float(self.step), reason=one.completion.upper()) for one in inputs]

    extra: dict[str, list[str]] = {}
    with as_trl_reward(Stepped(), name="stepped") as function:
        state = SimpleNamespace(global_step=3)
        answer = called(
            function,
            chats("a", "b"),
            log_extra=extra.__setitem__,
            log_metric=None,
            trainer_state=state,
            environments=[],
        )
    assert answer == [4.0, 4.0]
    assert extra == {"stepped_reason": ["A", "B"]}


def test_the_last_message_and_the_text_of_blocks_are_what_is_scored() -> None:
    turns = [
        {"role": "assistant", "content": "let me see"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "2"}]},
    ]
    with as_trl_reward("exact_match") as function:
        assert called(function, [turns], reference=["it is 2"]) == [1.0]
        assert called(function, [[{"role": "assistant", "content": None}]], reference=["2"]) == [0.0]


def test_a_trl_function_through_both_bridges_answers_the_same() -> None:
    def lengths(prompts: list[Any], completions: list[Any], weight: list[int], **kwargs: Any) -> list[float | None]:
        return [len(c[0]["content"]) * w + len(p) if w else None for p, c, w in zip(prompts, completions, weight)]  # noqa: B905

    arguments = {"prompts": [list(CHAT)] * 3, "completions": chats("a", "bb", "ccc"), "weight": [2, 0, 3]}
    with as_trl_reward(TrlReward(lengths)) as function:
        assert called(function, **arguments) == lengths(**arguments) == [4.0, None, 11.0]


class Closable:
    """Notes where and whether it was closed."""

    def __init__(self, problem: str = "") -> None:
        self.problem, self.threads = problem, list[str]()

    async def check(self) -> None:
        if self.problem:
            raise RewardUnavailable(self.problem)

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        self.threads.append(threading.current_thread().name)
        return [Score(value=1.0) for _ in inputs]

    async def aclose(self) -> None:
        self.threads.append("closed")


def test_what_was_built_here_is_closed_and_what_was_handed_in_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Closable()
    with as_trl_reward(given, name="mine") as function:
        called(function, chats("a"))
        called(function, chats("a"))  # another event loop of TRL's: the reward stays in its own
    assert given.threads == ["reward-mine", "reward-mine"]
    function.close()  # twice is once
    with pytest.raises(RuntimeError, match="'mine' is closed"):
        called(function, chats("a"))

    (tmp_path / "closable_reward.py").write_text(f"{inspect.getsource(Closable)}\n\nlast = Closable()\n".join(HEAD))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "closable_reward", raising=False)
    with as_trl_reward("closable_reward:last", base_dir=tmp_path) as function:
        built = sys.modules["closable_reward"].last
    assert (function.__name__, built.threads) == ("last", ["closed"])


HEAD = ("import threading\nfrom rewards import RewardInput, RewardUnavailable, Score\n\n\n", "")


def test_a_reward_that_is_not_ready_is_refused_before_training() -> None:
    before = threading.active_count()
    with pytest.raises(RewardUnavailable, match="nobody answers"):
        as_trl_reward(Closable("nobody answers"))
    assert threading.active_count() == before


def test_trl_knows_the_function_as_async_and_by_its_name() -> None:
    from trl.trainer.utils import get_callable_name, is_async_callable

    with as_trl_reward("exact_match") as function:
        assert is_async_callable(function)
        assert get_callable_name(function) == get_callable_name(functools.partial(function)) == "exact_match"
