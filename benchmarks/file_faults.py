"""A disk refuses one file operation of a run: does the run stop, what does it say, which checkpoint is left?

    cd benchmarks; python file_faults.py --json results/file_faults.json --table results/file_faults.md

A run of a tiny model, two objectives, one of them judged, 2 steps, a checkpoint each, of which one is kept. Every kind
of file operation that it does below its folder, at every kind of file, is failed once, in the middle of the run: with
ENOSPC (a write takes half of the bytes first), and with EIO. The run is then resumed and compared, bit for bit, with
one that nobody disturbed. `--quick` takes every eighth. `--limit-s` takes it in parts. Exits 1 where a run that stopped
did not name its folder, where one cannot be resumed or differs, or where something is left to do.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kill_harness.counting_judge import serve_counting
from kill_harness.fault_trials import Place, Trial, fail_at, places_of, table
from kill_harness.recipe import write_recipe
from models.tiny_chat_llama import save_tiny_chat_llama
from results_file import circumstances, command, held_figures, write_results

from grpo.recipe_loader import load_recipe
from grpo.trainer import Trainer


def main() -> int:
    """Run, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every failure and what came of it")
    parser.add_argument("--table", type=Path, help="write the table there too")
    parser.add_argument("--quick", action="store_true", help="every eighth kind of operation")
    parser.add_argument(
        "--limit-s",
        type=float,
        default=math.inf,
        help="stop after so long; the same command goes on from its JSON file",
    )
    options = parser.parse_args()
    begun = time.monotonic()
    here = circumstances("torch", "transformers", "peft", "safetensors")
    before = held_figures(options.json, here, "machine", "versions")
    trials = [Trial(**{**one, "place": Place(**one["place"])}) for one in before.get("trials", [])]
    known = {(trial.place, trial.fault) for trial in trials}
    left_to_do = 0
    with tempfile.TemporaryDirectory() as name, serve_counting(delay_s=0.0) as judge:
        folder = Path(name).resolve()
        (folder / "model").mkdir()
        save_tiny_chat_llama(folder / "model")
        evaluation = {"before": True, "after": False, "num_prompts": 2}
        recipe = write_recipe(
            folder, folder / "model", judge, steps=2, checkpoint={"every": 1, "keep": 1}, eval=evaluation
        )

        def run(run_dir: Path, *, resume: bool = False) -> None:
            Trainer(load_recipe(str(recipe), [f"output_dir={json.dumps(str(run_dir))}"])).run(resume=resume)

        (folder / "whole").mkdir()
        places = places_of(run, folder / "whole" / "run")
        chosen = sorted(places)[:: 8 if options.quick else 1]
        for place, fault in [(one, fault) for one in chosen for fault in faults_of(one)]:
            if (place, fault) in known:
                continue
            if time.monotonic() - begun > options.limit_s:
                left_to_do += 1
                continue
            (folder / "trial").mkdir()
            trial = fail_at(
                place,
                1 + places[place] // 2,
                fault,
                run,
                lambda run_dir: run(run_dir, resume=True),
                run_dir=folder / "trial" / "run",
                undisturbed=folder / "whole" / "run",
            )
            trials.append(trial)
            shutil.rmtree(folder / "trial")
    trials.sort(key=lambda trial: trial.place)
    problems = [f"{left_to_do} left to do; the same command goes on"] if left_to_do else []
    problems += [f"{one.place}, {one.fault}: {one.differences}" for one in trials if one.differences]
    problems += [f"{one.place}, {one.fault}: {one.message}" for one in trials if one.exit_code and not one.names_path]
    problems += [f"{one.place}, {one.fault}: {one.crash}" for one in trials if one.crash]
    problems += [f"{one.place}, {one.fault}: no checkpoint is whole" for one in trials if one.left == "none"]
    print(table(trials))
    if options.table:
        told = f"Made by `{command()}`: {len(trials)} failures, {left_to_do} left to do."
        options.table.write_text(f"{told}\n\n{table(trials)}\n")
    print("\n".join(problems) or "every run that stopped names its folder, and was resumed bit for bit")
    if options.json:
        result: dict[str, Any] = {
            **here,
            "seconds": round(time.monotonic() - begun + before.get("seconds", 0.0), 1),
            "problems": problems,
            "trials": [asdict(trial) for trial in trials],
        }
        write_results(options.json, result)
    return 1 if problems else 0


def faults_of(place: Place) -> tuple[str, ...]:
    """A full disk and a broken one; a full one takes half of a write."""
    return ("a short write, then ENOSPC" if place.operation == "write" else "ENOSPC", "EIO")


if __name__ == "__main__":
    sys.exit(main())
