"""A format's name in a recipe -> how its rows are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from grpo.errors import DatasetError
from grpo.formats.base import Question
from grpo.formats.bbq import read_bbq
from grpo.formats.questions import read_gsm8k, read_halueval, read_halueval_qa, read_truthfulqa

FORMATS: Mapping[str, Callable[[Mapping[str, Any]], Question]] = {
    "bbq": read_bbq,
    "gsm8k": read_gsm8k,
    "halueval": read_halueval,
    "halueval_qa": read_halueval_qa,
    "truthfulqa": read_truthfulqa,
}


def read_question(format_name: str, row: Mapping[str, Any], *, place: str) -> Question:
    """One row in a public form. Args: place: file and number, for the message.

    Raises:
        DatasetError: the row is not of this form.
    """
    try:
        return FORMATS[format_name](row)
    except (KeyError, IndexError, TypeError, ValueError, StopIteration) as exc:
        raise DatasetError(
            f"{place} is not of the form of prompts.format={format_name} ({type(exc).__name__}: {exc}); it has the "
            f"columns {sorted(row)}. Check prompts.format, or take format=plain and name the columns."
        ) from exc
