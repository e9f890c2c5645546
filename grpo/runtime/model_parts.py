"""Which part of a model a module belongs to: an image tower, a projector, a Q-Former, the language model.

The parts are found through the model's own accessors: the children of its base model, the language model being the one
that holds the token embeddings. A plain language model is one part, called "".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParts:
    """The parts of a model by the paths of their modules."""

    names: tuple[str, ...]
    """Such as model.vision_tower; () where the model is one part."""
    language: str
    """The language model's, to which the head belongs wherever it stands; "" where there is one part or none is it."""
    container: str
    """Path of the module whose children they are; "" for the model itself."""

    @property
    def are_several(self) -> bool:
        """More than one."""
        return len(self.names) > 1

    def of(self, name: str) -> str:
        """The part of a module or parameter; a parameter that stands beside the parts is one of its own."""
        if not self.are_several:
            return ""
        for part in self.names:
            if name == part or name.startswith(f"{part}."):
                return part
        parent, _, _ = name.rpartition(".")
        return name if parent == self.container else self.language


def model_parts(model: nn.Module) -> ModelParts:
    """Args: model: without peft's wrapper, adapter layers inside or not."""
    config: Any = getattr(model, "config", None)
    paths = {id(module): path for path, module in model.named_modules()}
    one = ModelParts(names=(), language="", container="")
    if config is not None and config.get_text_config() is config:
        return one
    base: Any = getattr(model, "base_model", model)
    container = paths[id(base)]
    children = [name for name, child in base.named_children() if next(child.parameters(), None) is not None]
    names = tuple(f"{container}.{name}".lstrip(".") for name in children)
    if len(names) < 2:
        return one
    embeddings = paths[id(model.get_input_embeddings())] if config is not None else ""  # pyright: ignore[reportCallIssue]
    language = next((name for name in names if f"{embeddings}.".startswith(f"{name}.")), "")
    return ModelParts(names=names, language=language, container=container)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether its language model is (T5, InstructBLIP with T5)."""
    config: Any = getattr(model, "config", None)
    return config is not None and bool(config.is_encoder_decoder or config.get_text_config().is_encoder_decoder)
