"""A judge's reply -> a verdict, and the JSON schema that asks for one. Knows no prompts and no HTTP.

A verdict is the last JSON object in the reply that carries the call's nonce. When that one is wrong, no earlier one is
taken instead: a judge that corrects itself must not be misread, and a text that quotes a verdict must not be believed.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from judges.errors import InvalidVerdict
from judges.strict_json import NestedTooDeeply, strict_parse_at

Mode: TypeAlias = Literal["pointwise", "groupwise", "pairwise"]
"""One text a call; all texts of a group in one call; two texts a call."""

Model = TypeVar("Model", bound="VerdictModel")

TIE = "tie"
VERDICT_TAIL_CHARS = 65_536
"""Only the reply's end is read: a reply of 1 MiB of braces must not cost seconds."""
MAX_BROKEN_OBJECTS = 500


class VerdictModel(BaseModel):
    """Strict: no conversions ("8/10" and true are no numbers), no unknown keys, no NaN and no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class PointVerdict(VerdictModel):
    """What is asked of a judge about one text. The reason stands first: a score written first is only defended."""

    nonce: str
    reason: str = ""
    score: float


class GroupEntry(VerdictModel):
    """About one of several texts."""

    id: str
    reason: str = ""
    score: float


class GroupVerdict(VerdictModel):
    """About all texts of a group."""

    nonce: str
    verdicts: list[Any]  # entries are checked one by one: one bad entry must not cost the others


class PairVerdict(VerdictModel):
    """About two texts."""

    nonce: str
    reason: str = ""
    winner: str


class GroupForm(VerdictModel):
    """`GroupVerdict` as the schema asks for it."""

    nonce: str
    verdicts: list[GroupEntry]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextVerdict:
    """What a reply says of one text."""

    score: float
    """Finite, within the scale."""
    raw: str
    """The JSON object that says so."""


def verdict_schema(mode: Mode, *, low: float, high: float) -> dict[str, Any]:
    """The JSON schema of a verdict, the same for every call: servers compile and cache a schema.

    Every key is required and none may be added, as OpenAI's and Anthropic's strict modes want it.
    """
    model = {"pointwise": PointVerdict, "groupwise": GroupForm, "pairwise": PairVerdict}[mode]
    schema = model.model_json_schema()
    return _as_strict(schema, schema.get("$defs", {}), {"minimum": low, "maximum": high})


def parse_verdict(text: str, *, nonce: str, low: float, high: float) -> float:
    """The score of one text.

    Args:
        text: the judge's whole reply; only its last 64 Ki characters are read.
        nonce: what the verdict must repeat.
        low: the scale's worst score.
        high: the scale's best score.
    Returns:
        Finite, low <= score <= high.
    Raises:
        InvalidVerdict: no such object, not strict JSON, or no number within the scale. Safe to log: says no secret.
    """
    content = _last_object(nonce, text)
    return _in_scale(_checked(PointVerdict, content).score, low=low, high=high)


def parse_group_verdict(
    text: str, *, nonce: str, ids: Collection[str], low: float, high: float
) -> dict[str, TextVerdict]:
    """The scores of several texts, by id, in any order. An id without a usable entry is absent, never filled in.

    Raises:
        InvalidVerdict: as `parse_verdict`; an id that was not asked about, or one that comes twice: then nobody knows
            which text the judge meant.
    """
    content = _last_object(nonce, text)
    entries = _checked(GroupVerdict, content).verdicts
    named = [entry.get("id") if isinstance(entry, dict) else None for entry in entries]
    if unknown := [one for one in named if not isinstance(one, str) or one not in ids]:
        raise InvalidVerdict(f"the verdict has {len(unknown)} entries with an id that was not asked about")
    if len(set(named)) < len(named):
        raise InvalidVerdict("the verdict has an id twice")
    verdicts: dict[str, TextVerdict] = {}
    for entry in entries:
        try:
            score = _in_scale(_checked(GroupEntry, entry).score, low=low, high=high)
        except InvalidVerdict:  # this id's verdict stays missing; the others of the reply hold
            continue
        verdicts[entry["id"]] = TextVerdict(score=score, raw=json.dumps(entry, ensure_ascii=False))
    if not verdicts:
        raise InvalidVerdict("the verdict has no usable entry")
    return verdicts


def parse_pair_verdict(text: str, *, nonce: str, ids: Collection[str]) -> str | None:
    """The id of the better text; None for a tie.

    Raises:
        InvalidVerdict: as `parse_verdict`; or the winner is neither of the two, nor "tie".
    """
    content = _last_object(nonce, text)
    winner = _checked(PairVerdict, content).winner
    if winner != TIE and winner not in ids:
        raise InvalidVerdict('the verdict\'s winner is neither one of the two ids nor "tie"')
    return None if winner == TIE else winner


def _last_object(nonce: str, text: str) -> dict[str, Any]:
    """The last object that carries the nonce, in a reply of which no broken object carries it."""
    text = text[-VERDICT_TAIL_CHARS:]
    last, position, num_broken, problem = None, 0, 0, "cut off"
    rest: list[str] = []  # what stands outside of whole objects
    while (start := text.find("{", position)) >= 0:
        try:
            content, end = strict_parse_at(text, start)
        except ValueError as exc:
            num_broken += 1
            if num_broken > MAX_BROKEN_OBJECTS or isinstance(exc, NestedTooDeeply):
                raise InvalidVerdict("the reply is a heap of braces") from None
            content, end, problem = None, start + 1, str(exc)
        rest.append(text[position : end if content is None else start])
        position = end
        if isinstance(content, dict) and content.get("nonce") == nonce:
            last = content
    outside = "".join([*rest, text[position:]])
    brace = outside.find("{")
    if brace >= 0 and nonce in outside[brace:]:
        raise InvalidVerdict(f"the reply holds a malformed JSON object with the nonce: {problem}")
    if last is None:
        raise InvalidVerdict("the reply holds no JSON object with this call's nonce")
    return last


def _checked(model: type[Model], content: Any) -> Model:
    try:
        return model.model_validate(content)
    except ValidationError as exc:
        error = exc.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in error["loc"])[:40]
        raise InvalidVerdict(f"the verdict is not of the form asked for: {place}: {error['msg'][:80]}") from None


def _in_scale(score: float, *, low: float, high: float) -> float:
    if not low <= score <= high:  # false for NaN and infinities too
        raise InvalidVerdict(f"the verdict's score is outside the scale {low:g} to {high:g}")
    return score


def _as_strict(node: Any, definitions: dict[str, Any], bounds: dict[str, float]) -> Any:
    """Definitions inlined, all keys required, scores bounded; no titles and no defaults: strict modes refuse them."""
    if isinstance(node, list):
        return [_as_strict(one, definitions, bounds) for one in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _as_strict(definitions[node["$ref"].rpartition("/")[2]], definitions, bounds)
    if node.get("type") == "object":
        properties = {
            name: _as_strict(one, definitions, bounds) | (bounds if name == "score" else {})
            for name, one in node["properties"].items()
        }
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    kept = {key: value for key, value in node.items() if key not in ("title", "default", "description")}
    return {key: _as_strict(value, definitions, bounds) for key, value in kept.items()}
