"""A file of completions -> its rows, and the groups in which rewards see them. Imports no torch.

Comes in: JSON lines, a JSON list or CSV. Goes out: the rows as they were written, and one RolloutGroup for the rows
that belong together. Knows nothing of rewards.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.errors import DatasetError, InputError
from grpo.metrics import iter_json_lines
from grpo.types import Completion, Message, Prompt, RolloutGroup

_OWN_COLUMNS = frozenset(
    {"prompt", "prompt_id", "completion", "reference", "objectives", "finish_reason", "num_tokens"}
)
_WRITTEN_BY_RUNS = frozenset({"step", "index", "verdicts", "advantage"})
_FORM = "Expected JSON lines or CSV, each row with prompt and completion"


def read_completions(path: Path) -> list[dict[str, Any]]:
    """The file's rows; of a CSV, an empty cell is an absent value, but for an empty completion.

    Raises:
        InputError: it cannot be read, is damaged, or holds no row.
    """
    rows = _read_csv(path) if path.suffix.lower() == ".csv" else _read_json_list(path) or _read_json_lines(path)
    if not rows:
        raise DatasetError(f"{path} holds no completion. {_FORM}.")
    return rows


def group_completions(
    rows: Sequence[Mapping[str, Any]], *, objectives: Sequence[str], path: Path
) -> list[tuple[list[int], RolloutGroup]]:
    """Rows that belong together: (their places, the group).

    Rows of one `prompt_id` and `step` are one group, and further columns in which they differ are no prompt's: they
    are left out of `meta`. Without a `prompt_id`, rows that agree in everything but the completion are one.

    Args:
        objectives: the recipe's; a row without a column `objectives` asks for all of them.
        path: for messages.
    Raises:
        DatasetError: a row lacks something, or rows of one prompt_id have different prompts or references.
    """
    places_of: dict[tuple[Any, ...], list[int]] = {}
    for place, row in enumerate(rows):
        _check_row(row, objectives, f"{path} row {place + 1}")
        places_of.setdefault(_group_key(row), []).append(place)
    num_seen: Counter[str] = Counter()
    groups: list[tuple[list[int], RolloutGroup]] = []
    for (step, *_), places in places_of.items():
        own = [rows[place] for place in places]
        _check_agreement(own, places, path)
        key = prompt_key(own[0])
        num_seen[key] += 1
        again = f"/{num_seen[key]}" if step is None else f"@{step}"
        prompt = Prompt(
            id=key if num_seen[key] == 1 else key + again,  # an audit tells its calls apart by it
            messages=_messages(own[0]["prompt"]),
            objectives=_asked(own[0]) or tuple(objectives),
            reference=_reference(own[0]),
            meta=_common(own),
        )
        completions = tuple(_completion(row) for row in own)
        groups.append((places, RolloutGroup(prompt=prompt, prompt_token_ids=(), completions=completions)))
    return groups


def prompt_key(row: Mapping[str, Any]) -> str:
    """What the rows of one prompt have in common."""
    if row.get("prompt_id") is not None:
        return str(row["prompt_id"])
    return row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], ensure_ascii=False)


def kind_of(row: Mapping[str, Any]) -> str:
    """The kind of prompt, by which means are shown."""
    return str(row.get("kind") or _meta(row).get("kind") or "all")


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return list(iter_json_lines(path))
    except InputError as exc:
        raise DatasetError(f"{exc} A file of comma-separated values has a name that ends in .csv.") from exc


def _read_json_list(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a file that is one JSON list of objects, as .json files often are; None for any other."""
    if path.suffix.lower() != ".json":
        return None
    try:
        rows = json.loads(path.read_bytes(), parse_constant=lambda _: None)  # NaN is missing
    except (OSError, ValueError):
        return None  # JSON lines, or what is complained of as such
    return rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else None


def _read_csv(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a mark at the start
    except (OSError, UnicodeDecodeError) as exc:
        raise DatasetError(f"{path} cannot be read as UTF-8 text ({exc}). {_FORM}.") from exc
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows: list[dict[str, Any]] = []
    try:
        for number, row in enumerate(reader, start=1):
            if None in row:
                raise DatasetError(f"{path} row {number} has more cells than the header. Quote cells that hold commas.")
            rows.append({name: cell for name, cell in row.items() if cell or (name == "completion" and cell == "")})
    except csv.Error as exc:
        raise DatasetError(f"{path} is no CSV: {exc}. {_FORM}.") from exc
    return rows


def _check_row(row: Mapping[str, Any], objectives: Sequence[str], place: str) -> None:
    if not isinstance(row.get("completion"), str):
        raise DatasetError(f"{place} has no text in column 'completion'; it has {sorted(row)}.")
    if not _is_prompt(row.get("prompt")):
        raise DatasetError(
            f"{place} has no text in column 'prompt', nor messages that end with the user's; it has {sorted(row)}."
        )
    asked = row.get("objectives") or row.get("verdicts") or []
    if not isinstance(asked, list | dict | str) or any(name not in objectives for name in _asked(row)):
        raise DatasetError(
            f"{place} asks for objectives {asked!r}; the recipe has {list(objectives)}. Name those, as a list, or "
            "leave the column out."
        )
    num_tokens = row.get("num_tokens")
    if num_tokens is not None and not str(num_tokens).isdecimal():
        raise DatasetError(f"{place}: num_tokens is {num_tokens!r}; expected a whole number, or no such column.")


def _check_agreement(own: Sequence[Mapping[str, Any]], places: Sequence[int], path: Path) -> None:
    for column, read in (("prompt", lambda row: row["prompt"]), ("reference", _reference), ("objectives", _asked)):
        for row, place in zip(own, places, strict=True):
            if read(row) != read(own[0]):
                raise DatasetError(
                    f"{path}: rows {places[0] + 1} and {place + 1} have one prompt_id, {prompt_key(row)!r}, but "
                    f"different values in column {column!r}. Give every prompt an id of its own, or none."
                )


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return True
    return (
        isinstance(prompt, list)
        and all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in prompt)
        and bool(prompt)
        and all(turn.get("role") in ("system", "user", "assistant") for turn in prompt)
        and prompt[-1]["role"] == "user"
    )


def _group_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    if row.get("prompt_id") is not None:
        return (row.get("step"), str(row["prompt_id"]))
    rest = json.dumps([_meta(row), _asked(row)], sort_keys=True, default=str)
    return (row.get("step"), prompt_key(row), _reference(row), rest)


def _messages(prompt: str | list[dict[str, Any]]) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt),)
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in prompt)


def _asked(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The objectives that the row names: a list, or one name; a run's lines are asked about what they have."""
    asked = row.get("objectives") or row.get("verdicts") or ()
    return (asked,) if isinstance(asked, str) else tuple(asked)


def _reference(row: Mapping[str, Any]) -> str | None:
    """JSON's numbers and lists stand for their text, as a reward reads them."""
    reference = row.get("reference")
    return reference if reference is None or isinstance(reference, str) else json.dumps(reference, ensure_ascii=False)


def _meta(row: Mapping[str, Any]) -> dict[str, Any]:
    """What rewards look at beside the texts: a run's lines have it in `meta`, others as columns of their own."""
    if isinstance(row.get("meta"), Mapping):
        return dict(row["meta"])
    return {name: value for name, value in row.items() if name not in _OWN_COLUMNS | _WRITTEN_BY_RUNS}


def _common(own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns in which all rows agree."""
    metas = [_meta(row) for row in own]
    return {name: value for name, value in metas[0].items() if all(name in m and m[name] == value for m in metas)}


def _completion(row: Mapping[str, Any]) -> Completion:
    """As a reward sees it: the number of tokens is only known where a column has it."""
    return Completion(
        token_ids=(0,) * int(row.get("num_tokens") or 0),
        text=row["completion"],
        sampler_logprobs=(),
        finish_reason="length" if row.get("finish_reason") == "length" else "stop",
    )
