"""Does the completion have the asked-for shape? 1 or 0. Needs no reference."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from rewards.answer_text import TagName
from rewards.config import StrictModel
from rewards.processes import Finished, ProcessPool, score_at_limit
from rewards.types import RewardInput, Score

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL | re.IGNORECASE)


class Format(StrictModel):
    """1 where the completion, stripped, meets every condition that is set, else 0."""

    pattern: str | None = None
    """Regular expression that the whole completion must match; flags inline, as in "(?s)<think>.*</think>.*"."""
    tags: list[TagName] = Field(default_factory=list)
    """With [think, answer]: <think>...</think> and then <answer>...</answer>, each exactly once and not empty."""
    text_around_tags: bool = True
    """Whether anything but white space may stand outside of the tags."""
    json_schema: dict[str, Any] | None = None
    """JSON Schema (2020-12, or what its "$schema" says) that the whole completion must meet as JSON; a ```json fence
    around it is allowed. {} asks for any JSON. References to other documents are not followed."""
    max_words: int | None = Field(None, gt=0)
    """Most words, separated by white space."""
    one_line: bool = False
    """No line break inside."""
    timeout_s: float = Field(2.0, gt=0)
    """Longest wall time of one completion's pattern and schema; they run in a process that is killed then."""
    limit_score: float | None = Field(None, allow_inf_nan=False)
    """Score of a completion on which they take longer; None leaves it missing."""

    _pool: ProcessPool = PrivateAttr()

    def model_post_init(self, _: object) -> None:
        self._pool = ProcessPool(
            "rewards.format:pattern_or_schema_problem",
            timeout_s=self.timeout_s,
            warm_up=(self.pattern, self.json_schema, "{}"),
        )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as exc:
            raise ValueError(f"not a regular expression: {exc}") from exc
        return pattern

    @field_validator("json_schema")
    @classmethod
    def _is_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is None:
            return None
        from jsonschema import SchemaError  # late: only who asks for a schema waits for it
        from jsonschema.validators import Draft202012Validator, validator_for

        try:
            validator_for(schema, default=Draft202012Validator).check_schema(schema)
        except SchemaError as exc:
            raise ValueError(f"not a JSON Schema: {exc.message} at {exc.json_path}") from exc
        return schema

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        asked = (self.pattern, self.json_schema, self.max_words)
        if all(one is None for one in asked) and not self.tags and not self.one_line:
            raise ValueError("nothing is asked for; set pattern, tags, json_schema, max_words or one_line")
        if len(set(self.tags)) < len(self.tags):
            raise ValueError("a tag is named twice; each stands in the completion once")
        return self

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per completion; missing only where pattern or schema take longer than allowed."""
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._score_one(one.completion.strip())) for one in inputs]
        return [task.result() for task in running]

    async def aclose(self) -> None:
        """End the worker processes."""
        await self._pool.aclose()

    async def _score_one(self, text: str) -> Score:
        problem = self._cheap_problem(text)
        if not problem and (self.pattern is not None or self.json_schema is not None):
            outcome = await self._pool.call(self.pattern, self.json_schema, text)
            if not isinstance(outcome, Finished):
                return score_at_limit(outcome, self.limit_score)
            problem = outcome.value
        return Score(value=0.0 if problem else 1.0, reason=problem or "has the asked-for format")

    def _cheap_problem(self, text: str) -> str:
        if not text:
            return "empty completion"
        num_words = len(text.split())
        if self.max_words is not None and num_words > self.max_words:
            return f"{num_words} words, at most {self.max_words} were asked for"
        if self.one_line and len(text.splitlines()) > 1:
            return "more than one line"
        return tags_problem(text, self.tags, text_around=self.text_around_tags)


def tags_problem(text: str, tags: Sequence[str], *, text_around: bool = True) -> str:
    """What keeps the text from having each tag once, in order, not empty and none inside another; "" for nothing."""
    position = 0
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if (text.count(opening), text.count(closing)) != (1, 1):
            return f"{opening}...{closing} is not there exactly once"
        start, end = text.find(opening), text.find(closing)
        if start < position:
            return f"{opening} is out of order"
        inside_start = start + len(opening)
        if not text[inside_start:end].strip():
            return f"nothing inside {opening}...{closing}"
        if not text_around and text[position:start].strip():
            return f"text before {opening}"
        position = end + len(closing)
    if tags and not text_around and text[position:].strip():
        return f"text after </{tags[-1]}>"
    return ""


def pattern_or_schema_problem(pattern: str | None, schema: Mapping[str, Any] | None, text: str) -> str:
    """What keeps the text from matching; called in a worker process, for either may take for ever."""
    if pattern is not None and not re.fullmatch(pattern, text):
        return "does not match the pattern"
    return "" if schema is None else _schema_problem(schema, text)


def _schema_problem(schema: Mapping[str, Any], text: str) -> str:
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    fenced = _FENCE.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:
        return f"not JSON: {exc}"
    validator = validator_for(schema, default=Draft202012Validator)(
        schema, registry=Registry()
    )  # which fetches nothing
    error = next(validator.iter_errors(value), None)
    return "" if error is None else f"JSON does not meet the schema at {error.json_path}: {error.message}"[:300]


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
