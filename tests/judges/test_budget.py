"""The budget: spend stays within its caps, whoever asks at once and however calls end."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges import (
    AuditLog,
    ChatReply,
    ChatRequest,
    EndpointConfig,
    Failed,
    JudgeConfig,
    JudgePool,
    JudgeRequest,
    JudgeUnavailable,
    Scored,
    Usage,
)
from judges.audit import AuditRecord, read_audit
from judges.budget import MoneyBudget, spent_according_to, spent_in_steps_according_to
from judges.clients.scripted import verdict_for
from judges.config import BudgetConfig, PriceConfig
from judges.errors import AuditFailed, BudgetExceeded
from judges.types import Verdict


def make_budget(*, per_run: float | None = None, per_step: float | None = None, **settings: Any) -> MoneyBudget:
    return MoneyBudget(BudgetConfig(per_run=per_run, per_step=per_step), judge="j", **settings)


def test_money_set_aside_counts_until_the_call_has_ended() -> None:
    budget = make_budget(per_run=1.0)
    first = budget.reserve(0.75)
    with pytest.raises(
        BudgetExceeded, match=r"per_run is reached: 0 spent, 0.75 set aside .* may cost 0.5; the cap is 1"
    ):
        budget.reserve(0.5)
    first.settle(0.5)
    budget.reserve(0.5).settle(0.5)  # to the cap exactly
    assert (budget.spent, budget.set_aside) == (1.0, 0.0)
    with pytest.raises(BudgetExceeded):
        budget.reserve(1e-9)


def test_a_call_whose_cost_nobody_knows_is_booked_with_its_upper_bound_and_flagged() -> None:
    budget = make_budget(per_run=1.0)
    budget.reserve(0.25).settle(None)
    budget.reserve(0.25).settle(0.125)
    booking = budget.take_booking()
    assert booking is not None
    assert (booking.amount, booking.estimated) == (0.375, 0.25)
    assert budget.take_booking() is None
    assert budget.spent == 0.375


def test_settling_twice_books_once() -> None:
    budget = make_budget(per_run=1.0)
    reservation = budget.reserve(0.5)
    reservation.settle(0.25)
    reservation.settle(None)
    assert (budget.spent, budget.set_aside) == (0.25, 0.0)


def test_the_cap_of_a_step_is_whole_again_in_the_next_and_the_runs_is_not() -> None:
    budget = make_budget(per_run=2.0, per_step=1.0)
    budget.reserve(0.5).settle(0.5)  # before the first step: the run's money alone
    budget.begin_step(1)
    budget.reserve(1.0).settle(1.0)
    budget.begin_step(1)  # asked again, the step is the same
    with pytest.raises(BudgetExceeded, match="per_step"):
        budget.reserve(0.25)
    budget.begin_step(2)
    budget.reserve(0.5).settle(0.5)
    with pytest.raises(BudgetExceeded, match="per_run"):
        budget.reserve(0.25)


def test_processes_that_share_a_cap_have_equal_parts_of_what_is_left() -> None:
    budget = make_budget(per_run=2.0, per_step=1.0, spent=1.0, num_processes=2)
    budget.reserve(0.5).settle(0.5)
    with pytest.raises(BudgetExceeded, match=r"the cap is 0.5, what is left of 2 for this process"):
        budget.reserve(0.01)


def test_a_step_that_was_cut_short_has_left_what_it_had_not_spent_and_the_next_its_whole_cap() -> None:
    budget = make_budget(per_step=1.0, spent=2.75, spent_in_step={6: 1.0, 7: 0.75})
    budget.begin_step(7)
    budget.reserve(0.25).settle(0.25)
    with pytest.raises(BudgetExceeded, match=r"per_step is reached: 0.25 spent, .*the cap is 0.25, what is left of 1"):
        budget.reserve(0.01)
    budget.begin_step(8)
    budget.reserve(1.0).settle(1.0)


def test_a_call_waits_for_those_in_flight_only_where_their_end_can_make_room() -> None:
    async def main() -> None:
        budget = make_budget(per_run=1.0, per_step=0.75)
        budget.begin_step(1)
        first = budget.reserve(0.5)
        await budget.wait_for_room(0.25)  # fits now
        await budget.wait_for_room(0.8)  # never will: reserve says so
        waits = [asyncio.create_task(budget.wait_for_room(0.5)) for _ in range(2)]
        await asyncio.sleep(0)
        waits[0].cancel()
        await asyncio.sleep(0)
        assert not waits[1].done()
        first.settle(0.125)
        await waits[1]
        budget.reserve(0.5).settle(0.5)
        last = asyncio.create_task(budget.wait_for_room(0.25))
        await asyncio.sleep(0)
        assert last.done()  # 0.625 of the step's 0.75 are spent: nothing in flight could change that

    asyncio.run(main())


def test_a_run_that_has_spent_more_than_a_lowered_cap_spends_nothing() -> None:
    with pytest.raises(BudgetExceeded):
        make_budget(per_run=1.0, spent=3.0).reserve(1e-9)


@given(
    calls=st.lists(st.tuples(st.floats(1e-9, 0.3), st.floats(0, 1), st.booleans(), st.booleans()), max_size=60),
    cap=st.floats(0.01, 2.0),
)
def test_no_order_of_calls_and_endings_spends_more_than_the_cap(
    calls: list[tuple[float, float, bool, bool]], cap: float
) -> None:
    budget = make_budget(per_run=cap)
    in_flight = []
    for upper_bound, share, is_known, ends_one_first in calls:
        if ends_one_first and in_flight:
            reservation, cost = in_flight.pop(0)
            reservation.settle(cost)
        try:
            in_flight.append((budget.reserve(upper_bound), upper_bound * share if is_known else None))
        except BudgetExceeded:
            continue
        assert budget.spent + budget.set_aside <= cap + 1e-12
    for reservation, cost in in_flight:
        reservation.settle(cost)
    assert budget.spent <= cap + 1e-12
    assert budget.set_aside == 0


class Billing:
    """A judge that counts 100 + 10 tokens a reply, fails and dawdles now and then, and knows what it bills."""

    def __init__(self, usage: Usage | None) -> None:
        self.billed = 0.0
        self.usage = usage
        self._random = random.Random(3)

    async def complete(self, request: ChatRequest) -> ChatReply:
        await asyncio.sleep(self._random.uniform(0.0, 0.005))
        if self._random.random() < 0.2:
            raise JudgeUnavailable("HTTP 503: busy", status=503)
        self.billed += PRICE.cost(prompt_tokens=100, completion_tokens=10)
        return ChatReply(text=verdict_for(request, 0.5), finish_reason="stop", usage=self.usage)

    async def aclose(self) -> None:
        return


PRICE = PriceConfig(input=10.0, output=100.0)  # 100 tokens read + 10 written: 0.001 + 0.001
ENDPOINT = EndpointConfig(url="http://127.0.0.1:9/v1", model="m", price=PRICE)


def make_config(*, concurrency: int = 16) -> JudgeConfig:
    return JudgeConfig(
        endpoints=(ENDPOINT,), rubric="fairness", max_tokens=20, backoff_s=0.001, concurrency=concurrency
    )


def make_requests(num: int) -> list[JudgeRequest]:
    return [
        JudgeRequest(id=f"p#{i}", question="Who?", completion=f"answer {i}", reference="Anna", criterion="fairness")
        for i in range(num)
    ]


def test_a_pool_at_its_cap_settles_what_is_in_flight_and_masks_the_rest(tmp_path: Path) -> None:
    client = Billing(Usage(prompt_tokens=100, completion_tokens=10))
    budget = make_budget(per_run=0.2)
    audit = AuditLog(tmp_path / "audit.jsonl", take_booking=budget.take_booking)
    pool = JudgePool(client=client, config=make_config(), budget=budget, audit=audit)
    judgements = asyncio.run(pool.judge(make_requests(200)))
    audit.close()
    scored = [one for one in judgements if isinstance(one, Scored)]
    failed = [one for one in judgements if isinstance(one, Failed)]
    assert {one.kind for one in failed} == {"budget"}
    assert {one.fault for one in failed} == {"judge"}
    assert client.billed <= 0.2
    assert len(scored) == round(client.billed / 0.002)
    assert budget.spent == pytest.approx(client.billed)
    assert budget.set_aside == 0
    # what is left is less than a call's upper bound: a byte of the prompt is a token at most, and 20 more are written
    assert 0.2 - budget.spent < PRICE.cost(prompt_tokens=2000, completion_tokens=20)
    assert spent_according_to(read_audit(audit.path), judge="j") == pytest.approx(client.billed)


@pytest.mark.parametrize(
    "usage",
    [None, Usage(prompt_tokens=-5, completion_tokens=10), Usage(prompt_tokens=10**9, completion_tokens=10)],
    ids=["missing", "negative", "absurd"],
)
def test_usage_that_cannot_be_believed_leaves_the_estimate_standing(usage: Usage | None) -> None:
    budget = make_budget(per_run=10.0)
    pool = JudgePool(client=Billing(usage), config=make_config(), budget=budget)
    (judgement,) = asyncio.run(pool.judge(make_requests(1)))
    assert isinstance(judgement, Scored)
    booking = budget.take_booking()
    assert booking is not None
    assert booking.amount == booking.estimated > 0.002
    assert pool.stats().lanes[0].unbelievable_usage == (0 if usage is None else 1)


def test_a_resumed_run_knows_what_was_spent_and_by_whom(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for amount, judge in ((0.5, "j"), (0.25, "other"), (0.125, "j")):
        budget = MoneyBudget(BudgetConfig(per_run=1.0), judge=judge)
        audit = AuditLog(path, take_booking=budget.take_booking)
        budget.reserve(1.0).settle(amount)
        asyncio.run(audit.append(RECORD))
        audit.close()
    with path.open("a") as file:
        file.write('{"booking": {"jud')  # torn by a crash
    assert spent_according_to(read_audit(path), judge="j") == 0.625


def test_a_resumed_run_knows_how_much_of_it_was_for_which_step(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for step, amount in ((None, 0.5), (1, 0.25), (2, 0.125), (1, 1.0)):
        budget = make_budget(per_run=9.0)
        audit = AuditLog(path, take_booking=budget.take_booking)
        audit.step = step
        budget.reserve(1.0).settle(amount)
        audit.append_booking()
    assert spent_in_steps_according_to(read_audit(path), judge="j") == {1: 1.25, 2: 0.125}
    assert spent_in_steps_according_to(read_audit(path), judge="another") == {}


def test_a_calls_money_is_in_the_audit_before_its_verdict_is_kept_anywhere(tmp_path: Path) -> None:
    """Where the process is killed in between, the resumed run has paid for what it has, once."""
    budget = make_budget(per_run=1.0)
    audit = AuditLog(tmp_path / "audit.jsonl", take_booking=budget.take_booking)
    booked_at: list[float] = []

    class Kept:
        async def get(self, key: str) -> Verdict | None:
            return None

        async def put(self, key: str, verdict: Verdict) -> None:
            booked_at.append(spent_according_to(read_audit(audit.path), judge="j"))

    client = Billing(Usage(prompt_tokens=100, completion_tokens=10))
    pool = JudgePool(client=client, config=make_config(concurrency=1), budget=budget, audit=audit, cache=Kept())
    asyncio.run(pool.judge(make_requests(3)))
    assert booked_at == pytest.approx([0.002, 0.004, 0.006])  # each call as it ends, the failed ones at 0
    audit.close()
    assert spent_according_to(read_audit(audit.path), judge="j") == pytest.approx(client.billed)


def test_what_could_not_be_booked_is_booked_by_the_next_line(tmp_path: Path) -> None:
    budget = make_budget(per_run=1.0)
    (tmp_path / "run").write_text("in the way of the folder")
    audit = AuditLog(tmp_path / "run" / "audit.jsonl", take_booking=budget.take_booking)
    budget.reserve(0.5).settle(0.5)
    with pytest.raises(AuditFailed, match="bytes were to be written"):
        audit.append_booking()
    (tmp_path / "run").unlink()
    budget.reserve(0.25).settle(0.25)
    asyncio.run(audit.append(RECORD))
    audit.close()
    assert spent_according_to(read_audit(audit.path), judge="j") == 0.75


RECORD = AuditRecord(
    id="a",
    criterion="fairness",
    prompt_sha256=None,
    raw=None,
    outcome="budget",
    value=None,
    detail="",
    attempts=0,
    usage=None,
    latency_s=0.0,
    time_s=0.0,
)
