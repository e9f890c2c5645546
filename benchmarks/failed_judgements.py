"""What does a failed judgement do to the advantages, in TRL's reward path and in ours?

    python benchmarks/failed_judgements.py --json benchmarks/results/failed_judgements.json

64 prompts of 8 completions, scored for one objective or two by a judge that gives 0, 0.25, 0.5, 0.75 or 1, and of whose
judgements one in ten fails for good: the same ones everywhere (5 schedules, drawn by a hash). Ours: JudgePool, the
reward `judged`, `group_advantages`. TRL: its GRPOTrainer's own methods around reward functions as people write them,
which return None, 0 or 0.5 where the judge fails, or let the exception pass.

The yardstick is worked out in plain Python from the verdicts that there are: an objective's failed judgements are left
out of its group's mean and deviation and give no advantage (`decoupled`, TRL's normalize_then_sum); a completion that
lacks one of its scores is left out (`summed`, TRL's sum_then_normalize). "Error" is the sum of the advantages'
distances from it, "distance" that from the advantages of a judge that never fails, which no one can know; both per
failed judgement. "Turned" is the share of completions, in groups with a failure, whose advantage has the wrong sign.
`--quick` takes 8 prompts and one schedule. Exits 1 where ours is not 0, to float32's rounding.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from judge_load.trl_rewards import RewardFunction, trl_advantages
from results_file import circumstances, write_results

from grpo.advantages import group_advantages
from judges import ChatRequest, EndpointConfig, JudgeConfig, JudgeUnavailable, ScriptedClient
from judges.clients.scripted import verdict_for
from judges.prompts import read_fences
from rewards.judged import Judged
from rewards.types import RewardInput

FAILURE_RATE = 0.1
GROUP_SIZE = 8
LEVELS = 5
EPS = 1e-4
ROUNDING = 1e-5
"""Of float32, summed up over a group."""

Combine = Literal["decoupled", "summed"]
TRL_NAME: dict[Combine, str] = {"decoupled": "normalize_then_sum", "summed": "sum_then_normalize"}
Scores = list[list[list[float | None]]]
"""[P][K][O], None where the judgement failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A judge whose verdicts and failures are drawn by a hash."""

    seed: int
    prompts: int
    objectives: int
    failure_rate: float = FAILURE_RATE

    def completions(self) -> list[str]:
        """[P * K], no two alike."""
        return [f"answer {p}.{k}" for p in range(self.prompts) for k in range(GROUP_SIZE)]

    def ask(self, objective: int, completion: str) -> float:
        """The verdict.

        Raises:
            JudgeUnavailable: this judgement fails, however often it is asked for.
        """
        if self._draw("failure", objective, completion) < self.failure_rate:
            raise JudgeUnavailable("fails on purpose")
        return math.floor(self._draw("score", objective, completion) * LEVELS) / (LEVELS - 1)

    def scores(self) -> Scores:
        """All verdicts."""

        def asked(objective: int, completion: str) -> float | None:
            try:
                return self.ask(objective, completion)
            except JudgeUnavailable:
                return None

        rows = [[asked(objective, text) for objective in range(self.objectives)] for text in self.completions()]
        return [rows[start : start + GROUP_SIZE] for start in range(0, len(rows), GROUP_SIZE)]

    def _draw(self, what: str, objective: int, completion: str) -> float:
        digest = hashlib.sha256(f"{self.seed}\n{what}\n{objective}\n{completion}".encode()).digest()
        return int.from_bytes(digest[:6]) / (1 << 48)


def left_out(scores: Scores, combine: Combine) -> list[list[float]]:
    """[P][K] the advantages of what was judged, and of nothing else. Weights are 1; slow and plain on purpose."""
    if combine == "summed":
        sums = [[[None if None in row else math.fsum(filter(None, row))] for row in group] for group in scores]
        return [[row[0] for row in _normalised(group)] for group in sums]
    totals = [[math.fsum(row) for row in _normalised(group)] for group in scores]
    if len(scores[0][0]) == 1:
        return totals
    has_any = [[any(score is not None for score in row) for row in group] for group in scores]
    kept = [
        total
        for group, is_there in zip(totals, has_any, strict=True)
        for total, one in zip(group, is_there, strict=True)
        if one
    ]
    scale = statistics.stdev(kept) + EPS
    return [[total / scale for total in group] for group in totals]


def _normalised(group: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """[K][O] of one group; 0 for what is missing, and where nothing can be compared."""
    rows = [[0.0] * len(group[0]) for _ in group]
    for objective in range(len(group[0])):
        there = [(k, score) for k, row in enumerate(group) if (score := row[objective]) is not None]
        if len(there) < 2:
            continue
        mean, spread = statistics.fmean(one for _, one in there), statistics.stdev(one for _, one in there)
        for k, score in there:
            rows[k][objective] = (score - mean) / (spread + EPS)
    return rows


def ours(schedule: Schedule, combine: Combine) -> list[list[float]]:
    """[P][K] through the pool, the reward and the advantages."""
    endpoint = EndpointConfig(url="http://127.0.0.1:9/v1", model="scripted")  # never called
    patience: dict[str, Any] = {"attempts": 1, "breaker": {"min_calls": 10**6}}
    config = JudgeConfig(endpoints=(endpoint,), rubric="fairness", **patience)

    async def score_all() -> list[list[list[float]]]:
        groups = [[[] for _ in range(GROUP_SIZE)] for _ in range(schedule.prompts)]
        texts = schedule.completions()
        for objective in range(schedule.objectives):

            def script(request: ChatRequest, objective: int = objective) -> str:
                completion = read_fences(request.messages[-1].content)[1]["completion"]
                return verdict_for(request, schedule.ask(objective, completion))

            judged = Judged(config, client=ScriptedClient(script))
            for p in range(schedule.prompts):
                inputs = [
                    RewardInput(prompt_id=f"{p}", prompt="Who?", completion=text, reference="Anna")
                    for text in texts[p * GROUP_SIZE : (p + 1) * GROUP_SIZE]
                ]
                for row, score in zip(groups[p], await judged.score(inputs), strict=True):
                    row.append(math.nan if score.value is None else score.value)
            await judged.aclose()
        return groups

    scores = torch.tensor(asyncio.run(score_all()))  # [P, K, O]
    return group_advantages(scores, torch.ones(schedule.objectives), combine=combine).combined.tolist()


def theirs(schedule: Schedule, combine: Combine, *, on_failure: float | Literal["raise"] | None) -> list[list[float]]:
    """[P][K] through TRL's trainer, from reward functions that do this with a failure."""

    def function_of(objective: int) -> RewardFunction:
        def reward(completions: Sequence[str], **_: Any) -> list[float | None]:
            values: list[float | None] = []
            for completion in completions:
                try:
                    values.append(schedule.ask(objective, completion))
                except JudgeUnavailable:
                    if on_failure == "raise":
                        raise
                    values.append(on_failure)
            return values

        return reward

    functions = [function_of(objective) for objective in range(schedule.objectives)]
    aggregation = TRL_NAME[combine]
    return trl_advantages(schedule.completions(), functions, group_size=GROUP_SIZE, aggregation=aggregation).tolist()


PATHS: dict[str, Callable[[Schedule, Combine], list[list[float]]]] = {
    "ours": ours,
    "TRL, None": lambda schedule, combine: theirs(schedule, combine, on_failure=None),
    "TRL, 0": lambda schedule, combine: theirs(schedule, combine, on_failure=0.0),
    "TRL, 0.5": lambda schedule, combine: theirs(schedule, combine, on_failure=0.5),
    "TRL, the exception": lambda schedule, combine: theirs(schedule, combine, on_failure="raise"),
}


def measure(path: str, combine: Combine, schedules: Sequence[Schedule]) -> dict[str, Any]:
    """One row: the path's errors over all schedules."""
    row: dict[str, Any] = {"path": path, "objectives": schedules[0].objectives, "combine": combine}
    total = {"error": 0.0, "distance": 0.0}
    num_failed = num_turned = num_rows = 0
    worst = 0.0
    for schedule in schedules:
        scores = schedule.scores()
        never = Schedule(seed=schedule.seed, prompts=schedule.prompts, objectives=schedule.objectives, failure_rate=0.0)
        try:
            advantages = PATHS[path](schedule, combine)
        except JudgeUnavailable:
            return row | {"ends_the_step": True}
        right, faultless = left_out(scores, combine), left_out(never.scores(), combine)
        num_failed += sum(one is None for group in scores for completion in group for one in completion)
        for group, was, should, could in zip(scores, advantages, right, faultless, strict=True):
            errors = [abs(a - b) for a, b in zip(was, should, strict=True)]
            worst = max(worst, *errors)
            total["error"] += math.fsum(errors)
            total["distance"] += math.fsum(abs(a - b) for a, b in zip(was, could, strict=True))
            if any(None in completion for completion in group):
                num_rows += len(was)
                num_turned += sum(a * b < -(ROUNDING**2) for a, b in zip(was, should, strict=True))
    return row | {
        "failed": num_failed,
        "error": total["error"] / num_failed,
        "worst": worst,
        "distance": total["distance"] / num_failed,
        "turned": num_turned / num_rows,
        "ends_the_step": False,
    }


def run(*, is_quick: bool) -> list[dict[str, Any]]:
    """All rows."""
    prompts, seeds = (8, 1) if is_quick else (64, 5)
    cases: list[tuple[int, Combine]] = [(1, "summed"), (2, "summed"), (2, "decoupled")]
    return [
        measure(path, combine, [Schedule(seed=seed, prompts=prompts, objectives=objectives) for seed in range(seeds)])
        for objectives, combine in cases
        for path in PATHS
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| objectives | combined | a failure becomes | error | worst | turned | distance |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first = f"| {row['objectives']} | `{row['combine']}` | {row['path']} |"
        if row["ends_the_step"]:
            lines.append(f"{first} ends the training | | | |")
            continue
        error, worst = (f"{row[name]:.3f}" if row[name] > ROUNDING else "0" for name in ("error", "worst"))
        lines.append(f"{first} {error} | {worst} | {row['turned']:.1%} | {row['distance']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, run, tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write figures, machine, versions and command here")
    parser.add_argument("--quick", action="store_true", help="few prompts: a check of the script")
    arguments = parser.parse_args()
    logging.getLogger("trl").setLevel(logging.ERROR)  # a warning for every row without any score
    rows = run(is_quick=arguments.quick)
    print(table(rows))
    if arguments.json is not None:
        document = {
            **circumstances("torch", "trl"),
            "rows": rows,
        }
        write_results(arguments.json, document)
    if any(row["path"] == "ours" and row["worst"] > ROUNDING for row in rows):
        sys.exit("ours: a failed judgement has moved an advantage")


if __name__ == "__main__":
    main()
