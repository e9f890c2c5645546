"""What of the model learns, and how. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator

from grpo.config.base import StrictModel
from grpo.config.module_patterns import check_pattern


class LoraTrainable(StrictModel):
    """Low-rank adapters; the reference is the same model with them switched off, or as a warm-up left them."""

    type: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Module names as peft matches them: by their end, wherever it is. all-linear leaves the language-model head out,
    and, in a model of several parts, everything but the language model."""


class FullTrainable(StrictModel):
    """Every parameter learns, in float32; the reference is a second copy of the model."""

    type: Literal["full"]


class _Part(StrictModel):
    modules: tuple[str, ...] = Field(min_length=1)
    """Patterns over whole module names (`grpo.config.module_patterns`); one that matches nothing is an error. A module
    stands for all that is in it."""
    across_parts: bool = False
    """Whether one pattern may take modules in several of the model's parts, such as an image tower and the language
    model. Without it that is an error: `**.query` that was meant for one part is how memory doubles."""

    @field_validator("modules", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("modules")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            check_pattern(pattern)
        return patterns


class LoraPart(_Part):
    """Low-rank adapters on the linear layers among or in the modules, but for the head and the token embeddings."""

    type: Literal["lora"]
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)


class FullPart(_Part):
    """Every parameter of the modules, in float32."""

    type: Literal["full"]


PartConfig: TypeAlias = Annotated[LoraPart | FullPart, Field(discriminator="type")]


class PartsTrainable(StrictModel):
    """Parts of the model, each in its way; what no entry matches is frozen, and gradient flows through it.

    The first entry that matches a layer or parameter has it; one that earlier ones leave nothing is an error. The
    reference is the same model with adapters off and the fully trained parameters as they were at the start, of which
    alone a copy is kept.
    """

    type: Literal["parts"]
    parts: tuple[PartConfig, ...] = Field(min_length=1)
    """Such as [{type: full, modules: model.multi_modal_projector}, {type: lora, modules: model.language_model}]."""


TrainableConfig = Annotated[LoraTrainable | FullTrainable | PartsTrainable, Field(discriminator="type")]
