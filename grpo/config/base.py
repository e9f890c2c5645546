"""What every part of a recipe is made of. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

_NUMBERS = (int, float, int | None, float | None)


class StrictModel(BaseModel):
    """A part of a recipe: unknown keys refused, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        for name, field in cls.model_fields.items() if isinstance(values, Mapping) else ():
            if field.annotation in _NUMBERS and isinstance(values.get(name), bool):  # pydantic would read 1
                raise ValueError(f"{name} is {values[name]}; expected a number")
        return values
