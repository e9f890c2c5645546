"""Kill a training run anywhere, resume it, and compare what it came to with a run that nobody disturbed.

    python benchmarks/kill_anywhere.py --json benchmarks/results/kill_anywhere.json

A tiny model with two objectives, one judged over HTTP, an adapter that learns, betas that move; 6 steps, a checkpoint
every 2, evaluations before and after. `grpo train` and `grpo train --resume` as processes (forks of one that has
imported everything), each killed by SIGKILL: 100 kills uniform over the wall time of the undisturbed run, and then as
many at chosen places as it takes until each phase has had 10, of which 3 right before one of its file operations. Half
of the killed runs are killed again in their resume.

Compared bit for bit: every file of the last checkpoint (weights, optimizer, betas, counters, random generators), every
figure of metrics.jsonl but times and memory and the judge's own counts, completions.jsonl, eval.json. The judge counts
how often each question was asked; its last answer must be in the audit, and what it has billed must be booked there,
but for calls that were in flight at a kill. What lies on the disk after a kill must fit the phase that the process was
in.

Each kill has a seed of its own, written to the JSON file; `--seed` draws others. `--full` trains all weights. `--quick`
takes 8 kills and one for each phase. `--limit-s` takes it in parts. Exits 1 where a run was not resumed,
differs, bought more than was in flight, or lacks an answer or its price in the audit, or where something is left to do.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kill_harness.campaign import Campaign, Outcome
from kill_harness.counting_judge import serve_counting
from kill_harness.kills import PHASES, Kill, at_any_time, at_chosen_place, in_phase
from kill_harness.nursery import Nursery
from kill_harness.recipe import CONCURRENCY, JUDGE_DELAY_S, write_recipe
from models.tiny_chat_llama import save_tiny_chat_llama
from results_file import circumstances, held_figures, write_results

MAX_TRIES = 8
"""Kills aimed at a phase for each one that must meet it: some come too late, and meet the next."""


def main() -> int:
    """Run, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every kill and what it came to")
    parser.add_argument("--quick", action="store_true", help="8 kills at any time, one in each phase")
    parser.add_argument("--kills", type=int, default=100, help="at any time (default: %(default)s)")
    parser.add_argument("--in-phase", type=int, default=10, help="at least so many in each (default: %(default)s)")
    parser.add_argument(
        "--at-operation", type=int, default=3, help="of these, right before a file operation (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the kills (default: %(default)s)")
    parser.add_argument(
        "--limit-s",
        type=float,
        default=math.inf,
        help="stop after so long; the same command goes on from its JSON file",
    )
    parser.add_argument("--full", action="store_true", help="train all weights instead of an adapter")
    options = parser.parse_args()
    if options.quick:
        options.kills, options.in_phase, options.at_operation = 8, 1, 1
    begun = time.monotonic()
    here = circumstances("torch", "transformers", "peft", "safetensors")
    before = held_figures(options.json, here, "machine", "versions")
    records: list[dict[str, Any]] = before.get("runs", [])
    with tempfile.TemporaryDirectory() as name, serve_counting(delay_s=JUDGE_DELAY_S) as judge, Nursery() as nursery:
        folder = Path(name)
        (folder / "model").mkdir()
        save_tiny_chat_llama(folder / "model")
        campaign = Campaign(
            folder, write_recipe(folder, folder / "model", judge, steps=6, full=options.full), judge, nursery
        )
        noise = campaign.warm_up()
        print(f"two undisturbed runs: {noise or 'no difference'}; {campaign.undisturbed.seconds:.1f} s", flush=True)
        is_done = kill_all(campaign, options, records, until=begun + options.limit_s)
    met = num_met(records)
    problems = [] if is_done else ["stopped at --limit-s; the same command goes on"]
    problems += [f"undisturbed: {one}" for one in noise]
    problems += [f"seed {record['seed']}: {one}" for record in records for one in record["problems"]]
    problems += [f"only {met[phase]} kills met {phase}" for phase in PHASES if met[phase] < options.in_phase]
    at_operation = num_met(records, kind="operation")
    problems += [
        f"only {at_operation[phase]} kills met an operation of {phase}"
        for phase in PHASES
        if at_operation[phase] < options.at_operation
    ]
    print(table(records))
    print("\n".join(problems) or "nothing differs")
    if options.json:
        result = {
            **here,
            "seconds": round(time.monotonic() - begun + before.get("seconds", 0.0), 1),
            "undisturbed_s": round(campaign.undisturbed.seconds, 2),
            "questions": campaign.undisturbed.asked.total(),
            "concurrency": CONCURRENCY,
            "problems": problems,
            "runs": records,
        }
        write_results(options.json, result)
    return 1 if problems else 0


def kill_all(campaign: Campaign, options: argparse.Namespace, records: list[dict[str, Any]], *, until: float) -> bool:
    """First at any time, then in the phases that have not had enough; adds to the records.

    Args: until: on the monotonic clock, when to stop.
    Returns: whether all is done.
    """

    def run(seed: str, aim: str, draw_kill: Callable[..., Kill], *of: Any) -> None:
        draw = random.Random(seed)
        first = draw_kill(draw, *of)
        again = [at_any_time(draw, undisturbed.seconds)] if draw.random() < 0.5 else []
        outcome = campaign.survive([first, *again])
        records.append(record_of(seed, aim, outcome))
        if outcome.problems:
            print(f"seed {seed}: {outcome.problems}", flush=True)

    def may_try(aim: str) -> bool:
        return tried(aim) < MAX_TRIES * options.in_phase and time.monotonic() < until

    def tried(aim: str) -> int:
        return sum(record["aim"] == aim for record in records)

    undisturbed = campaign.undisturbed
    while num_at_any_time(records) < options.kills and time.monotonic() < until:
        run(f"{options.seed}-time-{tried('any time')}", "any time", at_any_time, undisturbed.seconds)
    for phase in PHASES:
        while num_met(records)[phase] < options.in_phase and may_try(phase):
            run(f"{options.seed}-{phase}-{tried(phase)}", phase, in_phase, phase, undisturbed.phases)
        aim = f"{phase}, an operation"
        while num_met(records, kind="operation")[phase] < options.at_operation and may_try(aim):
            run(f"{options.seed}-{aim}-{tried(aim)}", aim, at_chosen_place, phase, undisturbed.phases)
    return time.monotonic() < until


def num_at_any_time(records: list[dict[str, Any]]) -> int:
    """Kills drawn over the wall time that met a living process."""
    deaths = [death for record in records for death in record["deaths"]]
    return sum(death["kill"]["kind"] == "time" and death["phase"] != "done" for death in deaths)


def num_met(records: list[dict[str, Any]], *, kind: str = "") -> Counter[str]:
    """Phase -> processes that died in it, and whose disk agrees. Args: kind: of the kill; any where empty."""
    deaths = [death for record in records for death in record["deaths"]]
    return Counter(
        death["phase"] for death in deaths if not death["contradiction"] and kind in ("", death["kill"]["kind"])
    )


def record_of(seed: str, aim: str, outcome: Outcome) -> dict[str, Any]:
    """For the JSON file."""
    return {
        "seed": seed,
        "aim": aim,
        "deaths": [asdict(death) for death in outcome.deaths],
        "repeated": outcome.num_repeated,
        "unaudited": len(outcome.unaudited),
        "unbooked": round(outcome.unbooked, 6),
        "leftovers": outcome.leftovers,
        "problems": outcome.problems,
    }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a row for each phase that a process died in."""
    lines = [
        "| killed in | at any time | in this phase | before an operation | disk agrees | resumed | bit-identical "
        "| asked twice, a run | not audited |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for phase in ("start", *PHASES, "between", "all"):
        own: Counter[str] = Counter()
        most = 0
        for record in records:
            for death in record["deaths"]:
                if phase not in ("all", death["phase"]) or death["phase"] == "done":
                    continue
                own[death["kill"]["kind"]] += 1
                own["agrees"] += not death["contradiction"]
                own["resumed"] += not any("ended with" in one for one in record["problems"])
                own["identical"] += not record["problems"]
                own["unaudited"] += record["unaudited"]
                most = max(most, record["repeated"])
        counts = [own[name] for name in ("time", "phase", "operation", "agrees", "resumed", "identical")]
        cells = [*counts, f"at most {most}", own["unaudited"]]
        lines.append(f"| {phase.replace('_', ' ')} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
