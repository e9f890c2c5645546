"""Where in a completion does the answer stand? Shared by the rules that read one. Knows nothing of scores."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rewards.config import StrictModel

TagName = Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")]

_END_OF_THOUGHT = "</think>"


class ReadsAnswer(StrictModel):
    """Parameters of a rule that reads an answer out of a completion.

    What a reasoning model writes before `</think>` is never its answer.
    """

    answer_tag: TagName | None = None
    """With "answer", only what stands in the last <answer>...</answer> is read, and a completion without it scores 0.
    None reads all that follows the thoughts."""

    def answer_in(self, completion: str) -> str | None:
        """The text to read; None where the asked-for tag is not there, or the thoughts never end."""
        return answer_text(completion, tag=self.answer_tag)

    @property
    def no_answer(self) -> str:
        """The reason of a completion without an answer."""
        return f"no <{self.answer_tag}>...</{self.answer_tag}>" if self.answer_tag else "the thoughts do not end"


def answer_text(completion: str, *, tag: str | None = None) -> str | None:
    """What follows the last `</think>`; with a tag, the inside of its last pair there. None where there is none."""
    _, end, after = completion.rpartition(_END_OF_THOUGHT)
    if not end and completion.lstrip().startswith("<think>"):
        return None
    if tag is None:
        return after
    before, end, _ = after.rpartition(f"</{tag}>")
    _, start, inside = before.rpartition(f"<{tag}>")
    return inside.strip() if end and start else None
