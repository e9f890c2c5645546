"""A machine that stops: what the journal and the audit hold of a step, though whatever was not synced is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

from builders import make_group
from kill_harness.file_operations import CrashDisk, watched

from grpo.journal import Journal
from judges.audit import AuditLog, read_audit
from judges.budget import MoneyBudget, spent_according_to
from judges.config import BudgetConfig
from judges.types import Verdict


def test_what_was_sealed_in_the_journal_and_every_verdict_that_was_put_survive_a_crash_right_behind(
    tmp_path: Path,
) -> None:
    root = tmp_path / "disk"
    (root / "run").mkdir(parents=True)
    disk, group = CrashDisk(root), make_group([{"a": 1.0}, {"a": 0.0}], seed=1)
    verdict = Verdict(scores=(0.5,), raws=("half",), endpoint="here", usage=None, cost=0.25)

    def after_a_crash(name: str) -> Journal:
        disk.leave(tmp_path / name, names="synced", contents="synced")
        journal = Journal(tmp_path / name / "run" / "journal", rank=0)
        assert journal.open_chapter("step-1") == []
        return journal

    with watched(root.resolve(), disk.around):
        journal = Journal(root / "run" / "journal", rank=0)
        journal.open_chapter("step-1")
        journal.add_group(group.rollout)
        asyncio.run(journal.put("question", verdict))
        left = after_a_crash("after-the-verdict")
        assert asyncio.run(left.get("question")) == verdict
        assert left.sealed() is None
        journal.sync()
        journal.seal([group], [], {"judge/calls": 1.0})
        sealed = after_a_crash("after-the-seal").sealed()
        journal.close()
    assert sealed is not None
    assert sealed.groups == (group,)
    assert sealed.judge_figures == {"judge/calls": 1.0}


def test_a_verdict_that_survives_a_crash_has_its_price_in_the_audit(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    (root / "run").mkdir(parents=True)
    disk, budget = CrashDisk(root), MoneyBudget(BudgetConfig(per_run=1.0), judge="j")
    verdict = Verdict(scores=(0.5,), raws=("half",), endpoint="here", usage=None, cost=0.25)
    with watched(root.resolve(), disk.around):
        audit = AuditLog(root / "run" / "judge_audit.jsonl", take_booking=budget.take_booking)
        journal = Journal(root / "run" / "journal", rank=0, audit_path=audit.path)
        journal.open_chapter("step-1")
        for number in range(3):
            budget.reserve(0.5).settle(0.25)
            audit.append_booking()
            asyncio.run(journal.put(f"question {number}", verdict))
            left = tmp_path / f"left-{number}"
            disk.leave(left, names="synced", contents="synced")
            kept = Journal(left / "run" / "journal", rank=0)
            assert kept.open_chapter("step-1") == []
            assert len(kept.bought_before()) == number + 1
            assert spent_according_to(read_audit(left / "run" / audit.path.name), judge="j") == 0.25 * (number + 1)
        journal.close()
    audit.close()
