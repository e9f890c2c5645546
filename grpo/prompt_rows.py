"""Rows of a data file -> Prompt: their columns, their formats. Knows files; knows no model and no order."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.config import FilePrompts, HubPrompts
from grpo.errors import DatasetError
from grpo.formats.registry import read_question
from grpo.prompt_images import image_paths, parts_as_text, with_images
from grpo.types import Message, Prompt


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


def read_hub(config: HubPrompts, split: str) -> list[dict[str, Any]]:
    """A hub dataset's rows. Raises DatasetError."""
    import datasets  # slow to import, and only this door needs it

    try:
        return [dict(row) for row in datasets.load_dataset(config.name, config.subset, split=split)]
    except (OSError, ValueError) as exc:
        raise DatasetError(
            f"dataset {config.name!r} (subset {config.subset}, split {split!r}) cannot be loaded: {exc}. "
            "Check the name and the connection, or give a file with prompts.type=file."
        ) from exc


def to_prompts(
    rows: Sequence[Mapping[str, Any]],
    config: FilePrompts | HubPrompts,
    objectives: tuple[str, ...],
    *,
    source: str,
    folder: Path = Path(),
) -> list[Prompt]:
    """Rows as prompts.

    Args:
        objectives: of a row that names none itself.
        source: the dataset, for messages.
        folder: what paths of images are relative to.
    Raises:
        DatasetError: there is none, a column is missing, or a row cannot be used.
    """
    if not rows:
        raise DatasetError(f"{source} is empty: it holds no prompt")
    if config.format != "plain":
        return _of_public_form(rows, config, objectives, source=source)
    prompts = [_to_prompt(n, row, config, objectives, source=source, folder=folder) for n, row in enumerate(rows)]
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
    number: int,
    row: Mapping[str, Any],
    config: FilePrompts | HubPrompts,
    objectives: tuple[str, ...],
    *,
    source: str,
    folder: Path,
) -> Prompt:
    place = f"{source} row {number + 1}"
    if config.prompt_column not in row:
        raise DatasetError(
            f"{place} has no column {config.prompt_column!r}; it has {sorted(row)}. "
            "Name the right one with prompts.prompt_column."
        )
    reference = row.get(config.reference_column)
    used = {config.prompt_column, config.reference_column, "id", "objectives"}
    if isinstance(config, FilePrompts) and config.images_column is not None:
        used.add(config.images_column)
        images = image_paths(row.get(config.images_column), folder, place=place)
        messages = to_messages(parts_as_text(row[config.prompt_column]), place=place)
        messages = with_images(messages, len(images), place=place)
    else:
        messages, images = to_messages(row[config.prompt_column], place=place), ()
    return Prompt(
        id=str(number if row.get("id") is None else row["id"]),
        messages=messages,
        objectives=objectives if config.objectives else _objectives(row.get("objectives"), objectives, place=place),
        reference=None if reference is None else str(reference),
        meta={key: value for key, value in row.items() if key not in used},
        images=images,
    )


def _objectives(value: Any, default: tuple[str, ...], *, place: str) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value  # a text is one name, not its letters
    if isinstance(names, list | tuple | None) and all(isinstance(name, str) for name in names or ()):
        return tuple(names) if names else default
    raise DatasetError(f"{place}: objectives is {value!r}; expected a name or a list of names")


def to_messages(value: Any, *, place: str) -> tuple[Message, ...]:
    """A column's text or chat as messages. Raises DatasetError."""
    if isinstance(value, str) and value.strip():
        return (Message(role="user", content=value),)
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        if value[-1].get("role") != "user":
            raise DatasetError(f"{place}: the last message must be the user's, got role {value[-1].get('role')!r}")
        roles_fit = all(turn.get("role") in {"system", "user", "assistant"} for turn in value)
        if roles_fit and all(isinstance(turn.get("content"), str) for turn in value):
            return tuple(Message(role=turn["role"], content=turn["content"]) for turn in value)
    raise DatasetError(f"{place}: a prompt is a text that is not empty, or a list of {{role, content}} messages")
