"""JudgeRequests -> prompt text. Knows templates; knows no HTTP, no verdicts and no retries.

The text to be judged is hostile until proven otherwise: it was written by a model that is paid for a high score.
So it is rendered in one pass (nothing inside it is a placeholder), as a JSON string on one line, between marks that
carry a code drawn for this call, with the instructions repeated behind it; and only a verdict that repeats the code
counts (`judges.verdicts`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import secrets
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from judges.errors import JudgeConfigError
from judges.types import JudgeRequest
from judges.verdicts import Mode

TEMPLATES = Path(__file__).parent / "templates"
PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
PLACEHOLDERS = frozenset(
    {"criterion", "question", "reference", "answers", "completion", "verdict", "nonce", "low", "high"}
)
FENCE = re.compile(
    r"^<<<(question|reference|completion(?: [0-9a-f]{4})?) ([0-9a-f]{16})\n(.*)\n\1 \2>>>$", re.MULTILINE
)
CHAT_MARK = re.compile(r"\[(?=/?[A-Z_]{2,}\])")
DOUBTFUL = re.compile(r"[^\n\t\x20-\x7e]")
"""What has to be looked up; the rest is seen. Looking up every character took half of a call's time."""
INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Unicode categories: controls, formats (zero-width, bidirectional), lone surrogates, private use, line separators."""
BLANK = frozenset(
    [0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]
)
"""Letters and marks that show nothing, variation selectors among them: they can carry a text that nobody sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rubric:
    """A template that asks for a verdict."""

    name: str
    """The built-in's name, or the file's without its suffix."""
    template: str
    """Text with placeholders; shows {answers} (or one {completion}), and has {verdict} (or spells one with {nonce})."""

    @property
    def can_compare(self) -> bool:
        """Whether it can show several answers: groupwise and pairwise judging need that."""
        return {"answers", "verdict"} <= set(PLACEHOLDER.findall(self.template))


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedPrompt:
    """One prompt, ready to be sent."""

    text: str
    """The whole prompt."""
    nonce: str
    """16 hex digits, drawn for this call; the verdict must repeat them."""
    sha256: str
    """Of the text without the nonce and the ids: equal questions have equal hashes."""
    ids: tuple[str, ...] = ()
    """[K] names of the answers, in the order of the requests, drawn for this call; none for a single answer."""


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
    if not found & {"answers", "completion"} or not found & {"verdict", "nonce"}:
        raise JudgeConfigError(
            f"rubric {path} lacks a placeholder: it must show the text to be judged, by {{answers}} or {{completion}}, "
            "and ask for a verdict, by {verdict} or in its own words with {nonce}."
        )
    return Rubric(name=path.stem, template=template)


def render_prompt(
    rubric: Rubric, request: JudgeRequest, *, low: float, high: float, max_input_chars: int = 8000
) -> RenderedPrompt:
    """Fill the template in one pass, about one text, with a fresh nonce.

    Args:
        rubric: the template.
        request: what is judged; its texts come out fenced, escaped and cut to max_input_chars.
        low: the scale's worst score.
        high: the scale's best score.
        max_input_chars: characters that each text may have before its middle is cut out.
    """
    return _render(rubric, [request], mode="pointwise", low=low, high=high, max_input_chars=max_input_chars)


def render_comparison(
    rubric: Rubric,
    requests: Sequence[JudgeRequest],
    *,
    mode: Mode,
    low: float,
    high: float,
    max_input_chars: int = 8000,
) -> RenderedPrompt:
    """The same about several texts that answer one question, in the order given, each under an id of its own.

    Args:
        rubric: a template with {answers} and {verdict}.
        requests: [K] texts that share question, reference and criterion; two of them for "pairwise".
        mode: "groupwise" asks for K scores, "pairwise" for the better one.
        low, high, max_input_chars: as for `render_prompt`.
    Raises:
        JudgeConfigError: the rubric can show one answer only.
        ValueError: the texts answer different questions, or are too few or too many for the mode.
    """
    if not rubric.can_compare:
        raise JudgeConfigError(
            f"rubric {rubric.name} shows one answer a call. To judge {mode}, let it show {{answers}} and end with "
            "{verdict}."
        )
    if len({(one.question, one.reference, one.criterion) for one in requests}) != 1:
        raise ValueError("the texts to be compared must answer one question by one criterion")
    if mode == "pointwise" or (mode == "pairwise" and len(requests) != 2):
        raise ValueError(f"{len(requests)} texts cannot be judged {mode} in one call")
    return _render(rubric, requests, mode=mode, low=low, high=high, max_input_chars=max_input_chars)


def _render(
    rubric: Rubric, requests: Sequence[JudgeRequest], *, mode: Mode, low: float, high: float, max_input_chars: int
) -> RenderedPrompt:
    first = requests[0]
    reference = first.reference if first.reference is not None else "(none given)"
    question, reference, *answers = [
        _escape(_shorten(text, max_input_chars))
        for text in (first.question, reference, *(one.completion for one in requests))
    ]

    def fill(nonce: str, ids: Sequence[str]) -> str:
        def fence(name: str, text: str) -> str:
            return f"<<<{name} {nonce}\n{text}\n{name} {nonce}>>>"

        names = ["completion"] if mode == "pointwise" else [f"completion {one}" for one in ids]
        scale = {"nonce": nonce, "low": f"{low:g}", "high": f"{high:g}"}
        fenced = "\n\n".join(fence(name, text) for name, text in zip(names, answers, strict=True))
        values = {
            **scale,
            "criterion": " ".join(first.criterion.split()),
            "question": fence("question", question),
            "reference": fence("reference", reference),
            "answers": fenced,
            "completion": fenced,
            "verdict": _substitute(_frame(mode), {**scale, "ids": ", ".join(ids)}),
        }
        return _substitute(rubric.template, values)

    nonce = secrets.token_hex(8)
    ids = () if mode == "pointwise" else _draw_ids(len(requests))
    unnamed = fill("", [str(index) for index in range(len(ids))])
    return RenderedPrompt(
        text=fill(nonce, ids), nonce=nonce, sha256=hashlib.sha256(unnamed.encode()).hexdigest(), ids=ids
    )


def _substitute(template: str, values: dict[str, str]) -> str:
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


@functools.cache
def _frame(mode: Mode) -> str:
    return (TEMPLATES / "frames" / f"{mode}.txt").read_text(encoding="utf-8").rstrip("\n")


def _draw_ids(count: int) -> tuple[str, ...]:
    """Distinct ids of four hex digits: they say nothing about the order, and a text cannot guess its own."""
    ids: dict[str, None] = {}
    while len(ids) < count:
        ids[secrets.token_hex(2)] = None
    return tuple(ids)


def read_fences(text: str) -> tuple[str, dict[str, str]]:
    """The nonce and the fenced texts of a rendered prompt, by name: what a judge sees.

    The names are "question", "reference" and "completion"; answers to be compared are "completion <id>".

    Raises:
        ValueError: there is no fence, or two nonces.
    """
    fences = FENCE.findall(text)
    nonces = {nonce for _, nonce, _ in fences}
    if len(nonces) != 1:
        raise ValueError(f"expected fences with one nonce, found {len(nonces)}")
    return nonces.pop(), {name: json.loads(content) for name, _, content in fences}


def is_blank(text: str) -> bool:
    """Whether there is nothing to be seen in it. Stops at the first character that is seen."""
    return not any(not char.isspace() and not _is_unseen(char) for char in text)


def _shorten(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    head = max_chars * 2 // 3
    tail = max_chars - head
    return f"{text[:head]} [... {len(text) - max_chars} characters cut ...] {text[-tail:]}"


def _escape(text: str) -> str:
    """A JSON string on one line, in which no mark of ours and no chat template's token can stand."""
    visible = DOUBTFUL.sub(lambda match: "" if _is_unseen(match[0]) else match[0], text)
    quoted = json.dumps(visible, ensure_ascii=False).replace("<", "\\u003c").replace(">", "\\u003e")
    return CHAT_MARK.sub("\\\\u005b", quoted)


def _is_unseen(char: str) -> bool:
    return unicodedata.category(char) in INVISIBLE or ord(char) in BLANK
