"""Is a mathematical answer the reference? Runs in a worker of `rewards.processes`: sympy may never come back.

Text in, a verdict in words out. math-verify's own time limits are off: they need SIGALRM and cannot stop a C loop.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

if TYPE_CHECKING:
    from rewards.math_answer import Extraction

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off: they are, on purpose

_BOXED_FIRST = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_ONE_EXPRESSION = (LatexExtractionConfig(boxed_match_priority=-1), ExprExtractionConfig())

_NOTHING_FOUND = {"boxed": r"no \boxed{...}", "last_number": "no number in it", "auto": "empty"}

_WORD = re.compile(r"[A-Za-z]{3,}")
_LATEX_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mbox|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_FUNCTION = re.compile(r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|exp|sqrt|lim|max|min|gcd|lcm")

# the minus of "5-3" is an operator, that of "is -3" a sign
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?:(?<![\w)])-)?(?<!\d)\.\d+")

_ONE_NUMBER = re.compile(r"-?(?:\d{1,3}(?:[, ]\d{3})+|\d*)(?:\.\d+)?")


def compare(reference: str, answer: str, extract: Extraction) -> dict[str, str]:
    """Compare an answer with the reference.

    Returns:
        `verdict`: "right", "wrong", "no_answer" (nothing to compare was found in the answer) or "bad_reference"; and
        `detail`, what was compared.
    """
    gold = _parsed_reference(reference)
    if not gold:
        return {
            "verdict": "bad_reference",
            "detail": f"the reference {reference[-100:]!r} is no mathematical expression",
        }
    given = _extracted(answer, extract)
    if given is None:
        return {"verdict": "no_answer", "detail": _NOTHING_FOUND[extract]}
    target = parse(given, _BOXED_FIRST, fallback_mode="no_fallback", parsing_timeout=0)
    if not target:
        return {"verdict": "no_answer", "detail": "no mathematical expression in it"}
    try:
        is_equal = verify(gold, target, timeout_seconds=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception as exc:  # noqa: BLE001  # whatever sympy raises on it, the answer was not shown to be right
        return {"verdict": "wrong", "detail": f"cannot be compared with the reference ({type(exc).__name__})"}
    return {"verdict": "right" if is_equal else "wrong", "detail": f"{_shown(target)} for {_shown(gold)}"}


def _parsed_reference(reference: str) -> list[Any]:
    text = reference.rpartition("####")[2].strip()  # GSM8K writes its solution, then "#### 42"
    boxed = last_boxed(text)
    if boxed is None and _ONE_NUMBER.fullmatch(text):
        boxed = re.sub("[, ]", "", text)
    as_latex = f"${boxed if boxed is not None else text}$"
    is_formula = boxed is not None or _is_bare_formula(text)
    for candidate in (as_latex, text) if is_formula else (text, as_latex):
        parsed = parse(candidate, _ONE_EXPRESSION, fallback_mode="no_fallback", parsing_timeout=0) if text else []
        if parsed:
            return parsed
    return []


def _is_bare_formula(text: str) -> bool:
    """Whether the text is one formula without dollars. Read as prose, "2^{10}" would be 2, and "x + 1" would be 1."""
    words = _WORD.findall(_LATEX_WORDS.sub("", text))
    is_marked = any(mark in text for mark in ("$", r"\(", r"\["))
    return not is_marked and "\n" not in text and all(_FUNCTION.fullmatch(word) for word in words)


def _extracted(answer: str, extract: Extraction) -> str | None:
    if extract == "last_number":
        numbers = _NUMBER.findall(answer)
        return numbers[-1].replace(",", "") if numbers else None
    boxed = last_boxed(answer)
    if boxed is not None or extract == "boxed":
        return None if boxed is None else f"${boxed}$"
    text = answer.rpartition("####")[2].strip()  # GSM8K's own way to give an answer
    is_calculation = "=" in text  # whose result counts
    is_number = _ONE_NUMBER.fullmatch(text) is not None  # math-verify knows "1 234 567"; as LaTeX it is a product
    is_formula = not is_calculation and not is_number and _is_bare_formula(text)
    return f"${text}$" if text and is_formula else text or None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} or \fbox{...} whose braces balance; None where there is none."""
    for start in reversed([match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for position in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start:position].strip()
    return None


def _shown(parsed: list[Any]) -> str:
    return str(parsed[0])[:80]
