"""First names for the scenes: one list for each split, with none in both."""

from __future__ import annotations

from collections.abc import Mapping

from grpo.tasks.base import Split


def words(text: str) -> tuple[str, ...]:
    """The words of a text: lists of single words are easier to read so."""
    return tuple(text.split())


NAMES: Mapping[Split, tuple[str, ...]] = {
    "train": words(
        "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor"
    ),
    "held_out": words(
        "Alice Bruno Cora Daniel Eva Frank Gina Hugo Ida Jonas Kira Lucas Maria Oscar Petra Ruth Simon Thomas"
    ),
}
