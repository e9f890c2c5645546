"""The steps since the last checkpoint as they were sampled and judged, so that a resumed run buys nothing twice.

Groups, scores and judges' verdicts go in as they come; on resume they come out, and neither engine nor judge is asked
for them. One file of JSON lines per step and rank, `journal/step-N.rank-R.jsonl`, each line with a hash of its own:

    group     a prompt and its completions with tokens and log-probabilities, written before they are scored
    verdict   one judge's valid reply, written and synced before anybody uses it (what a judge is asked again is
              answered from here, in the run that wrote it too)
    scores    what one reward said about one group
    sealed    all groups and verdicts that the step learns from, and what judges were asked; rank 0's file only. It is
              on the disk, and so is all before it on every rank, before the optimizer sees the step

A step that is sealed is replayed from its file alone. One that is not keeps its groups, its verdicts and its complete
scores; only what is missing is asked for again: what had no verdict, and the calls that were in flight at the kill.
Files stay as long as a checkpoint from which their step would be run again.

What a step is doing is told by `grpo.phases`, not by this file; but its records prove how far it came.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grpo.durable_files import LineFile, fsync_file, fsync_folder, make_folder, storage_errors
from grpo.errors import StorageError
from grpo.types import Completion, Message, Prompt, RolloutGroup, ScoredGroup
from grpo.types import Verdict as GroupVerdict
from judges.types import Usage, Verdict
from rewards.types import Score

_HASH = b'{"blake2b": "'
_RECORD = b'", "record": '
_STEP_FILE = re.compile(r"(?:step|eval)-(\d+)\.rank-\d+\.jsonl")  # an evaluation after a step, but not before


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedStep:
    """All that a step learns from."""

    groups: tuple[ScoredGroup, ...]
    """[P], of all ranks."""
    discarded: tuple[ScoredGroup, ...]
    """Groups that dynamic sampling replaced."""
    judge_figures: Mapping[str, float]
    """Metric name -> what judges did in the step."""


class Journal:
    """One rank's part of the journal; it reads the others' too. Also a `judges.seams.VerdictCache`.

    `open_chapter("step-7")`, then add and ask; `seal` on rank 0; `forget_through(step)` on rank 0. Threads may add.
    A disk that refuses a record stops the run at the next `check`, which is before anything is learned.
    """

    def __init__(self, folder: Path, *, rank: int, audit_path: Path | None = None) -> None:
        """Touch nothing.

        Args: audit_path: synced before a step is sealed, so that no judgement is kept unaudited; and before a verdict
            is, so that none outlives a crash without its price.
        """
        self.folder = folder
        self._rank, self._audit_path = rank, audit_path
        self._is_audit_named = False  # whether its name is on the disk
        self._chapter = ""
        self._file: LineFile | None = None
        self._writing, self._syncing = threading.Lock(), threading.Lock()
        self._num_written = self._num_synced = 0
        self._failure: StorageError | None = None
        self._kept = _Kept()

    def open_chapter(self, name: str) -> list[str]:
        """Go over to a step, or an evaluation, and read what is kept of it.

        Returns:
            What cannot be read, one line each: the records are as if they had not been written.
        """
        self.close()
        self._chapter, self._kept = name, _Kept()
        for path in sorted(self.folder.glob(f"{name}.rank-*.jsonl")):
            self._kept.read(path)
        return self._kept.problems

    def close(self) -> None:
        """Close the file; the next record opens it again."""
        with self._syncing, self._writing:  # a late verdict's sync may be under way
            file, self._file = self._file, None
            if file is not None:
                file.close()

    # Groups and scores.

    @property
    def groups(self) -> Mapping[str, RolloutGroup]:
        """Prompt's id -> its group, of the open chapter."""
        return self._kept.groups

    def add_group(self, group: RolloutGroup) -> None:
        """Keep a group; before its scores are asked for. Raises StorageError."""
        self._kept.groups[group.prompt.id] = group
        self._write(_group_record(group))
        self.check()

    def scores(self, group: RolloutGroup, *, objective: str, reward: str) -> list[Score] | None:
        """What the reward has said about these very completions; None where some have no value, or it was not asked."""
        found = self._kept.scores.get((group.prompt.id, objective, reward))
        if found is None or found[0] != _digest_of(group):
            return None
        return None if any(score.value is None for score in found[1]) else list(found[1])

    def add_scores(self, group: RolloutGroup, scores: Sequence[Score], *, objective: str, reward: str) -> None:
        """Keep what a reward said about a group."""
        digest = _digest_of(group)
        self._kept.scores[group.prompt.id, objective, reward] = digest, tuple(scores)
        self._try_to_write(
            {
                "kind": "scores",
                "prompt": group.prompt.id,
                "group": digest,
                "objective": objective,
                "reward": reward,
                "scores": [asdict(score) for score in scores],
            }
        )

    # Verdicts: a cache for judges' pools.

    async def get(self, key: str) -> Verdict | None:
        """The verdict that was received for this question in the open chapter."""
        return self._kept.verdicts.get(key)

    async def put(self, key: str, verdict: Verdict) -> None:
        """Keep a verdict; returns once it is on the disk, or is known to find no place there."""
        self._kept.verdicts[key] = verdict
        # in this thread: a kill between the reply and the write loses the verdict, and the kernel takes it in
        # microseconds; it is the sync that has to be waited for
        self._try_to_write({"kind": "verdict", "key": key, "verdict": asdict(verdict)})
        await asyncio.to_thread(self._try_to_sync)

    def bought_before(self) -> dict[str, float | None]:
        """Key -> cost of the verdicts that earlier, killed processes received for the open chapter, on all ranks."""
        return dict(self._kept.bought_before)

    # The end of a step's collection.

    def check(self) -> None:
        """Raises StorageError where a record could not be written."""
        if self._failure is not None:
            raise self._failure

    def sync(self) -> None:
        """Wait until the audit and all records of this rank are on the disk. Raises StorageError."""
        self.check()
        self._sync_audit()
        self._sync()

    def seal(
        self, groups: Sequence[ScoredGroup], discarded: Sequence[ScoredGroup], judge_figures: Mapping[str, float]
    ) -> None:
        """Write down what the step learns from; it is on the disk on return. Rank 0, when every rank has synced.

        Raises:
            StorageError: it could not be written.
        """
        self._write(
            {
                "kind": "sealed",
                "groups": [_sealed_entry(group) for group in groups],
                "discarded": [_sealed_entry(group) for group in discarded],
                "judge_figures": dict(judge_figures),
            }
        )
        self._sync()

    def sealed(self) -> SealedStep | None:
        """The open chapter as it was sealed; None where it was not, or where a group's record is damaged."""
        found = self._kept.sealed
        if found is None:
            return None
        try:
            groups, discarded = (
                tuple(_scored_from(entry, self._kept.groups) for entry in found[part])
                for part in ("groups", "discarded")
            )
        except KeyError:
            return None
        return SealedStep(groups=groups, discarded=discarded, judge_figures=found["judge_figures"])

    def forget(self, chapter: str) -> None:
        """Delete a chapter's files, of all ranks. Raises StorageError."""
        self._delete(list(self.folder.glob(f"{chapter}.rank-*.jsonl")))

    def forget_through(self, step: int) -> None:
        """Delete the files of all steps up to this one, and of evaluations after them, of all ranks. Raises
        StorageError."""
        files = [(path, _STEP_FILE.fullmatch(path.name)) for path in self.folder.glob("*.jsonl")]
        self._delete([path for path, match in files if match and int(match[1]) <= step])

    def _delete(self, paths: Sequence[Path]) -> None:
        with storage_errors(self.folder):
            for path in paths:
                path.unlink()
            if paths:
                fsync_folder(self.folder)

    # Writing.

    def _write(self, record: Mapping[str, Any]) -> None:
        line = _line_of(record)
        with self._writing:
            if self._file is None:
                with storage_errors(self.folder, needed_bytes=len(line)):
                    make_folder(self.folder)
                path = self.folder / f"{self._chapter}.rank-{self._rank}.jsonl"
                self._file = LineFile(path, needed_bytes=len(line))
            self._file.append([line])
            self._num_written += 1

    def _try_to_write(self, record: Mapping[str, Any]) -> None:
        try:
            self._write(record)
        except StorageError as exc:
            self._failure = self._failure or exc

    def _try_to_sync(self) -> None:
        try:
            self._sync()
        except StorageError as exc:
            self._failure = self._failure or exc

    def _sync(self) -> None:
        """Those who come while one syncs wait for it, and mostly find that the next sync was theirs too."""
        wanted = self._num_written
        with self._syncing:
            if self._num_synced >= wanted:
                return
            with self._writing:
                file, written = self._file, self._num_written
            if file is not None:
                self._sync_audit()
                file.sync()
            self._num_synced = written

    def _sync_audit(self) -> None:
        if self._audit_path is not None and self._audit_path.exists():
            with storage_errors(self._audit_path):
                fsync_file(self._audit_path)
                if not self._is_audit_named:
                    fsync_folder(self._audit_path.parent)
                    self._is_audit_named = True


class _Kept:
    """What the files of a chapter hold."""

    def __init__(self) -> None:
        self.groups: dict[str, RolloutGroup] = {}
        self.scores: dict[tuple[str, str, str], tuple[str, tuple[Score, ...]]] = {}
        self.verdicts: dict[str, Verdict] = {}
        self.bought_before: dict[str, float | None] = {}
        """Key -> cost of the verdicts that another process received."""
        self.sealed: Mapping[str, Any] | None = None
        self.problems: list[str] = []

    def read(self, path: Path) -> None:
        """Take in a file's records; of equal ones the last."""
        with storage_errors(path):
            content = path.read_bytes()
        *lines, _ = content.split(b"\n")  # behind the last newline: nothing, or a line that a kill has torn
        for number, line in enumerate(lines, start=1):
            try:
                self._take(_record_of(line))
            except (ValueError, KeyError, TypeError) as exc:
                self.problems.append(
                    f"{path}, line {number} is damaged ({exc}): what it held is sampled or asked for again"
                )

    def _take(self, record: Mapping[str, Any]) -> None:
        match record["kind"]:
            case "group":
                group = _group_from(record)
                self.groups[group.prompt.id] = group
            case "scores":
                scores = tuple(Score(value=one["value"], reason=one["reason"]) for one in record["scores"])
                self.scores[record["prompt"], record["objective"], record["reward"]] = record["group"], scores
            case "verdict":
                verdict = _verdict_from(record["verdict"])
                self.verdicts[record["key"]] = verdict
                self.bought_before[record["key"]] = verdict.cost
            case "sealed":
                self.sealed = record
            case kind:
                raise ValueError(f"a record of kind {kind!r}")


def _line_of(record: Mapping[str, Any]) -> bytes:
    body = json.dumps(record).encode()
    return _HASH + _hash_of(body) + _RECORD + body + b"}"


def _record_of(line: bytes) -> Mapping[str, Any]:
    """Raises ValueError for a line that is not as it was written."""
    start = len(_HASH) + len(_hash_of(b"")) + len(_RECORD)
    body = line[start:-1]
    if line != _HASH + _hash_of(body) + _RECORD + body + b"}":
        raise ValueError("its hash is another")
    return json.loads(body)


def _hash_of(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).hexdigest().encode()


def _digest_of(group: RolloutGroup) -> str:
    """Of what was sampled: scores belong to these completions and no others."""
    sampled = [(completion.token_ids, completion.text) for completion in group.completions]
    return hashlib.blake2b(json.dumps(sampled).encode(), digest_size=16).hexdigest()


def _group_record(group: RolloutGroup) -> dict[str, Any]:
    # not asdict, which would copy every token and log-probability one by one
    prompt = group.prompt
    return {
        "kind": "group",
        "prompt": {
            "id": prompt.id,
            "messages": [asdict(message) for message in prompt.messages],
            "objectives": prompt.objectives,
            "reference": prompt.reference,
            "meta": dict(prompt.meta),
            "images": prompt.images,
        },
        "prompt_token_ids": group.prompt_token_ids,
        "image_digest": group.image_digest,
        "completions": [
            {
                "token_ids": one.token_ids,
                "text": one.text,
                "sampler_logprobs": one.sampler_logprobs,
                "finish_reason": one.finish_reason,
            }
            for one in group.completions
        ],
    }


def _group_from(record: Mapping[str, Any]) -> RolloutGroup:
    prompt = record["prompt"]
    return RolloutGroup(
        prompt=Prompt(
            id=prompt["id"],
            messages=tuple(Message(**message) for message in prompt["messages"]),
            objectives=tuple(prompt["objectives"]),
            reference=prompt["reference"],
            meta=prompt["meta"],
            images=tuple(prompt.get("images", ())),
        ),
        prompt_token_ids=tuple(record["prompt_token_ids"]),
        image_digest=record.get("image_digest"),
        completions=tuple(
            Completion(
                token_ids=tuple(one["token_ids"]),
                text=one["text"],
                sampler_logprobs=tuple(one["sampler_logprobs"]),
                finish_reason=one["finish_reason"],
            )
            for one in record["completions"]
        ),
    )


def _verdict_from(content: Mapping[str, Any]) -> Verdict:
    usage = content["usage"]
    return Verdict(
        scores=tuple(content["scores"]),
        raws=tuple(content["raws"]),
        endpoint=content["endpoint"],
        usage=None if usage is None else Usage(**usage),
        cost=content["cost"],
    )


def _sealed_entry(group: ScoredGroup) -> dict[str, Any]:
    return {
        "prompt": group.rollout.prompt.id,
        "verdicts": [{name: asdict(verdict) for name, verdict in row.items()} for row in group.verdicts],
    }


def _scored_from(entry: Mapping[str, Any], groups: Mapping[str, RolloutGroup]) -> ScoredGroup:
    """Raises KeyError where the group is not there."""
    return ScoredGroup(
        rollout=groups[entry["prompt"]],
        verdicts=tuple({name: GroupVerdict(**one) for name, one in row.items()} for row in entry["verdicts"]),
    )
