"""JudgeRequest -> prompt text, and reply text -> score. Knows templates and verdicts; knows no HTTP and no retries.

The text to be judged is hostile until proven otherwise: it was written by a model that is paid for a high score.
So it is rendered in one pass (nothing inside it is a placeholder), as a JSON string on one line, between marks that
carry a code drawn for this call; and only a verdict that repeats the code counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from judges.errors import InvalidVerdict, JudgeConfigError
from judges.types import JudgeRequest

TEMPLATES = Path(__file__).parent / "templates"
PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
PLACEHOLDERS = frozenset({"criterion", "question", "reference", "completion", "nonce", "low", "high"})
REQUIRED = frozenset({"completion", "nonce"})
FENCE = re.compile(r"^<<<(question|reference|completion) ([0-9a-f]{16})\n(.*)\n\1 \2>>>$", re.MULTILINE)
CHAT_MARK = re.compile(r"\[(?=/?[A-Z_]{2,}\])")
VERDICT_TAIL_CHARS = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Rubric:
    """A template that asks for a verdict."""

    name: str
    """The built-in's name, or the file's without its suffix."""
    template: str
    """Text with placeholders; has at least {completion} and {nonce}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedPrompt:
    """One prompt, ready to be sent."""

    text: str
    """The whole prompt."""
    nonce: str
    """16 hex digits, drawn for this call; the verdict must repeat them."""
    sha256: str
    """Of the text without the nonce: equal questions have equal hashes."""


def is_rubric_path(rubric: str) -> bool:
    """Whether a recipe's `rubric` names a file rather than a built-in."""
    return "/" in rubric or rubric.endswith(".txt")


def load_rubric(rubric: str) -> Rubric:
    """Read a built-in rubric by its name, or a file by its path.

    Raises:
        JudgeConfigError: there is no such rubric, or its placeholders are wrong.
    """
    path = Path(rubric) if is_rubric_path(rubric) else TEMPLATES / f"{rubric}.txt"
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        built_in = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.txt")))
        raise JudgeConfigError(
            f"rubric {rubric!r} cannot be read from {path} ({type(exc).__name__}). Expected one of {built_in}, "
            "or the path of a UTF-8 text file (with a / in it, or ending in .txt)."
        ) from exc
    found = set(PLACEHOLDER.findall(template))
    if unknown := found - PLACEHOLDERS:
        raise JudgeConfigError(
            f"rubric {path} has unknown placeholders {sorted(unknown)}; expected only {sorted(PLACEHOLDERS)}."
        )
    if missing := REQUIRED - found:
        raise JudgeConfigError(
            f"rubric {path} lacks {sorted(missing)}: it must show the completion, and ask for a JSON object "
            'like {"nonce": "{nonce}", "score": <number>}.'
        )
    return Rubric(name=path.stem, template=template)


def render_prompt(
    rubric: Rubric, request: JudgeRequest, *, low: float, high: float, max_input_chars: int = 8000
) -> RenderedPrompt:
    """Fill the template in one pass, with a fresh nonce.

    Args:
        rubric: the template.
        request: what is judged; its texts come out fenced, escaped and cut to max_input_chars.
        low: the scale's worst score.
        high: the scale's best score.
        max_input_chars: characters that each text may have before its middle is cut out.
    """
    nonce = secrets.token_hex(8)

    def fence(name: str, text: str) -> str:
        return f"<<<{name} {nonce}\n{_escape(_shorten(text, max_input_chars))}\n{name} {nonce}>>>"

    values = {
        "criterion": " ".join(request.criterion.split()),
        "question": fence("question", request.question),
        "reference": fence("reference", request.reference if request.reference is not None else "(none given)"),
        "completion": fence("completion", request.completion),
        "nonce": nonce,
        "low": f"{low:g}",
        "high": f"{high:g}",
    }
    text = PLACEHOLDER.sub(lambda match: values[match[1]], rubric.template)
    return RenderedPrompt(text=text, nonce=nonce, sha256=hashlib.sha256(text.replace(nonce, "").encode()).hexdigest())


def read_fences(text: str) -> tuple[str, dict[str, str]]:
    """The nonce and the fenced texts of a rendered prompt, by name: what a judge sees.

    Raises:
        ValueError: there is no fence, or two nonces.
    """
    fences = FENCE.findall(text)
    nonces = {nonce for _, nonce, _ in fences}
    if len(nonces) != 1:
        raise ValueError(f"expected fences with one nonce, found {len(nonces)}")
    return nonces.pop(), {name: json.loads(content) for name, _, content in fences}


def parse_verdict(text: str, *, nonce: str, low: float, high: float) -> float:
    """The score in the last JSON object that carries the nonce.

    Never falls back to an earlier object when the last is wrong: a judge that corrects itself must not be misread.

    Args:
        text: the judge's whole reply; only its last 16 KiB are read.
        nonce: what the verdict must repeat.
        low: the scale's worst score.
        high: the scale's best score.
    Returns:
        Finite, low <= score <= high.
    Raises:
        InvalidVerdict: no such object, not strict JSON, or no number within the scale. Safe to log: says no secret.
    """
    verdict, rest = _last_object_with(nonce, text[-VERDICT_TAIL_CHARS:])
    brace = rest.find("{")
    if brace >= 0 and nonce in rest[brace:]:
        raise InvalidVerdict("the reply ends in a malformed JSON object with the nonce")
    if verdict is None:
        raise InvalidVerdict("the reply holds no JSON object with this call's nonce")
    if verdict.faults:
        raise InvalidVerdict(f"the verdict is not strict JSON: {verdict.faults[0]}")
    score = verdict.content.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise InvalidVerdict(f"the verdict's score must be a number, not {type(score).__name__}")
    if not low <= score <= high:  # false for NaN and infinities too
        raise InvalidVerdict(f"the verdict's score is outside the scale {low:g} to {high:g}")
    return float(score)


@dataclass(frozen=True, slots=True)
class _Parsed:
    content: dict[str, Any]
    faults: list[str]


def _last_object_with(nonce: str, text: str) -> tuple[_Parsed | None, str]:
    """The last JSON object whose "nonce" is the nonce, and the text behind it."""
    last, end_of_last, position = None, 0, 0
    while (start := text.find("{", position)) >= 0:
        try:
            parsed, position = _parse_at(text, start)
        except (ValueError, RecursionError):
            position = start + 1
            continue
        if parsed.content.get("nonce") == nonce:
            last, end_of_last = parsed, position
    return last, text[end_of_last:]


def _parse_at(text: str, start: int) -> tuple[_Parsed, int]:
    faults: list[str] = []

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            faults.append("a key comes twice")
        return content

    def no_constant(name: str) -> float:
        faults.append(f"{name} is not JSON")
        return math.nan

    decoder = json.JSONDecoder(object_pairs_hook=without_duplicates, parse_constant=no_constant)
    content, end = decoder.raw_decode(text, start)
    return _Parsed(content, faults), end


def _shorten(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    head = max_chars * 2 // 3
    tail = max_chars - head
    return f"{text[:head]} [... {len(text) - max_chars} characters cut ...] {text[-tail:]}"


def _escape(text: str) -> str:
    """A JSON string on one line, in which no mark of ours and no chat template's token can stand."""
    visible = "".join(
        char for char in text if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
    )
    quoted = json.dumps(visible, ensure_ascii=False).replace("<", "\\u003c").replace(">", "\\u003e")
    return CHAT_MARK.sub("\\\\u005b", quoted)
