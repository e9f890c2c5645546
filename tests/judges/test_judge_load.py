"""What the judge pool's benchmark measures with: the ideal schedule, and the server's log against the judgements."""

from __future__ import annotations

import asyncio

import pytest
from judge_load.schedule import ideal_s, ideal_under_s
from judge_load.work import Load, Run, audited, http_client, identity, judged, make_config, read_log, serving
from judge_pool import best_hidden, run_faults

from judges import Failed, Scored


def test_the_ideal_schedule_gives_each_job_to_the_slot_that_is_free_first() -> None:
    # two slots: 3 | 1, then 2 (from 1 to 3), then 1 (from 3 to 4)
    assert ideal_s([3.0, 1.0, 2.0, 1.0], slots=2) == 4.0
    assert ideal_s([3.0, 1.0, 2.0, 1.0], slots=1) == 7.0
    assert ideal_s([3.0, 1.0, 2.0, 1.0], slots=9) == 3.0
    assert ideal_s([], slots=2) == 0.0


def test_slots_that_come_later_are_used_from_then_on_and_running_jobs_outlive_a_cut() -> None:
    # one slot until 2, then two: 0-3, then 2-5 beside it, then 3-6
    assert ideal_under_s([3.0, 3.0, 3.0], limits=[(0.0, 1), (2.0, 2)]) == 6.0
    # two slots until 1, then one: 0-3 and 0-2; the third waits until one is left, at 2, and none, at 3
    assert ideal_under_s([3.0, 2.0, 3.0], limits=[(0.0, 2), (1.0, 1)]) == 6.0


def test_the_last_turns_judging_cannot_be_hidden() -> None:
    # four turns of 1 s, each judged for 1 s: judged from 1 s to 5 s, of which the last second is waited for
    assert best_hidden(1.0, 4) == pytest.approx(1 - 1 / 4)
    assert best_hidden(1.0, 8) == pytest.approx(1 - 1 / 8)
    assert best_hidden(0.5, 4) == pytest.approx(1 - 0.5 / 3.5)


def test_made_up_lost_and_twice_paid_verdicts_would_be_seen() -> None:
    load = Load(judgements=4, low_s=0.0, high_s=0.01)
    requests = load.requests()

    async def honest() -> tuple[Run, dict[str, list[str]]]:
        with serving(load) as url:
            config = make_config(url)
            return await judged(http_client(config), config, requests), read_log(url)

    run, log = asyncio.run(honest())
    assert {name: audited(requests, run, log)[name] for name in ("fake", "lost", "duplicated")} == {
        "fake": 0,
        "lost": 0,
        "duplicated": 0,
    }
    made_up, *rest = run.judgements
    assert isinstance(made_up, Scored)
    run.judgements[:] = [
        Scored(value=made_up.value / 2, raw="", usage=None, attempts=1),
        Failed(kind="timeout", attempts=1, fault="judge", detail=""),
        *rest[1:],
    ]
    log[identity(requests[2])] = ["500", "verdict", "verdict"]
    log[identity(requests[3])] = ["500"]
    found = audited(requests, run, log)
    assert (found["fake"], found["lost"], found["duplicated"], found["failed_all_tries"]) == (2, 1, 1, 0)


def test_one_call_in_ten_fails_and_nothing_is_made_up_lost_or_paid_twice() -> None:
    figures, complaints = run_faults(True)
    assert complaints == []
    for row in figures["rows"]:
        assert sum(row["faults"].values()) > 10
        assert row["scored"] + row["failed_all_tries"] == row["judgements"] == 200
