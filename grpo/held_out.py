"""A run's evaluations before and after training, kept in eval.json, and read back when the run is resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from grpo.config import RunConfig
from grpo.evaluate import Answer, bias_of, compare, evaluate, examples, summarise
from grpo.journal import Journal
from grpo.preflight import RunParts
from grpo.prompts import EncodedPrompt
from grpo.run_directory import RunDirectory

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
        begin: Callable[[str, str], None],
        note: Callable[[str], None],
    ) -> None:
        """Args: begin: is told ("eval", when) before each; note: tells the person something."""
        self._config, self._parts, self._directory, self._journal = config, parts, directory, journal
        self._begin, self._note = begin, note

    def before(self, *, is_untrained: bool) -> list[Answer] | None:
        """Answers of the untrained policy, made now or read back; None where there are none to compare with."""
        if not self._config.eval.before:
            return None
        prompts = self._parts.prompts.held_out(self._config.eval.num_prompts)
        saved = {entry["id"]: entry for entry in self.read().get("answers", {}).get("before", [])}
        if saved.keys() == {prompt.id for prompt in prompts}:
            return [_answer_from(saved[prompt.id], prompt) for prompt in prompts]
        if is_untrained:
            return self.evaluate("before", None)
        why = (
            f"the answers before training are to {len(saved)} held-out prompts, now there are {len(prompts)} or others"
            if saved
            else "eval.before was not made before this run was interrupted"
        )
        self._note(f"{why}; there will be no difference")
        return None

    def evaluate(self, when: When, before: list[Answer] | None) -> list[Answer]:
        """Answer, score and write down. Args: before: what to compare with."""
        self._note(f"evaluating on held-out prompts {when} training")
        parts, ranks = self._parts, self._parts.ranks
        self._begin("eval", when)
        answers = evaluate(parts.engine, parts.eval_scorer, self._prompts(), params=parts.params, ranks=ranks)
        evaluation = self.read()
        evaluation[when] = summarise(answers)
        if bias := bias_of(answers):
            evaluation.setdefault("bbq", {})[when] = bias
        evaluation.setdefault("answers", {})[when] = [_entry_of(answer) for answer in answers]
        if before is not None:
            evaluation["difference"] = compare(before, answers)
            evaluation["examples"] = examples(before, answers)
        ranks.together(self._journal.check)
        ranks.on_main(lambda: self._directory.write_eval(evaluation))
        ranks.on_main(lambda: self._journal.forget(f"eval-{when}"))
        return answers

    def read(self) -> dict[str, Any]:
        """What eval.json holds; empty where nothing was evaluated."""
        return self._parts.ranks.on_main(self._directory.read_eval)

    def _prompts(self) -> list[EncodedPrompt]:
        return self._parts.encode(self._parts.prompts.held_out(self._config.eval.num_prompts))


def _entry_of(answer: Answer) -> dict[str, Any]:
    return {"id": answer.prompt.id, "completion": answer.completion, "scores": dict(answer.scores)}


def _answer_from(entry: Mapping[str, Any], prompt: Any) -> Answer:
    return Answer(prompt=prompt, completion=entry["completion"], scores=entry["scores"])
