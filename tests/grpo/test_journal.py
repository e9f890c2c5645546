"""What was sampled and judged is on the disk before it is used, and comes back as it was; what is damaged is told."""

from __future__ import annotations

import asyncio
import json
import resource
from pathlib import Path

import pytest

from grpo.errors import StorageError
from grpo.journal import Journal
from grpo.types import Completion, Message, Prompt, RolloutGroup, ScoredGroup
from grpo.types import Verdict as GroupVerdict
from judges.types import Usage, Verdict
from rewards.types import Score


def make_group(name: str = "p0", *, text: str = "an answer") -> RolloutGroup:
    """With log-probabilities whose shortest decimal forms are long, and letters that JSON escapes."""
    prompt = Prompt(
        id=name,
        messages=(Message(role="system", content="Be\u2028brief."), Message(role="user", content="Wie groß?")),
        objectives=("short", "long"),
        reference="1.80",
        meta={"kind": "size", "choices": ["a", "b"], "weight": 0.1},
        images=("/data/tall.png", "/data/größe.png"),
    )
    completions = tuple(
        Completion(
            token_ids=(5, 6 + row),
            text=f"{text} {row}",
            sampler_logprobs=(-0.1 - 1e-17, -1.2345678901234567 / (row + 1)),
            finish_reason="stop" if row else "length",
        )
        for row in range(2)
    )
    return RolloutGroup(prompt=prompt, prompt_token_ids=(1, 2, 3), completions=completions, image_digest="0f3a")


def make_scored(group: RolloutGroup, value: float | None = 1 / 3) -> ScoredGroup:
    verdict = GroupVerdict(value=value, parts={"length": value}, reason="length: 7 of 9")
    return ScoredGroup(rollout=group, verdicts=({"short": verdict}, {"long": verdict, "short": verdict}))


def make_verdict(cost: float | None = 0.25) -> Verdict:
    usage = Usage(prompt_tokens=7, completion_tokens=2)
    return Verdict(scores=(0.7, None), raws=("good", "?"), endpoint="a judge", usage=usage, cost=cost)


def open_journal(folder: Path, chapter: str = "step-3", *, rank: int = 0) -> Journal:
    journal = Journal(folder, rank=rank)
    assert journal.open_chapter(chapter) == []
    return journal


def kept_by_another(folder: Path, *, rank: int = 0) -> Journal:
    """A process that comes after one that was killed: nobody closed anything."""
    return open_journal(folder, rank=rank)


# --- what comes back


def test_a_sealed_step_comes_back_equal_to_the_last_bit(tmp_path: Path) -> None:
    groups = [make_group("p0"), make_group("p1"), make_group("p2")]
    journal = open_journal(tmp_path)
    for group in groups:
        journal.add_group(group)
    scored = [make_scored(groups[1]), make_scored(groups[0], None)]
    journal.seal(scored, [make_scored(groups[2])], {"judge/calls": 4.0})
    sealed = kept_by_another(tmp_path).sealed()
    assert sealed is not None
    assert sealed.groups == tuple(scored)
    assert sealed.discarded == (make_scored(groups[2]),)
    assert sealed.judge_figures == {"judge/calls": 4.0}


def test_groups_of_all_ranks_come_back_on_every_rank(tmp_path: Path) -> None:
    for rank in (0, 1):
        open_journal(tmp_path, rank=rank).add_group(make_group(f"p{rank}"))
    for rank in (0, 1, 2):
        assert kept_by_another(tmp_path, rank=rank).groups == {"p0": make_group("p0"), "p1": make_group("p1")}


def test_scores_come_back_for_the_completions_that_they_were_given_to_and_no_others(tmp_path: Path) -> None:
    scores = [Score(value=0.1, reason="so"), Score(value=0.2)]
    open_journal(tmp_path).add_scores(make_group(), scores, objective="short", reward="length")
    kept = kept_by_another(tmp_path)
    assert kept.scores(make_group(), objective="short", reward="length") == scores
    assert kept.scores(make_group(), objective="long", reward="length") is None
    assert kept.scores(make_group("p1"), objective="short", reward="length") is None
    assert kept.scores(make_group(text="another"), objective="short", reward="length") is None


def test_scores_of_which_one_is_missing_are_asked_for_again_and_the_newer_ones_stay(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    half = [Score(value=0.1), Score(value=None, reason="the judge was down")]
    journal.add_scores(make_group(), half, objective="short", reward="judge")
    for kept in (journal, kept_by_another(tmp_path)):
        assert kept.scores(make_group(), objective="short", reward="judge") is None
    whole = [Score(value=0.1), Score(value=0.2)]
    journal.add_scores(make_group(), whole, objective="short", reward="judge")
    assert kept_by_another(tmp_path).scores(make_group(), objective="short", reward="judge") == whole


def test_a_verdict_is_in_the_file_when_put_returns_and_answers_the_same_question_only(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    asyncio.run(journal.put("key", make_verdict()))
    kept = kept_by_another(tmp_path)
    assert asyncio.run(kept.get("key")) == make_verdict()
    assert asyncio.run(kept.get("other")) is None
    assert asyncio.run(journal.get("key")) == make_verdict()  # in the same process too
    assert (journal.bought_before(), kept.bought_before()) == ({}, {"key": 0.25})


def test_many_verdicts_at_once_are_all_kept(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)

    async def put_all() -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(200):
                tasks.create_task(journal.put(str(number), make_verdict(float(number))))

    asyncio.run(put_all())
    assert kept_by_another(tmp_path).bought_before() == {str(number): float(number) for number in range(200)}


def test_steps_have_files_of_their_own_and_nothing_is_written_for_one_without_records(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    journal = open_journal(folder, "step-1")
    assert not folder.exists()
    journal.add_group(make_group())
    journal.open_chapter("step-2")
    assert journal.groups == {}
    journal.open_chapter("step-12")
    journal.add_group(make_group("p1"))
    assert sorted(path.name for path in folder.iterdir()) == ["step-1.rank-0.jsonl", "step-12.rank-0.jsonl"]


def test_what_a_checkpoint_holds_is_forgotten_of_all_ranks_by_number(tmp_path: Path) -> None:
    for chapter in ("step-2", "step-9", "step-10", "eval-after"):
        for rank in (0, 1):
            open_journal(tmp_path, chapter, rank=rank).add_group(make_group())
    journal = open_journal(tmp_path)
    journal.forget_through(9)
    journal.forget("eval-after")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10.rank-0.jsonl", "step-10.rank-1.jsonl"]


# --- damage


def written(folder: Path) -> Path:
    journal = open_journal(folder)
    journal.add_group(make_group("p0"))
    journal.add_group(make_group("p1"))
    journal.seal([make_scored(make_group("p0")), make_scored(make_group("p1"))], [], {})
    (path,) = folder.iterdir()
    return path


def test_a_line_that_a_kill_has_torn_is_as_if_it_had_not_been_written(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        journal = kept_by_another(tmp_path)  # no damage is told
        assert len(journal.groups) == sum(end <= cut for end in ends[:2])
        assert journal.sealed() is None
    kept_by_another(tmp_path).add_group(make_group("p9"))  # behind the torn line, which is cut
    assert "p9" in kept_by_another(tmp_path).groups


def test_a_flipped_bit_in_any_line_is_found_told_by_its_number_and_only_that_record_is_lost(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 11):
        if whole[place] == ord("\n"):
            continue
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(bytes(damaged))
        number = whole[:place].count(b"\n") + 1
        journal = Journal(tmp_path, rank=0)
        problems = journal.open_chapter("step-3")
        assert problems[0].startswith(f"{path}, line {number} is damaged")
        assert journal.sealed() is None  # a group is missing, or the seal
        assert len(journal.groups) == (2 if number == 3 else 1)


def test_every_line_is_json_that_a_person_can_read(tmp_path: Path) -> None:
    records = [json.loads(line)["record"] for line in written(tmp_path).read_text().splitlines()]
    assert [record["kind"] for record in records] == ["group", "group", "sealed"]
    assert records[0]["completions"][0]["text"] == "an answer 0"


# --- a disk that refuses


def test_a_full_disk_stops_the_run_before_anything_is_learned_but_spoils_no_verdict(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.add_group(make_group())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = next(tmp_path.iterdir()).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
    try:
        asyncio.run(journal.put("key", make_verdict()))  # the pool has its verdict all the same
        with pytest.raises(StorageError, match=r"step-3\.rank-0\.jsonl cannot be written.* bytes were to be written"):
            journal.sync()
        with pytest.raises(StorageError):
            journal.add_group(make_group("p1"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert kept_by_another(tmp_path).groups == {"p0": make_group()}  # and no half line
