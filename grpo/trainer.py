"""The one loop: prompts -> rollout -> scoring -> advantages -> batching -> update -> metrics / checkpoint.

`Trainer.step` is the whole method on a screen; everything else here starts it, stops it and writes it down.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from grpo.batching import build_batch
from grpo.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from grpo.config import RunConfig
from grpo.errors import TooFewVerdicts
from grpo.evaluate import Answer, compare, evaluate, examples, summarise
from grpo.preflight import RunParts, open_run
from grpo.run_directory import RunDirectory
from grpo.runtime.devices import peak_memory_bytes
from grpo.runtime.interruptions import interruptions
from grpo.runtime.seeding import derived_seed
from grpo.scoring import PendingScores, check_enough_verdicts
from grpo.step_report import StepReport, report_step


class Observer(Protocol):
    """Sees a run from outside; the command line shows it in a table."""

    def start(self, title_rows: list[tuple[str, str]]) -> None:
        """The run's facts, before its first step."""
        ...

    def step(self, row: Mapping[str, Any], *, total_steps: int, seconds_left: float | None) -> None:
        """A finished step's line of metrics.jsonl."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run left."""

    run_dir: Path
    checkpoint: Checkpoint
    """The last one; its folder's `policy` loads with peft (LoRA) or transformers."""
    evaluation: Mapping[str, Any]
    """What eval.json holds; empty where nothing was evaluated."""
    was_interrupted: bool
    """Ctrl-C or SIGTERM ended it after a whole step; `--resume` goes on."""


class Trainer:
    """Runs a recipe: `Trainer(config).run()`. In a notebook too.

    Owns nothing between runs. `run` checks everything first, then writes the run directory step by step.
    """

    def __init__(self, config: RunConfig, *, observer: Observer | None = None) -> None:
        """Args: observer: is told of every step; nobody where None."""
        self.config = config
        self._observer = observer
        self._directory = RunDirectory(config.output_dir)
        self._parts: RunParts | None = None

    @property
    def parts(self) -> RunParts:
        """What the running run is made of."""
        assert self._parts is not None, "only while run() is running"
        return self._parts

    def run(self, *, resume: bool = False) -> RunResult:
        """Train for config.steps steps, or on from the last checkpoint.

        Raises:
            InputError: the recipe or what it names cannot be used; nothing was written.
            RunStopped: the run could not go on; its last checkpoint is whole.
        """
        if resume:
            self._directory.check_resumable(self.config)
            checkpoint = latest_checkpoint(self._directory.path)
        else:
            self._directory.check_new()
            checkpoint = None
        self._parts = open_run(self.config, audit_path=self._directory.audit_path)
        try:
            return self._run(checkpoint)
        finally:
            self._parts.close()
            self._parts = None

    def step(self, step: int) -> StepReport:
        """One optimizer step, counted from 1."""
        config, parts, seconds = self.config, self.parts, _Stopwatch()
        with seconds("step"):
            prompts = parts.encode(parts.prompts.batch(step))
            with seconds("rollout"):
                seed = derived_seed(config.seed, "rollout", step)
                sampled = parts.engine.sample(prompts, config.rollout.group_size, params=parts.params, seed=seed)
                pending = PendingScores.begin(parts.scorer.submit(group) for group in sampled)
            with seconds("judge_wait"):
                groups = pending.results(order=[prompt.prompt.id for prompt in prompts])
            check_enough_verdicts(groups, max_unscored_frac=config.scoring.max_unscored_frac)
            batch = build_batch(
                groups,
                {name: objective.weight for name, objective in config.objectives.items()},
                combine=config.update.combine,
                scale=config.update.scale,
                micro_batch_tokens=config.update.micro_batch_tokens,
            )
            if batch.num_tokens == 0:
                raise TooFewVerdicts(f"step {step}: no completion has a verdict, so there is nothing to learn from")
            with seconds("update"):
                stats = parts.updater.step(batch, progress=(step - 1) / config.steps)
            with seconds("sync"):
                parts.engine.load_weights(parts.policy)
        seconds.record("judge", pending.seconds)
        peak = peak_memory_bytes(parts.policy.device)
        return report_step(step, groups, batch, stats, seconds=seconds.elapsed, peak_bytes=peak)

    def _run(self, checkpoint: Checkpoint | None) -> RunResult:
        config, parts, directory = self.config, self.parts, self._directory
        if checkpoint is None:
            directory.create(config)
            done = 0
        else:
            done = load_checkpoint(checkpoint, parts.updater)
            directory.forget_after(done)
            parts.engine.load_weights(parts.policy)
            self._note(f"resumed after step {done} from {checkpoint.folder}")
        if self._observer:
            self._observer.start(title_rows(config, parts))
        with interruptions() as interrupted:
            before = self._before(done)
            durations: list[float] = []
            for step in range(done + 1, config.steps + 1):
                if interrupted.is_set():
                    break
                report = self.step(step)
                directory.append(report.row, report.completions)
                done = step
                durations.append(float(report.row["time/step_s"] or 0.0))
                if self._observer:
                    left = (config.steps - step) * sum(durations) / len(durations)
                    self._observer.step(report.row, total_steps=config.steps, seconds_left=left)
                if step % config.checkpoint.every == 0 and step < config.steps:
                    checkpoint = self._save(step)
            if checkpoint is None or checkpoint.step != done:
                checkpoint = self._save(done)
            if done == config.steps and not interrupted.is_set():
                self._after(before, has_learned=bool(durations))
            return RunResult(
                run_dir=directory.path,
                checkpoint=checkpoint,
                evaluation=directory.read_eval(),
                was_interrupted=interrupted.is_set(),
            )

    def _save(self, step: int) -> Checkpoint:
        return save_checkpoint(self._directory.path, self.parts.updater, step=step, keep=self.config.checkpoint.keep)

    def _before(self, done: int) -> list[Answer] | None:
        """Held-out answers of the untrained policy: made now, or read back in a resumed run."""
        if not self.config.eval.before:
            return None
        saved = self._directory.read_eval().get("answers", {}).get("before")
        if saved is not None:
            return [_answer_from(entry, prompt.prompt) for entry, prompt in zip(saved, self._held_out(), strict=True)]
        if done > 0:
            self._note("eval.before was not made before this run was interrupted; there will be no difference")
            return None
        return self._evaluate("before", None)

    def _after(self, before: list[Answer] | None, *, has_learned: bool) -> None:
        # a finished run that was asked for more steps holds the evaluation of the shorter run
        if self.config.eval.after and (has_learned or "after" not in self._directory.read_eval()):
            self._evaluate("after", before)

    def _evaluate(self, when: str, before: list[Answer] | None) -> list[Answer]:
        self._note(f"evaluating on held-out prompts {when} training")
        parts = self.parts
        answers = evaluate(parts.engine, parts.eval_scorer, self._held_out(), params=parts.params)
        evaluation = self._directory.read_eval()
        evaluation[when] = summarise(answers)
        evaluation.setdefault("answers", {})[when] = [_entry_of(answer) for answer in answers]
        if before is not None:
            evaluation["difference"] = compare(before, answers)
            evaluation["examples"] = examples(before, answers)
        self._directory.write_eval(evaluation)
        return answers

    def _held_out(self) -> list[Any]:
        return self.parts.encode(self.parts.prompts.held_out(self.config.eval.num_prompts))

    def _note(self, text: str) -> None:
        if self._observer:
            self._observer.note(text)


def title_rows(config: RunConfig, parts: RunParts) -> list[tuple[str, str]]:
    """The facts that a run prints before its first step."""
    learning = parts.policy.trainable_parameters()
    count, total = sum(p.numel() for p in learning.values()), parts.policy.num_parameters()
    batch = config.prompts.per_step * config.rollout.group_size
    return [
        ("version", f"grpo-toolkit {version('grpo-toolkit')}"),
        (
            "model",
            f"{config.model} on {parts.policy.device}, products in {parts.policy.compute_dtype}".replace("torch.", ""),
        ),
        ("trainable", f"{count:,} of {total:,} parameters ({count / total:.2%}) in {len(learning)} tensors, float32"),
        (
            "end tokens",
            ", ".join(f"{i} {parts.tokenizer.convert_ids_to_tokens(i)}" for i in parts.params.end_token_ids),
        ),
        (
            "effective batch",
            f"{config.prompts.per_step} prompts x {config.rollout.group_size} completions = {batch} rows",
        ),
        ("objectives", ", ".join(config.objectives)),
        ("run directory", str(config.output_dir)),
    ]


class _Stopwatch:
    """Wall time by stage, in seconds."""

    def __init__(self) -> None:
        self.elapsed: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.record(stage, time.perf_counter() - start)

    def record(self, stage: str, seconds: float) -> None:
        self.elapsed[stage] = seconds


def _entry_of(answer: Answer) -> dict[str, Any]:
    return {"id": answer.prompt.id, "completion": answer.completion, "scores": dict(answer.scores)}


def _answer_from(entry: Mapping[str, Any], prompt: Any) -> Answer:
    return Answer(prompt=prompt, completion=entry["completion"], scores=entry["scores"])
