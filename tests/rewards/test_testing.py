"""The contract kit: what keeps the contract passes, and each way to break it is named with what to do."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from judges import EndpointConfig, JudgeConfig, ScriptedClient
from judges.clients.scripted import verdict_for
from judges.prompts import read_fences
from rewards import RewardInput, RewardSpec, RewardUnavailable, Score
from rewards.judged import Judged
from rewards.registry import BUILTIN_REWARDS
from rewards.testing import RewardContractBroken, check_reward, default_group


def problems_of(reward: Any, **settings: Any) -> str:
    with pytest.raises(RewardContractBroken) as caught:
        check_reward(reward, **settings)
    return str(caught.value)


def only_problem_of(reward: Any, **settings: Any) -> str:
    """The one line of what was found."""
    _, *lines = problems_of(reward, **settings).splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def right(inputs: list[RewardInput]) -> list[float | None]:
    """A good reward: 1 for the reference, 0 else, none without one."""
    return [None if one.reference is None else float(one.completion == one.reference) for one in inputs]


async def vowels(inputs: list[RewardInput]) -> list[Score]:
    """A good one that is asynchronous and reads no reference."""
    await asyncio.sleep(0)
    return [Score(value=float(sum(letter in "aeiou" for letter in one.completion))) for one in inputs]


def group_of(*completions: str, reference: str | None, **meta: Any) -> list[RewardInput]:
    group = replace(default_group()[0], reference=reference, meta=meta)
    return [replace(group, completion=text) for text in completions]


# what keeps the contract


@pytest.mark.parametrize("reward", [right, vowels])
def test_a_good_reward_passes_sync_or_async(reward: Any) -> None:
    check_reward(reward)
    check_reward(
        right, low=0, high=1, known=[(default_group()[0], 1.0), (replace(default_group()[0], reference=None), None)]
    )


def test_a_reward_that_compares_the_groups_completions_passes() -> None:
    def longest(inputs: list[RewardInput]) -> list[float]:
        most = max(len(one.completion) for one in inputs)
        return [float(len(one.completion) == most) for one in inputs]

    check_reward(longest)


BUILT_IN: dict[str, tuple[dict[str, Any], list[RewardInput] | None, tuple[float, float]]] = {
    "abstention_penalty": ({}, None, (-1, 0)),
    "choice": ({"letters": True}, None, (0, 1)),
    "code_tests": ({}, group_of("print(2)", "print(3)", reference='[{"input": "", "output": "2"}]'), (0, 1)),
    "exact_match": ({}, None, (0, 1)),
    "format": ({"pattern": "(?s).*A.*", "tags": ["answer"]}, None, (0, 1)),
    "grounding": ({}, None, (0, 1)),
    "length": ({"target_tokens": 5, "limit_tokens": 7}, None, (-1, 0)),
    "math_answer": ({}, group_of(r"\boxed{2}", "3", reference="2"), (0, 1)),
    "regions": ({}, group_of("[0,0,2,2]", "[0,0,1,2]", reference="[0,0,2,2]"), (0, 1)),
}

SLOW = ("math_answer", "code_tests")


# math_answer takes up its time limit over one of the hostile texts, code_tests starts a sandbox for each
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in BUILT_IN])
def test_the_built_in_rules_keep_it(name: str) -> None:
    params, group, (low, high) = BUILT_IN[name]
    check_reward(RewardSpec(name=name, params=params), group=group, low=low, high=high)


def test_every_built_in_is_held_to_it() -> None:
    assert set(BUILT_IN) | {"judged", "reward_model"} == set(BUILTIN_REWARDS)


def test_a_judge_as_a_reward_keeps_it() -> None:
    def script(request: Any) -> str:
        _, texts = read_fences(request.messages[-1].content)
        return verdict_for(request, float("Anna" in texts["completion"]))

    endpoint = EndpointConfig(url="http://127.0.0.1:9/v1", model="m")
    config = JudgeConfig(endpoints=(endpoint,), rubric="fairness", backoff_s=0.01)
    check_reward(Judged(config, client=ScriptedClient(script)), low=0, high=1)


# what breaks it: the number of scores, their order, their values


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda inputs: [1.0], "answered 1 scores for 5 completions. Answer a list with one score per input"),
        (lambda inputs: [1.0] * 5, "answered 5 scores for 1 completions"),
        (lambda inputs: 1.0, "answered float, expected a list of 5 scores"),
        (lambda inputs: {one.completion: 1.0 for one in inputs}, "answered dict, expected a list"),
        (lambda inputs: (1.0 for _ in inputs), "answered generator, expected a list"),
    ],
)
def test_a_wrong_number_of_scores_is_found(reward: Any, words: str) -> None:
    assert words in only_problem_of(reward)


def test_scores_that_depend_on_the_order_are_found() -> None:
    async def as_completed(inputs: list[RewardInput]) -> list[float]:
        async def one_score(one: RewardInput) -> float:
            for _ in range(len(one.completion[:50])):
                await asyncio.sleep(0)
            return float(len(one.completion))

        return [await done for done in asyncio.as_completed([one_score(one) for one in inputs])]

    def rank(inputs: list[RewardInput]) -> list[float]:
        return [float(place) for place, _ in enumerate(inputs)]

    for reward in (as_completed, rank):
        found = only_problem_of(reward)
        assert "scores depend on the order: 'Anna' got " in found
        assert "gather keeps it, as_completed does not" in found


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "answered nan, expected a finite number"),
        (float("inf"), "answered inf, expected a finite number"),
        (True, "answered True (bool), expected a number or None"),
        ("1", "answered '1' (str), expected a number or None"),
        (Score(value=float("-inf")), "answered -inf, expected a finite number"),
    ],
)
def test_what_is_no_finite_number_is_found(value: Any, words: str) -> None:
    def reward(inputs: list[RewardInput]) -> list[Any]:
        return [value if one.completion == "Omar" else 0.5 for one in inputs]

    found = only_problem_of(reward)
    assert "'Omar': " in found
    assert words in found
    assert "answer a finite float, or None" in found


def test_a_score_outside_of_its_range_is_found() -> None:
    assert "'unknown' got 2, outside of 0 to 1" in only_problem_of(
        vowels, low=0, high=1, group=group_of("a", "unknown", reference=None)
    )
    long = only_problem_of(lambda inputs: [float(len(one.completion) > 1000) for one in inputs], high=0)
    assert "(5000 characters) got 1, outside of -inf to 0" in long  # only a hostile text leads there


# numbers for what cannot be judged


def test_a_default_for_a_prompt_without_a_reference_is_found() -> None:
    found = only_problem_of(lambda inputs: [float(one.completion == one.reference) for one in inputs])
    assert "a default number for what cannot be judged: 'Anna' got 1.0 with its reference, and without one 0.0" in found
    assert "Answer None" in found


def test_a_judge_for_which_the_reference_is_optional_can_say_so() -> None:
    def reward(inputs: list[RewardInput]) -> list[float]:
        return [float((one.reference or "Anna") in one.completion) / (1 if one.reference else 2) for one in inputs]

    assert "a default number" in only_problem_of(reward)
    check_reward(reward, reference_is_optional=True)


def test_a_default_for_what_its_author_knows_to_be_unjudgeable_is_found() -> None:
    no_tokens = replace(default_group()[0], num_tokens=0)

    def brevity(inputs: list[RewardInput]) -> list[float]:
        return [1 / (1 + one.num_tokens) for one in inputs]

    found = only_problem_of(brevity, known=[(no_tokens, None)])
    assert "a default number for what cannot be judged: 'Anna' must get None, known[0], but got 1.0" in found


def test_a_score_other_than_its_author_knows_is_found() -> None:
    one, other = default_group()[:2]
    found = only_problem_of(right, known=[(one, 1.0), (other, 0.5)])
    assert "'Omar' must get 0.5, known[1], but got 0.0" in found


def test_a_group_without_any_score_leaves_nothing_to_check_and_says_so() -> None:
    found = only_problem_of(lambda inputs: [Score(value=None, reason="no solution column")] * len(inputs))
    assert "the first reason: no solution column. Give check_reward(group=...)" in found


# exceptions, blocking, side effects


def test_an_exception_is_found_with_the_text_that_leads_to_it() -> None:
    def mean_length(inputs: list[RewardInput]) -> list[float]:
        return [len(one.completion) / len(one.completion.split()) for one in inputs]

    found = only_problem_of(mean_length)
    assert "raised ZeroDivisionError: division by zero on the completion ''" in found
    assert "Answer None for that completion alone" in found
    assert "raised KeyError: 'solution'" in only_problem_of(lambda inputs: [one.meta["solution"] for one in inputs])
    assert "on a prompt without a reference" in only_problem_of(lambda inputs: [len(one.reference) for one in inputs])  # type: ignore[arg-type]


def test_an_async_reward_that_blocks_the_event_loop_is_found() -> None:
    calls: list[int] = []

    async def asks(inputs: list[RewardInput]) -> list[float]:
        calls.append(len(inputs))
        if len(calls) == 2:
            time.sleep(0.6)  # noqa: ASYNC251
        return [1.0 for _ in inputs]

    found = only_problem_of(asks)
    assert "the event loop was held up for 0." in found
    assert "asyncio.to_thread" in found


def test_a_plain_reward_may_block_for_it_has_a_thread() -> None:
    calls: list[int] = []

    def asks(inputs: list[RewardInput]) -> list[float]:
        calls.append(len(inputs))
        if len(calls) == 2:
            time.sleep(0.6)
        return [1.0 for _ in inputs]

    check_reward(asks)


def empty_the_list(inputs: list[RewardInput]) -> list[float]:
    return [float(len(inputs.pop(0).completion)) for _ in range(len(inputs))]


def write_into_meta(inputs: list[RewardInput]) -> list[float]:
    for one in inputs:
        one.meta["seen"] = True  # type: ignore[index]
    return [1.0 for _ in inputs]


@pytest.mark.parametrize(
    ("reward", "words"), [(empty_the_list, "(their list)"), (write_into_meta, "(one of them, such as its meta)")]
)
def test_changed_inputs_are_found(reward: Any, words: str) -> None:
    found = only_problem_of(reward)
    assert f"it changes its inputs {words}" in found
    assert "Work on a copy" in found


# the same group, the same scores


class Novelty:
    """1 for a completion that it has not scored before."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def score(self, inputs: list[RewardInput]) -> list[float]:
        scores = [float(one.completion not in self._seen) for one in inputs]
        self._seen |= {one.completion for one in inputs}
        return scores


class Running:
    """Remembers the last group's first completion."""

    last = ""

    async def score(self, inputs: list[RewardInput]) -> list[float]:
        last, self.last = self.last or inputs[0].prompt_id, inputs[0].prompt_id
        return [float(last == "another") for _ in inputs]


class Shared:
    """Keeps what belongs to one call on itself, while it waits."""

    async def score(self, inputs: list[RewardInput]) -> list[float]:
        self._prompt = inputs[0].prompt_id
        await asyncio.sleep(0)
        return [float(len(self._prompt)) for _ in inputs]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Novelty, "the same group got [1, 1, 1, 1, 1], then [0, 0, 0, 0, 0], then [0, 0, 0, 0, 0]"),
        (Running, "the same group got [0, 0, 0, 0, 0], and after another group [1, 1, 1, 1, 1]"),
        (Shared, "the same group got [5, 5, 5, 5, 5], and while another group was scored [7, 7, 7, 7, 7]"),
    ],
)
def test_state_between_calls_is_found(make: Callable[[], Any], words: str) -> None:
    found = only_problem_of(make())
    assert "it keeps state between calls" in found
    assert words in found


def test_random_scores_are_found() -> None:
    found = only_problem_of(lambda inputs: [random.random() for _ in inputs])
    assert "it is not deterministic: the same group got" in found
    assert "random.Random(one.prompt_id)" in found
    own = random.Random(5)
    assert "it is not deterministic, or it keeps state" in only_problem_of(
        lambda inputs: [own.random() for _ in inputs]
    )
    check_reward(lambda inputs: [random.Random(repr(one.completion)).random() for one in inputs])


# not ready, cancelled, closed


class Hooked:
    """A good reward whose hooks may be bad."""

    def __init__(self, *, problem: str = "", swallows: bool = False) -> None:
        self._problem, self._swallows = problem, swallows
        self.num_closed = 0

    async def check(self) -> None:
        if self._problem:
            raise RewardUnavailable(self._problem)

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        try:
            await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            if not self._swallows:
                raise
            await asyncio.sleep(30)
        return [1.0 for _ in inputs]

    async def aclose(self) -> None:
        self.num_closed += 1
        if self.num_closed > 1:
            raise RuntimeError("closed already")


def test_a_reward_that_is_not_ready_is_not_asked() -> None:
    assert "it is not ready: nobody answers" in only_problem_of(Hooked(problem="nobody answers"))
    assert "it is not ready: there is no reward 'groundng' (did you mean 'grounding'?)" in only_problem_of("groundng")


def test_a_cancelled_call_that_goes_on_is_found() -> None:
    found = only_problem_of(Hooked(swallows=True))
    assert "a cancelled call has not ended within 1 s; let CancelledError pass" in found


def test_what_was_built_here_is_closed_twice_and_what_was_handed_in_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Hooked()
    check_reward(given)
    assert given.num_closed == 0
    module = tmp_path / "closed_twice.py"
    module.write_text(
        "class Mine:\n"
        "    closed = 0\n"
        "    async def score(self, inputs):\n        return [1.0 for _ in inputs]\n"
        "    async def aclose(self):\n"
        "        self.closed += 1\n"
        "        assert self.closed == 1, 'twice'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "the second aclose() raised AssertionError: twice" in only_problem_of("closed_twice:Mine")


def test_a_group_of_one_or_of_several_prompts_cannot_be_checked_with() -> None:
    one = default_group()[0]
    with pytest.raises(ValueError, match="two completions or more, all of one prompt_id"):
        check_reward(right, group=[one])
    with pytest.raises(ValueError, match="all of one prompt_id"):
        check_reward(right, group=[one, replace(one, prompt_id="other")])
