"""Rewards score while the engine samples on, and a missing verdict stays missing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from concurrent.futures import wait

import pytest

from grpo.errors import ConfigError
from grpo.objectives import Objective, WeightedReward
from grpo.scoring import Scorer, missing_objectives, reward_inputs, shortage, with_newer
from grpo.types import Completion, Message, Prompt, RolloutGroup, ScoredGroup, Verdict
from rewards.base import AnyReward
from rewards.errors import RewardUnavailable
from rewards.types import RewardInput, Score

SOON_S = 10.0
"""Longer than anything here takes; a test that waits this long has failed."""


def make_completion(text: str) -> Completion:
    ids = tuple(range(len(text.split())))
    return Completion(token_ids=ids, text=text, sampler_logprobs=(-1.0,) * len(ids), finish_reason="stop")


def make_group(*texts: str, name: str = "p0", objectives: tuple[str, ...] = ("a",)) -> RolloutGroup:
    prompt = Prompt(
        id=name,
        messages=(Message(role="system", content="Be brief."), Message(role="user", content="Who?")),
        objectives=objectives,
        reference="Anna",
        meta={"kind": "hard"},
    )
    return RolloutGroup(prompt=prompt, prompt_token_ids=(1, 2), completions=tuple(map(make_completion, texts)))


def make_objective(rewards: Mapping[str, AnyReward], *, name: str = "a", **weights: float) -> Objective:
    terms = [WeightedReward(name=n, weight=weights.get(n, 1.0), reward=reward) for n, reward in rewards.items()]
    return Objective(name=name, rewards=tuple(terms))


def make_scored(*values: float | None, name: str = "a", reason: str = "") -> ScoredGroup:
    verdicts = tuple({name: Verdict(value=value, parts={}, reason=reason)} for value in values)
    return ScoredGroup(rollout=make_group(*["x"] * len(values), objectives=(name,)), verdicts=verdicts)


async def number(inputs: list[RewardInput]) -> list[Score]:
    """The number that the completion writes."""
    return [Score(value=float(one.completion)) for one in inputs]


async def answered(inputs: list[RewardInput]) -> list[Score]:
    """1, and no verdict on a question mark."""
    return [Score(value=None, reason="timed out") if one.completion == "?" else Score(value=1.0) for one in inputs]


async def broken(inputs: list[RewardInput]) -> list[Score]:
    raise ValueError("no such key")


def score_once(objective: Objective, group: RolloutGroup) -> list[Verdict]:
    with Scorer([objective]) as scorer:
        scored = scorer.submit(group).result(timeout=SOON_S)
    assert scored.rollout is group
    return [row[objective.name] for row in scored.verdicts]


# --- what a reward is told


def test_a_reward_is_told_the_last_user_message_and_what_the_dataset_knows() -> None:
    (one,) = reward_inputs(make_group("by Anna"))
    assert one == RewardInput(
        prompt_id="p0",
        prompt="Who?",
        completion="by Anna",
        reference="Anna",
        num_tokens=2,
        finish_reason="stop",
        meta={"kind": "hard"},
        messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}),
        token_ids=(0, 1),
    )


# --- beside the sampling


class Held:
    """A reward that answers 1.0 for a prompt only once it is let go, or at once where it is not held."""

    def __init__(self, *held: str) -> None:
        self.started = {name: threading.Event() for name in held}
        self._let_go: dict[str, asyncio.Event] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        name = inputs[0].prompt_id
        if name in self.started:
            self._loop = asyncio.get_running_loop()
            self._let_go[name] = asyncio.Event()
            self.started[name].set()
            await self._let_go[name].wait()
        return [Score(value=1.0) for _ in inputs]

    def let_go(self, name: str) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._let_go[name].set)


def test_a_slow_reward_on_one_group_blocks_neither_submit_nor_the_next_groups() -> None:
    reward = Held("slow")
    with Scorer([make_objective({"r": reward})]) as scorer:
        slow = scorer.submit(make_group("x", name="slow"))
        assert reward.started["slow"].wait(SOON_S)  # it works already, before anything else is submitted
        quick = [scorer.submit(make_group("x", name=f"quick{n}")) for n in range(3)]
        assert wait(quick, timeout=SOON_S).not_done == set()
        assert not slow.done()
        reward.let_go("slow")
        assert slow.result(timeout=SOON_S).verdicts[0]["a"].value == 1.0


def test_a_plain_function_that_blocks_does_not_block_other_groups() -> None:
    started, let_go = threading.Event(), threading.Event()

    def blocking(inputs: list[RewardInput]) -> list[float]:
        if inputs[0].prompt_id == "slow":
            started.set()
            assert let_go.wait(SOON_S)
        return [0.5 for _ in inputs]

    with Scorer([make_objective({"r": blocking})]) as scorer:
        slow = scorer.submit(make_group("x", name="slow"))
        assert started.wait(SOON_S)
        assert scorer.submit(make_group("x", name="quick")).result(timeout=SOON_S).verdicts[0]["a"].value == 0.5
        assert not slow.done()
        let_go.set()
        assert slow.result(timeout=SOON_S).verdicts[0]["a"].value == 0.5


def test_rewards_of_one_group_run_side_by_side() -> None:
    meeting = threading.Barrier(2, timeout=SOON_S)  # passed only where both are inside at once

    def first(inputs: list[RewardInput]) -> list[float]:
        meeting.wait()
        return [1.0 for _ in inputs]

    def second(inputs: list[RewardInput]) -> list[float]:
        meeting.wait()
        return [2.0 for _ in inputs]

    (verdict,) = score_once(make_objective({"first": first, "second": second}), make_group("x"))
    assert verdict.value == 3.0


def test_a_scorer_works_inside_a_running_event_loop_as_in_a_notebook() -> None:
    async def cell() -> float | None:
        return score_once(make_objective({"r": number}), make_group("2"))[0].value

    assert asyncio.run(cell()) == 2.0


# --- values


def test_an_objectives_value_is_the_weighted_sum_of_its_rewards() -> None:
    async def length(inputs: list[RewardInput]) -> list[Score]:
        return [Score(value=-float(one.num_tokens), reason=f"{one.num_tokens} tokens") for one in inputs]

    objective = make_objective({"number": number, "length": length}, number=2.0, length=0.25)
    first, second = score_once(objective, make_group("3", "5"))
    assert first == Verdict(value=5.75, parts={"number": 3.0, "length": -1.0}, reason="length: 1 tokens")  # 2*3 - 0.25
    assert second.value == 9.75  # 2*5 - 0.25*1


def test_only_the_objectives_of_the_prompt_are_asked() -> None:
    objectives = [make_objective({"r": number}, name="a"), make_objective({"r": broken}, name="b")]
    with Scorer(objectives) as scorer:
        scored = scorer.submit(make_group("1", objectives=("a",))).result(timeout=SOON_S)
    assert [set(row) for row in scored.verdicts] == [{"a"}]


def test_a_missing_verdict_is_none_and_leaves_its_neighbours_alone() -> None:
    first, missing, last = score_once(make_objective({"judge": answered}), make_group("x", "?", "y"))
    assert (first.value, last.value) == (1.0, 1.0)
    assert missing == Verdict(value=None, parts={"judge": None}, reason="judge: timed out")


def test_one_missing_term_makes_the_whole_sum_missing() -> None:
    objective = make_objective({"judge": answered, "number": lambda inputs: [7.0 for _ in inputs]})
    (verdict,) = score_once(objective, make_group("?"))
    assert (verdict.value, verdict.parts) == (None, {"judge": None, "number": 7.0})


def test_a_missing_term_of_weight_zero_is_shown_and_does_not_count() -> None:
    objective = make_objective({"judge": answered, "number": lambda inputs: [7.0 for _ in inputs]}, judge=0.0)
    (verdict,) = score_once(objective, make_group("?"))
    assert (verdict.value, verdict.parts) == (7.0, {"judge": None, "number": 7.0})


def test_a_reward_that_raises_is_a_missing_verdict_with_its_cause_and_the_others_go_on() -> None:
    objective = make_objective({"broken": broken, "number": number}, broken=1.0)
    (verdict,) = score_once(objective, make_group("3"))
    assert verdict.parts == {"broken": None, "number": 3.0}
    assert (verdict.value, verdict.reason) == (None, "broken: ValueError: no such key")


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), True, "1.0"])
def test_what_is_no_finite_number_is_no_verdict(answer: object) -> None:
    (verdict,) = score_once(make_objective({"r": lambda inputs: [answer for _ in inputs]}), make_group("x"))
    assert verdict.value is None
    assert repr(answer) in verdict.reason or str(answer) in verdict.reason


def test_too_few_scores_for_a_group_are_no_verdict_for_any_of_it() -> None:
    verdicts = score_once(make_objective({"r": lambda inputs: [1.0]}), make_group("x", "y"))
    assert [verdict.value for verdict in verdicts] == [None, None]
    assert verdicts[0].reason == "r: the reward answered 1 scores for 2 completions"


# --- the scorer's life


class Watched:
    """Counts how often it was checked and closed."""

    def __init__(self, problem: Exception | None = None) -> None:
        self.num_checks, self.num_closes = 0, 0
        self._problem = problem

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        return [Score(value=1.0) for _ in inputs]

    async def check(self) -> None:
        self.num_checks += 1
        if self._problem:
            raise self._problem

    async def aclose(self) -> None:
        self.num_closes += 1


def test_closing_twice_closes_every_reward_once() -> None:
    first, second = Watched(), Watched()
    scorer = Scorer([make_objective({"r": first}, name="a"), make_objective({"r": second}, name="b")])
    scorer.close()
    scorer.close()
    assert (first.num_closes, second.num_closes) == (1, 1)


def test_no_thread_is_left_behind() -> None:
    with Scorer([make_objective({"r": number})]) as scorer:
        scorer.submit(make_group("1")).result(timeout=SOON_S)
    assert not [thread for thread in threading.enumerate() if thread.name == "grpo-scoring"]


def test_closing_gives_up_on_what_still_runs() -> None:
    reward = Held("slow")
    scorer = Scorer([make_objective({"r": reward})])
    pending = scorer.submit(make_group("x", name="slow"))
    assert reward.started["slow"].wait(SOON_S)
    scorer.close()
    assert pending.cancelled()


def test_check_asks_every_reward_and_a_judge_that_does_not_answer_is_bad_input() -> None:
    ready, unreachable = Watched(), Watched(RewardUnavailable("nobody answers at http://127.0.0.1:9/v1"))
    with (
        Scorer([make_objective({"ready": ready, "judge": unreachable})]) as scorer,
        pytest.raises(ConfigError, match=r"a reward is not ready: nobody answers at http://127\.0\.0\.1:9/v1"),
    ):
        scorer.check()
    assert (ready.num_checks, unreachable.num_checks) == (1, 1)


# --- too few verdicts


def test_fewer_verdicts_than_asked_for_are_a_shortage_and_the_cause_is_named() -> None:
    groups = [make_scored(1.0, None, reason="judge failed: timeout"), make_scored(None, None, reason="429, slow down")]
    assert shortage(groups, {"a": 0.25}) == ""  # 1 of 4: just enough
    assert shortage(groups, {"a": 0.26}) == (
        "objective a: 3 of 4 completions have no verdict, and min_valid_fraction = 0.26 asks for more. "
        "Last cause: 429, slow down"
    )


def test_verdicts_are_counted_for_each_objective_on_its_own() -> None:
    good, bad = make_scored(*[1.0] * 9, name="a"), make_scored(None, name="b", reason="gone")
    assert shortage([good, bad], {"a": 0.5, "b": 0.5}).startswith("objective b: 1 of 1 completions have no verdict")
    assert shortage([good, bad], {"a": 0.5, "b": 0.0}) == ""


def test_a_step_with_all_verdicts_passes_even_where_none_may_be_missing() -> None:
    assert shortage([make_scored(0.0, 0.0)], {"a": 1.0}) == ""  # a 0 is a verdict


def test_newer_verdicts_replace_a_groups_only_where_more_of_them_are_there() -> None:
    old = make_scored(0.1, None)
    assert missing_objectives(old) == ["a"]
    assert [row["a"].value for row in with_newer(old, make_scored(0.7, 0.8)).verdicts] == [0.7, 0.8]
    assert [row["a"].value for row in with_newer(old, make_scored(None, 0.8)).verdicts] == [0.1, None]
