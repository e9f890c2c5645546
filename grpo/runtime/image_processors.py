"""A vision-language model's name -> its processor. Knows files and transformers; knows nothing of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PROCESSOR_MAPPING, AutoConfig, PreTrainedTokenizerBase, ProcessorMixin

from grpo.errors import ModelError
from grpo.runtime.models import LOADING_ERRORS, is_vision_language, raise_unusable, resolve_model
from grpo.runtime.packaged_model import quiet_transformers


def load_image_text_processor(
    name: str, tokenizer: PreTrainedTokenizerBase, *, base_dir: Path
) -> ProcessorMixin | None:
    """The processor of `name`, images and text only; None for a model that reads text alone.

    Args:
        tokenizer: the model's; the processor's own is set to it.
    Raises:
        ModelError: the processor cannot be found or loaded.
    """
    target = resolve_model(name, base_dir)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(target, trust_remote_code=False)
            if not is_vision_language(config):
                return None
            # Pillow everywhere: torchvision, where it is installed, makes other pixels of the same file
            kind: Any = PROCESSOR_MAPPING[type(config)]
            processor: Any = _of_images_and_text(kind).from_pretrained(target, trust_remote_code=False, backend="pil")
    except LOADING_ERRORS as exc:
        raise_unusable(name, target, base_dir, exc)
    if not isinstance(getattr(processor, "image_token", None), str) or not processor.chat_template:
        raise ModelError(
            f"the processor of model {name!r} ({type(processor).__name__}) has no image token or no chat template, so "
            "that no prompt with images can be rendered. Save a chat template with it (chat_template.jinja)."
        )
    processor.tokenizer = tokenizer
    return processor


def _of_images_and_text(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The class without its part for videos, which cannot be made where torchvision is not installed."""
    kept = [name for name in kind.get_attributes() if name != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: kept)})
