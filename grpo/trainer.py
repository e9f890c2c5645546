"""The one loop: prompts -> rollout -> scoring -> advantages -> batching -> update -> metrics / checkpoint.

`Trainer.step` is the whole method on a screen; everything else here starts it, stops it and writes it down.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from grpo.alarms import Alarm, alarms_of, learning_rate_alarms, unmoved
from grpo.batch_dump import dump_batch
from grpo.batching import build_batch
from grpo.checkpoint import Checkpoint, RunState
from grpo.collection import collect, seal
from grpo.config import RunConfig, WarmupConfig
from grpo.errors import RankLost, RunStopped, StorageError, TooAlarming
from grpo.held_out import HeldOut
from grpo.keeping import Keeper, told_what_is_left
from grpo.observer import Observer
from grpo.phases import Announce, Phase, silent
from grpo.preflight import open_run
from grpo.rollout.canary import check_engine_follows
from grpo.run_directory import RunDirectory
from grpo.run_parts import RunParts
from grpo.runtime.determinism import determinism
from grpo.runtime.devices import peak_memory_bytes
from grpo.runtime.distributed import Ranks
from grpo.runtime.interruptions import interruptions
from grpo.runtime.randomness import random_state, restore_random_state, seed_generators
from grpo.runtime.seeding import derived_seed
from grpo.step_gate import StepGate
from grpo.step_report import StepReport, check_can_go_on, report_step
from grpo.stopwatch import Stopwatch
from grpo.title import title_rows
from grpo.trackers import BackgroundTrackers, Tracker, open_trackers


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run left."""

    run_dir: Path
    checkpoint: Checkpoint
    """The last one; its folder's `policy` loads with peft (LoRA) or transformers."""
    evaluation: Mapping[str, Any]
    """What eval.json holds; empty where nothing was evaluated."""
    was_interrupted: bool
    """Ctrl-C or SIGTERM ended it after a whole step, with something left to do; `--resume` goes on."""


class Trainer:
    """Runs a recipe: `Trainer(config).run()`. In a notebook too.

    Owns nothing between runs. `run` checks everything first, then writes the run directory step by step.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        observer: Observer | None = None,
        trackers: Sequence[Tracker] = (),
        announce: Announce = silent,
    ) -> None:
        """Args: observer: is told of every step; nobody where None. trackers: beside those that the recipe names.
        announce: is told of every phase as it begins, on every rank."""
        self.config = config
        self._ranks = Ranks(use_cpu=config.device == "cpu")
        self._observer = observer if self._ranks.is_main else None
        self._own_trackers = trackers
        self._directory = RunDirectory(config.output_dir)
        self._told = announce
        self._keeper = Keeper(config, self._directory, self._ranks, announce=self._announce)
        self._parts: RunParts | None = None
        self._is_ahead = False
        """Whether the weights hold an update that metrics.jsonl has no line of."""
        self._stuck: set[str] = set()
        self._gate = StepGate(config, self._ranks)
        self._alarms = alarms_of(config)
        self._interrupted = threading.Event()

    @property
    def is_main(self) -> bool:
        """Whether this process, of those of the run, writes files and talks to the person."""
        return self._ranks.is_main

    @property
    def parts(self) -> RunParts:
        """What the running run is made of."""
        assert self._parts is not None, "only while run() is running"
        return self._parts

    def run(self, *, resume: bool = False) -> RunResult:
        """Train for config.steps steps, or on from the last checkpoint.

        Under `accelerate launch` every process calls it; the main one writes the run directory.

        Raises:
            InputError: the recipe or what it names cannot be used; nothing was written.
            RunStopped: the run could not go on; every step that it finished is in its last checkpoint.
        """
        config, directory, ranks = self.config, self._directory, self._ranks
        if config.alarms == "stop":  # before anything is loaded or written; else `_run` warns of it
            self._heed(
                learning_rate_alarms(config.trainable, config.optim),
                note="No step was taken. With alarms=warn it is trained all the same",
            )
        so_far = ranks.on_main(lambda: directory.check_resumable(config)) if resume else None
        with ExitStack() as at_end:
            at_end.enter_context(told_what_is_left(directory.path))
            at_end.callback(directory.unlock)
            at_end.callback(setattr, self, "_parts", None)
            if so_far is not None:
                ranks.on_main(directory.lock)
                checkpoint = ranks.on_main(lambda: self._keeper.find(so_far))
            else:
                ranks.on_main(directory.check_new)
                checkpoint = None
            at_end.enter_context(determinism(config.determinism))
            journal = at_end.enter_context(closing(self._keeper.journal))
            self._parts = parts = ranks.together(
                lambda: at_end.enter_context(
                    closing(open_run(config, audit_path=directory.audit_path, journal=journal, ranks=ranks))
                )
            )
            self._keeper.check_room(parts, checkpoint)
            at_end.callback(restore_random_state, random_state())  # a notebook's are its own
            if so_far is not None:
                state = self._keeper.take_up(checkpoint, so_far, parts, self._note)
                self._gate.skipped_in_a_row, self._stuck = state.skipped_in_a_row, set(state.stuck_betas)
                for row in ranks.on_main(directory.rows):
                    self._alarms.observe(row)  # told already; counted on from here
            else:
                ranks.on_main(lambda: directory.create(config))
                ranks.on_main(directory.lock)
            return self._run(checkpoint)

    def step(self, step: int) -> StepReport:
        """One optimizer step, counted from 1."""
        config, parts, journal, stopwatch = self.config, self.parts, self._keeper.journal, Stopwatch()
        with stopwatch("step"):
            self._begin("step", step)
            collected = collect(
                parts,
                journal,
                step=step,
                seed=config.seed,
                group_size=config.rollout.group_size,
                resample_rounds=config.rollout.resample_rounds,
                stopwatch=stopwatch,
                announce=self._announce,
            )
            if config.scoring.below == "wait":
                collected = self._gate.ask_again(collected, parts.scorer, self._pause, stopwatch=stopwatch)
            batch = build_batch(
                collected.groups,
                {name: objective.weight for name, objective in config.objectives.items()},
                combine=config.update.combine,
                scale=config.update.score_scale,
                micro_batch_tokens=parts.updater.micro_batch_tokens,
                max_new_tokens=config.rollout.max_new_tokens,
                truncated=config.update.truncated,
                drops_flat_groups=config.update.flat_groups == "drop",
                idle_when_flat=parts.updater.idle_when_flat,
                own=collected.own,
                images=parts.images_of([collected.groups[place] for place in collected.own]),
            )
            short = self._gate.check(step, collected, batch)
            self._announce("journal")
            collected = seal(collected, parts, journal)
            if short:
                stats = parts.updater.stand_still(step=step - 1, steps=config.steps)
            else:
                seed_generators(config.seed, "update", step, self._ranks.index)
                with stopwatch("update"):
                    stats = parts.updater.step(
                        batch,
                        step=step - 1,
                        steps=config.steps,
                        seed=derived_seed(config.seed, "combination", step),
                        announce=self._announce,
                    )
                self._announce("between")
                with stopwatch("sync"):
                    parts.engine.load_weights(parts.policy)
        stopwatch.add("judge", collected.judge_seconds)
        if stats.skipped is not None:  # on one rank, and so on all
            self._ranks.together(
                partial(dump_batch, self._directory.path, step, batch, stats.skipped, rank=self._ranks.index)
            )
        peak = max(self._ranks.gather([peak_memory_bytes(parts.policy.device)]))
        return report_step(
            step,
            collected,
            batch,
            stats,
            seconds=stopwatch.elapsed,
            peak_bytes=peak,
            judge_figures=collected.judge_figures,
            short=short,
        )

    def _pause(self) -> bool:
        """Before missing verdicts are asked for again. False: the person wants to stop."""
        seconds = self.config.scoring.wait_s
        self._note(f"too few verdicts; asking again for those that are missing in {seconds:g} s")
        return not self._interrupted.wait(seconds)

    def _announce(self, phase: Phase) -> None:
        self._is_ahead = self._is_ahead or phase == "optimizer"
        if self._ranks.is_main:
            self._directory.note_phase(phase)
        self._told(phase)

    def _begin(self, *name: str | int) -> None:
        """Begin what has this name: its part of the journal, its random draws."""
        chapter = "-".join(str(part) for part in name)
        for problem in self._ranks.together(lambda: self._keeper.journal.open_chapter(chapter)):
            self._warn(problem)
        seed_generators(self.config.seed, *name, self._ranks.index)

    def _run(self, checkpoint: Checkpoint | None) -> RunResult:
        config, directory = self.config, self._directory
        done, self._is_ahead = checkpoint.step if checkpoint else 0, False
        if self._observer:
            self._observer.start(title_rows(config, self.parts))
        with interruptions() as interrupted, self._tracked(done) as trackers:
            self._interrupted = interrupted
            for alarm in learning_rate_alarms(config.trainable, config.optim):
                self._warn(alarm.text)
            held_out = HeldOut(config, self.parts, directory, self._keeper.journal, begin=self._begin, note=self._note)
            # step 0 of a run with a warm-up is the warmed-up model
            before = held_out.before(is_untrained=done == 0 and (checkpoint is None or config.warmup is None))
            if checkpoint is None and config.warmup is not None:
                self._warm_up(config.warmup, lambda: self._ranks.any(interrupted.is_set()))
            self._check_engine(done)
            durations: list[float] = []
            while done < config.steps and not self._ranks.any(interrupted.is_set()):
                report = self._advance(done, checkpoint, held_out)
                done = report.step
                trackers.log(report.row)
                durations.append(float(report.row["time/step_s"] or 0.0) + float(report.row.get("time/eval_s") or 0.0))
                if self._observer:
                    left = (config.steps - done) * sum(durations) / len(durations)
                    self._observer.step(report.row, total_steps=config.steps, seconds_left=left)
                    for warning in [*report.warnings, *self._stuck_betas(), *trackers.take_warnings()]:
                        self._observer.warn(warning)
                if self._keeper.is_due(done, self.parts):
                    checkpoint = self._saved(done, checkpoint)
            checkpoint = self._saved(done, checkpoint)
            needs_evaluation = config.eval.after and "after" not in held_out.read()
            if done == config.steps and needs_evaluation and not self._ranks.any(interrupted.is_set()):
                held_out.evaluate("after", before)
                if before is not None:
                    note = (
                        f"All {done} steps, checkpoint and eval.json are saved; grpo report {directory.path} shows them"
                    )
                    self._heed(unmoved(held_out.read()), note=note)
                needs_evaluation = False
        return RunResult(
            run_dir=directory.path,
            checkpoint=checkpoint,
            evaluation=held_out.read(),
            was_interrupted=done < config.steps or needs_evaluation,
        )

    def _advance(self, done: int, checkpoint: Checkpoint | None, held_out: HeldOut) -> StepReport:
        """The step after `done`, with its evaluation where one is due, written down.

        Raises:
            RunStopped: the run cannot go on; it is saved, or the journal has what its last checkpoint lacks.
        """
        config, directory = self.config, self._directory
        try:
            report = self.step(done + 1)
            self._is_ahead = True
            report = held_out.during(report)
            self._ranks.on_main(partial(directory.append, report.row, report.completions, report.answers))
            done, self._is_ahead = done + 1, False
            check_can_go_on(report, max_in_a_row=config.update.max_non_finite_steps)
            self._heed(self._alarms.observe(report.row))
        except StorageError as exc:
            exc.add_note(f"Once there is room: grpo train {directory.path} --resume")
            raise
        except RankLost:
            raise  # what is saved is what all ranks agree on, and one is gone
        except RunStopped as exc:
            if not self._is_ahead:  # else the weights are not those of step `done`
                self._saved(done, checkpoint)
            saved = "The journal has the step" if self._is_ahead else f"Saved after step {done}"
            exc.add_note(f"{saved}; go on with: grpo train {directory.path} --resume")
            raise
        return report

    def _heed(self, alarms: Sequence[Alarm], *, note: str | None = None) -> None:
        """Raises TooAlarming where the recipe says `alarms: stop`. Args: note: what is left then."""
        if alarms and self.config.alarms == "stop":
            error = TooAlarming("; ".join(alarm.text for alarm in alarms))
            if note is not None:
                error.add_note(note)
            raise error
        for alarm in alarms:
            self._warn(alarm.text)

    @contextmanager
    def _tracked(self, done: int) -> Iterator[BackgroundTrackers]:
        """The trackers of a run that has done so many steps; at its end it is told what they lack."""
        opened = [*open_trackers(self.config, done=done), *self._own_trackers] if self._ranks.is_main else []
        trackers = BackgroundTrackers(opened)
        try:
            yield trackers
        except KeyboardInterrupt:
            trackers.close(wait_s=0.0)  # at once
            raise
        finally:
            for line in trackers.close():
                if self._observer:
                    self._observer.warn(line)

    def _check_engine(self, done: int) -> None:
        """The first sync of a run, watched: an engine on other weights than the policy's is found now."""
        parts = self.parts
        if done < self.config.steps:
            (prompt, *_) = parts.encode(parts.prompts.batch(done + 1))
            together = self._ranks.together
            together(lambda: check_engine_follows(parts.engine, parts.policy, prompt, parts.params, together=together))

    def _saved(self, step: int, checkpoint: Checkpoint | None) -> Checkpoint:
        """The last checkpoint where it is this step's, else a new one."""
        state = RunState(skipped_in_a_row=self._gate.skipped_in_a_row, stuck_betas=tuple(sorted(self._stuck)))
        return self._keeper.save(step, checkpoint, self.parts, state)

    def _warm_up(self, config: WarmupConfig, should_stop: Callable[[], bool]) -> None:
        """Raises KeyboardInterrupt where it was stopped: half a warm-up is nothing that a run could go on from."""
        from grpo.warmup import warm_up  # trl takes seconds to import

        parts = self.parts
        room = parts.max_prompt_tokens
        every = max(config.steps // 10, 1)

        def tell(step: int, loss: float) -> None:
            if step % every == 0:
                self._note(f"warm-up step {step} of {config.steps}: loss {loss:.3f}")

        report = warm_up(
            parts.policy,
            parts.tokenizer,
            config,
            seed=self.config.seed,
            end_token_ids=parts.params.end_token_ids,
            context_tokens=None if room is None else room + parts.params.max_new_tokens,
            on_step=tell,
            should_stop=should_stop,
        )
        if report.steps < config.steps:
            raise KeyboardInterrupt
        parts.policy.take_as_reference()
        parts.engine.load_weights(parts.policy)
        self._saved(0, None)
        self._note(
            f"supervised warm-up: {report.steps} steps, loss {report.loss_first:.3f} -> {report.loss_last:.3f}; the KL "
            "is measured from here"
        )

    def _stuck_betas(self) -> list[str]:
        """One warning for each beta that has come to its end; again once it was free in between."""
        stuck = {name for name, controller in self.parts.updater.controllers.items() if controller.is_stuck}
        new, self._stuck = stuck - self._stuck, stuck
        return [
            f"beta of {name} has been at its maximum for {self.config.objectives[name].beta.alarm_after} windows with "  # pyright: ignore[reportAttributeAccessIssue]
            "the KL still too high: try update.kl.estimator=k2 or k3+, which pull harder, or a lower learning rate"
            for name in sorted(new)
        ]

    def _note(self, text: str) -> None:
        if self._observer:
            self._observer.note(text)

    def _warn(self, text: str) -> None:
        if self._observer:
            self._observer.warn(text)
