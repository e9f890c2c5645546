"""A run's evaluations: before and after training in eval.json, those in between in evaluations.jsonl and metrics.jsonl.

They are read back when the run is resumed. Knows no optimizer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from grpo import metrics as names
from grpo.config import RunConfig
from grpo.evaluate import Answer, bias_of, compare, evaluate, examples, figures, summarise
from grpo.journal import Journal
from grpo.run_directory import RunDirectory
from grpo.run_parts import RunParts
from grpo.step_report import StepReport
from grpo.types import Prompt

When = Literal["before", "after"]


class HeldOut:
    """Evaluates the run's policy on the recipe's held-out prompts. All ranks call alike; rank 0 writes eval.json."""

    def __init__(
        self,
        config: RunConfig,
        parts: RunParts,
        directory: RunDirectory,
        journal: Journal,
        *,
        begin: Callable[[str, str | int], None],
        note: Callable[[str], None],
    ) -> None:
        """Args: begin: is told ("eval", when) before each, or ("eval", step); note: tells the person something."""
        self._config, self._parts, self._directory, self._journal = config, parts, directory, journal
        self._begin, self._note = begin, note
        self._last: list[Answer] | None = None
        """Of the last evaluation of this process during the run."""

    def before(self, *, is_untrained: bool) -> list[Answer] | None:
        """Answers of the untrained policy, made now or read back; None where there are none to compare with."""
        if not self._config.eval.before:
            return None
        prompts, saved = self._prompts(), self._saved("before")
        if (answers := _answers_from(saved, prompts)) is not None:
            return answers
        if is_untrained:
            return self.evaluate("before", None)
        why = (
            f"the answers before training are to {len(saved)} held-out prompts, now there are {len(prompts)} or others"
            if saved
            else "eval.before was not made before this run was interrupted"
        )
        self._note(f"{why}; there will be no difference")
        return None

    def during(self, report: StepReport) -> StepReport:
        """The report of a step that the engine has learned of, with what an evaluation after it has shown; as it is
        where none is due."""
        if not self._config.eval.is_due(report.step):
            return report
        started = time.perf_counter()
        earlier = self._last if self._last is not None else self._kept()
        self._last = answers = self._asked(report.step)
        shown = figures(answers, {answer.prompt.id: answer for answer in earlier})
        shown[names.time_name("eval")] = time.perf_counter() - started
        return replace(
            report,
            row={**report.row, **shown},
            answers=[{"step": report.step, **_entry_of(answer)} for answer in answers],
        )

    def evaluate(self, when: When, before: list[Answer] | None) -> list[Answer]:
        """Answer, score and write down. Args: before: what to compare with.

        After training these are the last step's answers where it was evaluated: the policy is the same.
        """
        ranks = self._parts.ranks
        answers = self._kept_of(self._config.steps) if when == "after" else None
        if answers is None:
            self._note(f"evaluating on held-out prompts {when} training")
            answers = self._asked(when)
        evaluation = self.read()
        evaluation[when] = summarise(answers)
        if bias := bias_of(answers):
            evaluation.setdefault("bbq", {})[when] = bias
        evaluation.setdefault("answers", {})[when] = [_entry_of(answer) for answer in answers]
        if before is not None:
            evaluation["difference"] = compare(before, answers)
            evaluation["examples"] = examples(before, answers)
        ranks.on_main(lambda: self._directory.write_eval(evaluation))
        ranks.on_main(lambda: self._journal.forget(f"eval-{when}"))
        return answers

    def read(self) -> dict[str, Any]:
        """What eval.json holds; empty where nothing was evaluated."""
        return self._parts.ranks.on_main(self._directory.read_eval)

    def _asked(self, when: When | int) -> list[Answer]:
        """Answers of the engine's policy, as it is now."""
        parts = self._parts
        self._begin("eval", when)
        prompts = parts.encode(self._prompts())
        answers = evaluate(parts.engine, parts.eval_scorer, prompts, params=parts.params, ranks=parts.ranks)
        parts.ranks.together(self._journal.check)
        return answers

    def _kept(self) -> list[Answer]:
        """Of the last evaluation that this run has written down: one during it, else the one before it."""
        entries = self._parts.ranks.on_main(self._directory.last_answers)
        by_id = {entry["id"]: entry for entry in entries} if entries else self._saved("before")
        return [_answer_from(by_id[prompt.id], prompt) for prompt in self._prompts() if prompt.id in by_id]

    def _kept_of(self, step: int) -> list[Answer] | None:
        """Of the evaluation after this step, written down; None where there was none, or one of other prompts."""
        entries = self._parts.ranks.on_main(self._directory.last_answers)
        if not entries or entries[0]["step"] != step:
            return None
        return _answers_from({entry["id"]: entry for entry in entries}, self._prompts())

    def _saved(self, when: When) -> dict[str, Mapping[str, Any]]:
        """Prompt's id -> its entry in eval.json."""
        return {entry["id"]: entry for entry in self.read().get("answers", {}).get(when, [])}

    def _prompts(self) -> list[Prompt]:
        return self._parts.prompts.held_out(self._config.eval.num_prompts)


def _entry_of(answer: Answer) -> dict[str, Any]:
    return {"id": answer.prompt.id, "completion": answer.completion, "scores": dict(answer.scores)}


def _answer_from(entry: Mapping[str, Any], prompt: Prompt) -> Answer:
    return Answer(prompt=prompt, completion=entry["completion"], scores=entry["scores"])


def _answers_from(entries: Mapping[str, Mapping[str, Any]], prompts: Sequence[Prompt]) -> list[Answer] | None:
    """None where the entries are not of these very prompts."""
    if entries.keys() != {prompt.id for prompt in prompts}:
        return None
    return [_answer_from(entries[prompt.id], prompt) for prompt in prompts]
