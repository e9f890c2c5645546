"""What lies on the disk: against another run's, against the phase that a kill met, against the judge's own account."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kill_harness.counting_judge import Asked

from grpo.checkpoint import latest_checkpoint
from judges.audit import read_audit
from judges.budget import spent_according_to

_NONCE = re.compile(r'"nonce": "([0-9a-f]+)"')


def differences(expected: Path, found: Path) -> list[str]:
    """Between two finished runs: weights, optimizer, state, metrics (times aside), completions, evaluation.

    What is another in any two runs, disturbed or not, is left out: times, memory, and the random nonce in a judge's
    reply. What judges were asked is counted by the judge itself.
    """
    ours, theirs = (_computed(run_dir) for run_dir in (found, expected))
    lines = [f"{name} is in one of them only" for name in sorted(ours.keys() ^ theirs.keys())]
    return lines + [f"{name} differs" for name in sorted(ours.keys() & theirs.keys()) if ours[name] != theirs[name]]


def _computed(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    newest = latest_checkpoint(run_dir).folder
    for path in sorted(file for file in newest.rglob("*") if file.is_file()):
        found[str(path.relative_to(run_dir))] = path.read_bytes()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found["steps of metrics.jsonl"] = [row["step"] for row in rows]
    for row in rows:
        for name, value in row.items():
            if not name.startswith(("time/", "memory/", "judge/")):
                found[f"metrics step {row['step']} {name}"] = value
    for name in ("completions.jsonl", "evaluations.jsonl", "eval.json"):
        if (run_dir / name).exists():
            found[name] = _NONCE.sub("", _unescaped(run_dir / name))
    return found


def _unescaped(path: Path) -> str:
    return path.read_text().replace('\\"', '"')


def evidence(run_dir: Path, phase: str) -> tuple[str, str]:
    """What the disk shows after a kill in a phase: (what proves it, what contradicts it)."""
    metrics = run_dir / "metrics.jsonl"
    written = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    chapters = {int(path.name.split(".")[0].removeprefix("step-")): path for path in run_dir.glob("journal/step-*")}
    current = chapters.get(written + 1)
    kinds = Counter(re.findall(rb'"record": {"kind": "(\w+)"', current.read_bytes())) if current else Counter[bytes]()
    is_sealed = kinds[b"sealed"] > 0
    proof = f"{written} lines of metrics; journal of step {written + 1}: " + (
        ", ".join(f"{count} {kind.decode()}" for kind, count in sorted(kinds.items())) or "nothing"
    )
    folders = sorted(path.name for path in run_dir.glob("checkpoints/*") if path.is_dir())
    manifests = sorted(path.parent.name for path in run_dir.glob("checkpoints/*/manifest.json"))
    proof += f"; checkpoints {folders}, with a manifest {manifests}"
    newest = max((int(name.removeprefix("step-")) for name in manifests if not name.startswith(".")), default=0)
    wrong = ""
    match phase:
        case "rollout" | "judging" if is_sealed:
            wrong = "the step is sealed already"
        case "judging" | "journal" if not kinds[b"group"] and current is not None:
            wrong = "no group is in the journal"
        case "backward" | "optimizer" if not is_sealed:
            wrong = "the step is not sealed in the journal, but the optimizer is at work"
        case "rename" if not any(name.startswith(".") for name in manifests) and newest < written:
            wrong = "no whole folder lies there under its temporary name, nor under its last one"
        case "rotation" if newest < written:
            wrong = "older checkpoints are being deleted, but the newest is not there under its name"
    return proof, wrong


def unaudited(run_dir: Path, asked: Sequence[Asked], undisturbed: Counter[str]) -> list[str]:
    """Questions whose answers a finished run's audit does not hold, though the judge has been asked.

    A question that was in flight at a kill is asked again: the audit must hold the last answer, which is the one that
    was used, and as many different ones as the undisturbed run has asked for. The nonce in the judge's words tells
    which call they are from.

    Args: asked: by the judge's own account, in order. undisturbed: question -> how often the undisturbed run asked it.
    """
    words = " ".join(str(line.get("raw")) for line in read_audit(run_dir / "judge_audit.jsonl"))
    audited = set(_NONCE.findall(words.replace('\\"', '"')))
    nonces: dict[str, list[str]] = {}
    for one in asked:
        nonces.setdefault(one.question, []).append(one.nonce)
    missing = [
        question
        for question, found in nonces.items()
        if found[-1] not in audited or len(audited & set(found)) < undisturbed[question]
    ]
    return missing + [f"nonce {nonce}" for nonce in audited - {one.nonce for one in asked}]


def booked(run_dir: Path) -> float:
    """What judges have cost by the run's own account."""
    path = run_dir / "judge_audit.jsonl"
    lines = list(read_audit(path)) if path.exists() else []
    names = {line["booking"]["judge"] for line in lines if "booking" in line}
    return sum(spent_according_to(lines, judge=name) for name in names)
