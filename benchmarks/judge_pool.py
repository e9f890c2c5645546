"""What does the judge pool cost, what does it keep under faults, and how much of a judge's time does sampling hide?

    python benchmarks/judge_pool.py --json benchmarks/results/judge_pool.json

pool: 2,000 judgements that take 50 to 400 ms (seeded), 64 at a time, from a client in this process: wall time over the
ideal schedule of the same times on 64 slots, at a fixed limit and with one that is found out. http: the same over
sockets, from a server in another process, that also takes 48 at a time only. overhead: CPU time of a call that is
answered at once. faults: one call in ten fails (429, 500, resets, verdicts that are none); the server's log is held
against the judgements. hidden: the quickstart with a judge, four steps of at least four turns of sampling.
`--parts` runs some of these; `--quick` takes small numbers: a check of the script. Exits 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from judge_load.schedule import ideal_s, ideal_under_s
from judge_load.training import Training, measure_training
from judge_load.work import (
    SLOTS,
    InstantClient,
    Load,
    Run,
    audited,
    http_client,
    judged,
    make_config,
    read_log,
    scripted_client,
    serving,
)
from results_file import circumstances, held_figures, write_results

from judges import JudgeRequest
from judges.prompts import load_rubric, render_prompt
from judges.verdicts import parse_verdict

MOST_OVER_IDEAL = 1.1
LEAST_HIDDEN = 0.8
SERVER_SLOTS = 48
FAULT_RATE = 0.1
REPEATS = 3

Part = tuple[dict[str, Any], list[str]]
"""Figures, and targets that they miss."""


def load_of(is_quick: bool) -> Load:
    """As the docstring says, or a small one."""
    return Load(judgements=200, low_s=0.02, high_s=0.08) if is_quick else Load()


def timing(name: str, load: Load, run: Run, *, slots: int = SLOTS) -> dict[str, Any]:
    """A run's wall time over what its slots allow, and over what the limits allow that were in force."""
    latencies_s = load.latencies_s()
    best_s, best_under_s = ideal_s(latencies_s, slots=slots), ideal_under_s(latencies_s, limits=run.limits)
    full = [at for at, limit in run.limits if limit >= slots]
    return {
        "case": name,
        "wall_s": run.wall_s,
        "cpu_s": run.cpu_s,
        "ideal_s": best_s,
        "over_ideal": run.wall_s / best_s,
        "over_ideal_of_limits": run.wall_s / best_under_s,
        "ramp_s": full[0] if full else None,
        "calls": run.lane.calls,
        "retries": run.lane.extra_calls,
        "scored": run.num_scored,
    }


def timing_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| case | wall | over the ideal | over the ideal of its limits | ramp | calls | retries |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ramp = "-" if row["ramp_s"] is None else f"{row['ramp_s']:.1f} s"
        lines.append(
            f"| {row['case']} | {row['wall_s']:.2f} s | {row['over_ideal']:.3f} | {row['over_ideal_of_limits']:.3f} "
            f"| {ramp} | {row['calls']} | {row['retries']} |"
        )
    return "\n".join(lines)


def late(rows: Sequence[dict[str, Any]], judgements: int) -> list[str]:
    """Fixed limits that miss the target, and runs that have left something unjudged."""
    complaints = [
        f"{row['case']}: {row['over_ideal']:.3f} times the ideal, not {MOST_OVER_IDEAL}"
        for row in rows
        if "fixed" in row["case"] and row["over_ideal"] > MOST_OVER_IDEAL
    ]
    return complaints + [f"{row['case']}: {row['scored']} scored" for row in rows if row["scored"] != judgements]


def run_pool(is_quick: bool) -> Part:
    """The pool alone."""
    load = load_of(is_quick)
    rows = [
        timing(name, load, asyncio.run(judged(scripted_client(load), make_config(is_adaptive=is_adaptive), requests)))
        for requests in [load.requests()]
        for name, is_adaptive in (("scripted, fixed 64", False), ("scripted, found out", True))
    ]
    print(f"{timing_table(rows)}\n", flush=True)
    return {"load": vars_of(load), "rows": rows}, late(rows, load.judgements)


def run_http(is_quick: bool) -> Part:
    """Over sockets."""
    load, rows = load_of(is_quick), []
    for name, is_adaptive, server_slots in (
        ("http, fixed 64", False, 0),
        ("http, found out", True, 0),
        (f"http, found out, the server takes {SERVER_SLOTS}", True, SERVER_SLOTS),
    ):
        with serving(load, slots=server_slots) as url:
            config = make_config(url, is_adaptive=is_adaptive)
            run = asyncio.run(judged(http_client(config), config, load.requests()))
        rows.append(timing(name, load, run, slots=server_slots or SLOTS))
    print(f"{timing_table(rows)}\n", flush=True)
    return {"load": vars_of(load), "rows": rows}, late(rows, load.judgements)


def run_overhead(is_quick: bool) -> Part:
    """CPU microseconds a call, fastest of three."""
    load = Load(judgements=200 if is_quick else 2000, low_s=0.0, high_s=0.0)
    requests = load.requests()

    def of_pool() -> float:
        return asyncio.run(judged(InstantClient(), make_config(), requests)).cpu_s

    def of_prompts() -> float:
        started = time.process_time()
        write_and_read(requests)
        return time.process_time() - started

    def over_http() -> float:
        with serving(load) as url:
            config = make_config(url)
            return asyncio.run(judged(http_client(config), config, requests)).cpu_s

    measured: dict[str, Callable[[], float]] = {
        "pool, prompts and verdicts included": of_pool,
        "of it prompts and verdicts": of_prompts,
        "with HTTP": over_http,
    }
    figures = {name: 1e6 * min(run() for _ in range(REPEATS)) / len(requests) for name, run in measured.items()}
    print("| CPU time of a call | microseconds |\n|---|---|")
    print("\n".join(f"| {name} | {figure:.0f} |" for name, figure in figures.items()) + "\n", flush=True)
    return {"load": vars_of(load), "microseconds": figures}, []


def write_and_read(requests: Sequence[JudgeRequest]) -> None:
    """What a call takes without any pool: a prompt for each request, and the reading of a reply."""
    rubric = load_rubric("fairness")
    for request in requests:
        prompt = render_prompt(rubric, request, low=0.0, high=1.0)
        parse_verdict(
            f'{{"nonce": "{prompt.nonce}", "reason": "", "score": 1.0}}', nonce=prompt.nonce, low=0.0, high=1.0
        )


def run_faults(is_quick: bool) -> Part:
    """One call in ten fails; the judge is asked again, as often as the defaults allow."""
    load, rows, complaints = load_of(is_quick), [], []
    requests = load.requests()
    limits = (("fixed 64", False), ("found out", True))
    for name, is_adaptive in limits[:1] if is_quick else limits:
        with serving(load, fault_rate=FAULT_RATE) as url:
            config = make_config(url, is_adaptive=is_adaptive)
            run = asyncio.run(judged(http_client(config), config, requests))
            row = {"case": name} | audited(requests, run, read_log(url))
        row |= {"wall_s": run.wall_s, "over_ideal": run.wall_s / ideal_s(load.latencies_s(), slots=SLOTS)}
        rows.append(row)
        complaints += [f"faults, {name}: {row[what]} {what}" for what in ("fake", "lost", "duplicated") if row[what]]
    print("| limit | judgements | calls | faults | scored | fake | lost | duplicated | failed at every try | wall |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        counts = [row[name] for name in ("judgements", "calls")] + [sum(row["faults"].values())]
        counts += [row[name] for name in ("scored", "fake", "lost", "duplicated", "failed_all_tries")]
        print(f"| {row['case']} | {' | '.join(map(str, counts))} | {row['wall_s']:.1f} s |")
    print(flush=True)
    return {"load": vars_of(load), "fault_rate": FAULT_RATE, "rows": rows}, complaints


def run_hidden(is_quick: bool) -> Part:
    """Judges that take a part of the sampling's time, and all of it."""
    steps, rows = 2 if is_quick else 3, []
    for max_rows, shares in ((16, (1.0,)),) if is_quick else ((16, (0.5, 1.0)), (8, (1.0,))):
        probe = measure_training(Training(delay_s=0.0, concurrency=8, max_rows=max_rows, steps=steps))
        rows += [
            {"share": share, "sampling_alone_s": probe["rollout_s"]}
            | measure_training(
                Training(delay_s=share * probe["rollout_s"] / 8, concurrency=8, max_rows=max_rows, steps=steps)
            )
            for share in shares
        ]
    for row in rows:  # the machine may have been slower than when the sampling was timed alone
        row["best_hidden"] = best_hidden(row["alone_s"] / row["rollout_s"], row["turns"])
    print("| turns | judging alone | sampling | first to last verdict | of it waited for | hidden | at best |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['turns']} | {row['alone_s']:.2f} s | {row['rollout_s']:.2f} s | {row['judge_s']:.2f} s "
            f"| {row['judge_wait_s']:.2f} s | {row['hidden']:.0%} | {row['best_hidden']:.0%} |"
        )
    print(flush=True)
    complaints = [
        f"hidden, {row['turns']} turns, judging takes {row['alone_s']:.2f} s alone: {row['hidden']:.0%}"
        for row in rows
        if row["hidden"] < LEAST_HIDDEN <= row["best_hidden"]
    ]
    return {"rows": rows}, complaints


def best_hidden(share: float, turns: int) -> float:
    """What any schedule can hide where turns are equal and judging takes `share` of the sampling's time: the last
    turn's judging begins when the sampling is over."""
    waited = share / turns
    return 1.0 - waited / (1.0 - 1.0 / turns + waited)


PARTS: dict[str, Callable[[bool], Part]] = {
    "overhead": run_overhead,
    "pool": run_pool,
    "http": run_http,
    "faults": run_faults,
    "hidden": run_hidden,
}


def vars_of(load: Load) -> dict[str, Any]:
    """The load's numbers."""
    return {"judgements": load.judgements, "low_s": load.low_s, "high_s": load.high_s, "slots": SLOTS}


def main() -> None:
    """Parse, run, tabulate. Exits 1 where a target is missed, but under --quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write figures, machine, versions and command here")
    parser.add_argument("--quick", action="store_true", help="small numbers: a check of the script")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    begun = {**circumstances("httpx", "pydantic"), "parts": {}}
    document = begun | {"parts": held_figures(arguments.json, begun, "machine", "versions")["parts"]}
    complaints: list[str] = []
    for name in arguments.parts:
        document["parts"][name], missed = PARTS[name](arguments.quick)
        complaints += missed
        if arguments.json is not None:
            write_results(arguments.json, document)
    if complaints and not arguments.quick:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
