"""Dataset (task, file or hub name) -> batches of Prompt, and Prompt -> token ids.

Batches are a pure function of (config, seed, step): the cursor of a resumed run is its step. Knows no rewards.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from grpo.config import FilePrompts, HubPrompts, PromptsConfig, TaskPrompts
from grpo.errors import DatasetError
from grpo.formats.registry import read_question
from grpo.tasks.base import Split, Task, drawn
from grpo.tasks.registry import get_task
from grpo.types import Message, Prompt

CHECKED_PER_TASK = 64
"""Scenes of each task whose length is looked at before a run begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt as the model reads it."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    """[T_prompt] the rendered chat, up to where the assistant's answer begins."""


class PromptSource(Protocol):
    """Where prompts come from."""

    def batch(self, step: int) -> list[Prompt]:
        """The P prompts of a step (counted from 1); the same step always gives the same prompts."""
        ...

    def spares(self, step: int, round_number: int, places: Sequence[int]) -> dict[int, Prompt]:
        """Other prompts for some places of a step's batch, scored for the same objectives; for fewer places where
        there are no more. The same arguments always give the same prompts, and no two rounds of a step share one."""
        ...

    def held_out(self, num_per_objective: int) -> list[Prompt]:
        """Prompts that training never sees, at most so many per objective; empty where there are none."""
        ...

    def objective_sets(self) -> list[tuple[str, ...]]:
        """Which sets of objectives the prompts ask for."""
        ...

    def to_check(self) -> list[Prompt]:
        """Prompts that must fit the model's context before a run begins: all, or a sample where there is no end."""
        ...


def open_prompts(config: PromptsConfig, *, seed: int, objectives: Sequence[str]) -> PromptSource:
    """Open the recipe's prompts.

    Raises:
        DatasetError: missing, empty or unreadable, or a column is missing.
        ConfigError: unknown task.
    """
    if isinstance(config, TaskPrompts):
        return TaskSource([get_task(name) for name in config.names], per_step=config.per_step, seed=seed)
    wanted = config.objectives or tuple(objectives)
    if isinstance(config, FilePrompts):
        prompts = _to_prompts(read_rows(config.path), config, wanted, source=str(config.path))
        held_out = (
            _to_prompts(read_rows(config.held_out_path), config, wanted, source=str(config.held_out_path))
            if config.held_out_path
            else []
        )
    else:
        prompts = _to_prompts(_read_hub(config, config.split), config, wanted, source=config.name)
        held_out = (
            _to_prompts(_read_hub(config, config.held_out_split), config, wanted, source=config.name)
            if config.held_out_split
            else []
        )
    if config.per_step > len(prompts):
        raise DatasetError(
            f"prompts.per_step is {config.per_step}, but the dataset has {len(prompts)} prompts, and a step asks "
            f"each at most once. Set prompts.per_step={len(prompts)} or lower; more completions of each are "
            "rollout.group_size."
        )
    return ListSource(prompts, held_out, per_step=config.per_step, seed=seed)


class TaskSource:
    """Generated scenes, the tasks taking turns."""

    def __init__(self, tasks: Sequence[Task], *, per_step: int, seed: int) -> None:
        self._tasks, self._per_step, self._seed = list(tasks), per_step, seed

    def batch(self, step: int) -> list[Prompt]:
        """Prompts (step - 1) * P ... step * P - 1 of the endless train split."""
        numbers = range((step - 1) * self._per_step, step * self._per_step)
        return [self._prompt(n, "train") for n in numbers]

    def spares(self, step: int, round_number: int, places: Sequence[int]) -> dict[int, Prompt]:
        """Scenes of the same tasks from a stream of their own."""
        first = (step - 1) * self._per_step
        stream = drawn(f"{self._seed}/spares/{round_number}").getrandbits(62)
        return {place: self._prompt(first + place, "train", stream) for place in places}

    def held_out(self, num_per_objective: int) -> list[Prompt]:
        """The first scenes of the held-out split; the same for every seed, so that runs can be compared."""
        return [task.prompt("held_out", 0, n) for task in self._tasks for n in range(num_per_objective)]

    def to_check(self) -> list[Prompt]:
        """The first scenes of each task, by far more than it has wordings and kinds; the first step at least."""
        num_checked = max(CHECKED_PER_TASK * len(self._tasks), self._per_step)
        return [self._prompt(n, "train") for n in range(num_checked)]

    def objective_sets(self) -> list[tuple[str, ...]]:
        """One objective per task."""
        return [(task.objective,) for task in self._tasks]

    def _prompt(self, number: int, split: Split, seed: int | None = None) -> Prompt:
        task = self._tasks[number % len(self._tasks)]
        return task.prompt(split, self._seed if seed is None else seed, number // len(self._tasks))


class ListSource:
    """Prompts that are all known, at least P of them, shuffled anew in every epoch; no step holds one twice."""

    def __init__(self, prompts: Sequence[Prompt], held_out: Sequence[Prompt], *, per_step: int, seed: int) -> None:
        self._prompts, self._held_out = list(prompts), list(held_out)
        self._per_step, self._seed = per_step, seed
        assert per_step <= len(self._prompts), "open_prompts refuses it"
        self._last_order = (0, self._shuffled(0))

    def batch(self, step: int) -> list[Prompt]:
        """P prompts; an epoch's end and the next one's beginning may share a step."""
        numbers = range((step - 1) * self._per_step, step * self._per_step)
        orders = {n // len(self._prompts): self._order(n // len(self._prompts)) for n in numbers}
        return [self._prompts[orders[n // len(self._prompts)][n % len(self._prompts)]] for n in numbers]

    def spares(self, step: int, round_number: int, places: Sequence[int]) -> dict[int, Prompt]:
        """Prompts that the step does not hold, drawn from all of the dataset."""
        batch = self.batch(step)
        in_use = {prompt.id for prompt in batch}
        unused = [prompt for prompt in self._prompts if prompt.id not in in_use]
        random.Random(f"{self._seed}/spares/{step}").shuffle(unused)  # one order for all rounds: each takes a stretch
        chosen: dict[int, Prompt] = {}
        for place in places:
            wanted = batch[place].objectives
            fitting = [prompt for prompt in unused if prompt.objectives == wanted]
            alike = [other for other, prompt in enumerate(batch) if prompt.objectives == wanted]
            at = (round_number - 1) * len(alike) + alike.index(place)
            if at < len(fitting):
                chosen[place] = fitting[at]
        return chosen

    def held_out(self, num_per_objective: int) -> list[Prompt]:
        """The first rows of the held-out file."""
        count: dict[tuple[str, ...], int] = {}
        chosen: list[Prompt] = []
        for prompt in self._held_out:
            count[prompt.objectives] = count.get(prompt.objectives, 0) + 1
            if count[prompt.objectives] <= num_per_objective:
                chosen.append(prompt)
        return chosen

    def to_check(self) -> list[Prompt]:
        """All of them: the long one must be found now, not in step 400."""
        return list(self._prompts)

    def objective_sets(self) -> list[tuple[str, ...]]:
        """All sets that occur."""
        return sorted({prompt.objectives for prompt in [*self._prompts, *self._held_out]})

    def _order(self, epoch: int) -> list[int]:
        """The epoch's order. Each depends on the one before: what ends one epoch may not begin the next in one step."""
        at, order = self._last_order if self._last_order[0] <= epoch else (0, self._shuffled(0))
        for following in range(at + 1, epoch + 1):
            num_shared = following * len(order) % self._per_step  # prompts of the old epoch in the step they share
            taken = set(order[len(order) - num_shared :])
            shuffled = self._shuffled(following)
            head = [n for n in shuffled if n not in taken][: self._per_step - num_shared] if taken else []
            order = list(dict.fromkeys([*head, *shuffled]))
        self._last_order = (epoch, order)
        return order

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None) -> EncodedPrompt:
    """Render the chat and tokenise it.

    Args:
        max_tokens: room in the model's context, completion already taken off; None where the context has no end.
    Raises:
        DatasetError: the prompt does not fit, or the tokenizer has no chat template.
    """
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    try:
        rendered: Any = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},  # its warning of a long prompt would say the error below, worse
        )
    except (ValueError, TemplateError) as exc:  # a template refuses what it cannot render, such as a system message
        raise DatasetError(f"prompt {prompt.id!r} cannot be rendered as a chat: {exc}") from exc
    token_ids = tuple(int(token) for token in rendered["input_ids"])
    if max_tokens is not None and len(token_ids) > max_tokens:
        raise DatasetError(
            f"prompt {prompt.id!r} has {len(token_ids)} tokens, but the model's context leaves {max(max_tokens, 0)} "
            "for a prompt beside rollout.max_new_tokens. Shorten the prompt or lower rollout.max_new_tokens."
        )
    return EncodedPrompt(prompt=prompt, token_ids=token_ids)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A file's rows: JSON lines, a JSON list, or CSV with a header. Raises DatasetError."""
    if not path.is_file():
        raise DatasetError(f"no dataset at {path}. Relative paths are resolved against the recipe's folder.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark at the beginning
    except (OSError, UnicodeDecodeError) as exc:
        raise DatasetError(f"{path} cannot be read as UTF-8 text: {exc}. Give a .jsonl or .json file.") from exc
    if path.suffix == ".csv":
        return [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
    if path.suffix == ".json" and text.lstrip().startswith("["):  # some publish JSON lines under that name
        rows = _parse_json(text, place=str(path))
    else:
        lines = enumerate(text.split("\n"), start=1)  # splitlines would also split at U+2028, inside a text
        rows = [_parse_json(line, place=f"{path} line {number}") for number, line in lines if line.strip()]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DatasetError(f"{path} row {number} is {type(row).__name__}, expected an object with columns")
    return rows


def _parse_json(text: str, *, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as exc:
        raise DatasetError(
            f"{place} is not JSON: {exc}. Expected one object a line (.jsonl) or a list (.json)."
        ) from exc


def _read_hub(config: HubPrompts, split: str) -> list[dict[str, Any]]:
    import datasets  # slow to import, and only this door needs it

    try:
        return [dict(row) for row in datasets.load_dataset(config.name, config.subset, split=split)]
    except (OSError, ValueError) as exc:
        raise DatasetError(
            f"dataset {config.name!r} (subset {config.subset}, split {split!r}) cannot be loaded: {exc}. "
            "Check the name and the connection, or give a file with prompts.type=file."
        ) from exc


def _to_prompts(
    rows: Sequence[Mapping[str, Any]], config: FilePrompts | HubPrompts, objectives: tuple[str, ...], *, source: str
) -> list[Prompt]:
    if not rows:
        raise DatasetError(f"{source} is empty: it holds no prompt")
    if config.format != "plain":
        return _of_public_form(rows, config, objectives, source=source)
    prompts = [_to_prompt(n, row, config, objectives, source=source) for n, row in enumerate(rows)]
    ids = [prompt.id for prompt in prompts]
    twice = [prompt_id for prompt_id, count in Counter(ids).items() if count > 1]
    if twice:
        raise DatasetError(
            f"{source} has the same id twice: {twice[0]!r}. Give every row its own, or drop the column: "
            "rows are then numbered."
        )
    return prompts


def _of_public_form(
    rows: Sequence[Mapping[str, Any]], config: FilePrompts | HubPrompts, objectives: tuple[str, ...], *, source: str
) -> list[Prompt]:
    """Published files repeat some questions: the second of an id is numbered."""
    seen: Counter[str] = Counter()
    prompts: list[Prompt] = []
    for number, row in enumerate(rows, start=1):
        question = read_question(config.format, row, place=f"{source} row {number}")
        seen[question.id] += 1
        prompts.append(
            Prompt(
                id=question.id if seen[question.id] == 1 else f"{question.id}-{seen[question.id]}",
                messages=(Message(role="user", content=question.text),),
                objectives=objectives,
                reference=question.reference,
                meta=question.meta,
            )
        )
    return prompts


def _to_prompt(
    number: int, row: Mapping[str, Any], config: FilePrompts | HubPrompts, objectives: tuple[str, ...], *, source: str
) -> Prompt:
    place = f"{source} row {number + 1}"
    if config.prompt_column not in row:
        raise DatasetError(
            f"{place} has no column {config.prompt_column!r}; it has {sorted(row)}. "
            "Name the right one with prompts.prompt_column."
        )
    reference = row.get(config.reference_column)
    used = {config.prompt_column, config.reference_column, "id", "objectives"}
    return Prompt(
        id=str(number if row.get("id") is None else row["id"]),
        messages=to_messages(row[config.prompt_column], place=place),
        objectives=objectives if config.objectives else _objectives(row.get("objectives"), objectives, place=place),
        reference=None if reference is None else str(reference),
        meta={key: value for key, value in row.items() if key not in used},
    )


def _objectives(value: Any, default: tuple[str, ...], *, place: str) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value  # a text is one name, not its letters
    if isinstance(names, list | tuple | None) and all(isinstance(name, str) for name in names or ()):
        return tuple(names) if names else default
    raise DatasetError(f"{place}: objectives is {value!r}; expected a name or a list of names")


def to_messages(value: Any, *, place: str) -> tuple[Message, ...]:
    if isinstance(value, str) and value.strip():
        return (Message(role="user", content=value),)
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        if value[-1].get("role") != "user":
            raise DatasetError(f"{place}: the last message must be the user's, got role {value[-1].get('role')!r}")
        roles_fit = all(turn.get("role") in {"system", "user", "assistant"} for turn in value)
        if roles_fit and all(isinstance(turn.get("content"), str) for turn in value):
            return tuple(Message(role=turn["role"], content=turn["content"]) for turn in value)
    raise DatasetError(f"{place}: a prompt is a text that is not empty, or a list of {{role, content}} messages")
