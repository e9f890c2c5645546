"""Patterns over module names: globs over dotted paths. Imports no torch.

A pattern is a whole path, name by name: `*`, `?` and `[0-9]` stand for characters within one name as in Python's
fnmatch, and `**` for any number of whole names, none included. `query` is the module of that name at the top and no
other; `**.query` is each one that is called so.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

_WORD = re.compile(r"(?:[A-Za-z0-9_*?-]|\[!?[A-Za-z0-9_-]+\])+")
_SHOWN = 3


def check_pattern(pattern: str) -> None:
    """Raises ValueError for what is no glob over module names, a regular expression for one."""
    for word in pattern.split("."):
        if word == "**" or (word and "**" not in word and _WORD.fullmatch(word)):
            continue
        raise ValueError(
            f"{pattern!r} is no pattern of module names: {_fault(word)}. Write a whole path such as "
            "model.layers.*.self_attn.q_proj; * stands for anything within one name, ** for any number of names "
            "(**.q_proj), [0-9] for one character of several. Regular expressions are not read here"
        )


def _fault(word: str) -> str:
    if not word:
        return "a name between two dots, or before or after them, is empty"
    return "** stands alone between dots" if "**" in word else f"{word!r} cannot be part of a name"


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a checked pattern matches, in their order."""
    wanted = pattern.split(".")
    return [name for name in names if _matches(wanted, name.split("."))]


def _matches(pattern: Sequence[str], name: Sequence[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_matches(pattern[1:], name[start:]) for start in range(len(name) + 1))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and _matches(pattern[1:], name[1:])


def nearest(pattern: str, names: Sequence[str]) -> str:
    """Advice for a pattern that matched nothing: what its end alone would match, else names that are spelt alike."""
    ending = f"**.{pattern}"
    if found := matching(ending, names):
        return f"patterns are whole paths: {ending!r} matches {len(found)} modules, such as {_some(found)}"
    return f"the nearest are {alike(pattern, names)}"


def alike(pattern: str, names: Sequence[str]) -> str:
    """A few names whose last part is that of a pattern, or spelt like it; else the first ones."""
    last = pattern.rpartition(".")[2]
    same_end = [name for name in names if fnmatchcase(name.rpartition(".")[2], last)] if last != "**" else []
    close = difflib.get_close_matches(last, _ends(names), n=_SHOWN)
    return _some(same_end or [name for end in close for name in _ending(end, names)] or list(names))


def _ends(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _ending(end: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name.rpartition(".")[2] == end][:1]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN])
