"""Where prompts come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from grpo.config.base import StrictModel


class TaskPrompts(StrictModel):
    """Generated scenes with known answers, unlimited; held-out scenes share no name, attribute or template."""

    type: Literal["tasks"]
    names: tuple[str, ...] = Field(min_length=1)
    """Tasks in turn: prompt n comes from task n modulo their number."""
    per_step: int = Field(default=8, ge=1)
    """P: prompts per optimizer step."""


RowFormat = Literal["plain", "bbq", "gsm8k", "halueval", "halueval_qa", "truthfulqa"]
"""plain: the columns named beside it. Else a public dataset in its authors' form, read by `grpo.formats`."""


class FilePrompts(StrictModel):
    """A JSON-lines, JSON or CSV file with one prompt a row."""

    type: Literal["file"]
    path: Path
    """Relative to the recipe's folder."""
    format: RowFormat = "plain"
    held_out_path: Path | None = None
    """Prompts for evaluation, same columns; needed where anything is evaluated (`eval`)."""
    prompt_column: str = "prompt"
    """Text of the user's message, or a list of {"role", "content"} messages."""
    reference_column: str = "reference"
    """Right answer; may be absent from the file."""
    images_column: str | None = None
    """Path of an image file, or a list of them, relative to the data file's folder; a row without any is text alone.
    The prompt says "<image>" where each belongs, or nothing: then the images come first. For vision-language models."""
    objectives: tuple[str, ...] | None = None
    """Objectives that score every row; where None, the row's own column `objectives`, else all of them."""
    per_step: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _images_have_a_column_of_their_own(self) -> Self:
        if self.images_column is not None and self.format != "plain":
            raise ValueError(f"images_column is read in format plain alone, not in {self.format}")
        return self


class HubPrompts(StrictModel):
    """A dataset on the hub, by name, read through `datasets`."""

    type: Literal["hub"]
    name: str
    format: RowFormat = "plain"
    subset: str | None = None
    split: str = "train"
    held_out_split: str | None = None
    """Split for evaluation; needed where anything is evaluated (`eval`)."""
    prompt_column: str = "prompt"
    reference_column: str = "reference"
    objectives: tuple[str, ...] | None = None
    per_step: int = Field(default=8, ge=1)


PromptsConfig = Annotated[TaskPrompts | FilePrompts | HubPrompts, Field(discriminator="type")]
