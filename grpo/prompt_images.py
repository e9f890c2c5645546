"""The images of a prompt: from paths in a data file to what a vision-language model reads.

A prompt's messages hold "<image>" where an image belongs. Files are opened with Pillow, and nothing is ever fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from grpo.errors import DatasetError, ModelError
from grpo.types import Message, Prompt

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import ProcessorMixin

PLACEHOLDER = "<image>"
"""Stands for an image in a message, whatever the model's own token is called."""
_TEXT_KEYS = {"input_ids", "attention_mask", "mm_token_type_ids"}
_IMAGE_KEYS = {"pixel_values", "image_grid_thw"}
"""What a processor may give: tensors that of several prompts can be put one behind the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptImages:
    """A prompt's images as the model reads them."""

    tensors: Mapping[str, Tensor]
    """The model's argument -> tensor, on the CPU; those of several prompts are concatenated along their first
    dimension: pixel_values [N, C, H, W] or [patches, D], image_grid_thw [N, 3]."""
    token_types: tuple[int, ...]
    """[T_prompt] 1 at the tokens that images take, else 0."""
    digest: str
    """Of the files' bytes."""


def parts_as_text(chat: Any) -> Any:
    """A chat whose contents come in parts, {"type": "image"} and {"type": "text", "text"}, with texts instead; all else
    as it is."""
    if not isinstance(chat, list):
        return chat
    return [{**turn, "content": _as_text(turn.get("content"))} if isinstance(turn, dict) else turn for turn in chat]


def _as_text(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    texts = [text for part in content if (text := _part_as_text(part)) is not None]
    return "".join(texts) if len(texts) == len(content) else content  # which is then refused


def _part_as_text(part: Any) -> str | None:
    match part:
        case {"type": "image", **rest} if not rest:
            return PLACEHOLDER
        case {"type": "text", "text": str(text)}:
            return text
        case _:
            return None


def with_images(messages: Sequence[Message], num_images: int, *, place: str) -> tuple[Message, ...]:
    """The messages with a placeholder for each image; before the last message's text where they hold none.

    Raises:
        DatasetError: they hold another number of them.
    """
    held = sum(message.content.count(PLACEHOLDER) for message in messages)
    if held == num_images:
        return tuple(messages)
    if held:
        raise DatasetError(
            f"{place}: {num_images} images for {held} {PLACEHOLDER} in the prompt. Write one where each image belongs, "
            "or none: then the images come first."
        )
    last = messages[-1]
    return (*messages[:-1], replace(last, content=PLACEHOLDER * num_images + last.content))


def image_paths(value: Any, folder: Path, *, place: str) -> tuple[str, ...]:
    """A row's image files, absolute. Args: value: a path, a list of them, or None; folder: the data file's.

    Raises:
        DatasetError: it is something else, or names no file.
    """
    names = [value] if isinstance(value, str) and value else value or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise DatasetError(f"{place}: images are {value!r}; expected the path of a file, or a list of them.")
    for name in names:
        if "://" in name:
            raise DatasetError(
                f"{place}: image {name} is an address, and nothing is fetched. Download it, and name the file."
            )
        if not (folder / name).is_file():
            raise DatasetError(
                f"{place}: there is no image {folder / name}. Paths are relative to the data file's folder."
            )
    return tuple(str(folder / name) for name in names)


class ImageTextEncoder:
    """Renders prompts with and without images for one vision-language model, through its processor.

    Remembers how many tokens an image of a size takes.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor: Any = processor  # its families' own attributes, which the base class does not know
        self._tokens_of_size: dict[tuple[int, int], int] = {}

    def encode(self, prompt: Prompt) -> tuple[tuple[int, ...], PromptImages | None]:
        """Token ids [T_prompt] with every image's tokens among them, and the images; None where there are none.

        Raises:
            DatasetError: an image cannot be read, or the messages cannot be rendered.
            ModelError: the processor gives what the toolkit does not pass on.
        """
        if not prompt.images:
            return tuple(self._tokens(self._rendered(prompt))), None
        contents = [_content_of(prompt, path) for path in prompt.images]
        images = [_opened(prompt, path, content) for path, content in zip(prompt.images, contents, strict=True)]
        digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents))
        return self._encoded(prompt, images, digest.hexdigest())

    def made_up(self) -> tuple[Prompt, tuple[int, ...], PromptImages]:
        """A prompt with a tall and a wide image that are in no file, to try a model out with; encoded."""
        from PIL import Image

        shades = Image.linear_gradient("L")
        images = [shades.resize(size).convert("RGB") for size in ((64, 96), (128, 64))]
        message = Message(role="user", content=f"One {PLACEHOLDER} two {PLACEHOLDER} three")
        prompt = Prompt(id="made up", messages=(message,), objectives=(), images=("tall", "wide"))
        return (prompt, *self._encoded(prompt, images, "made up"))

    def _encoded(self, prompt: Prompt, images: Sequence[Image], digest: str) -> tuple[tuple[int, ...], PromptImages]:
        text = self._rendered(prompt)
        try:
            given = self.processor(
                text=[text], images=list(images), return_tensors="pt", text_kwargs=self._text_arguments(text)
            )
        except ValueError as exc:  # of an image that is too thin, for one
            raise DatasetError(f"the images of prompt {prompt.id!r} cannot be used: {exc}") from exc
        if unknown := given.keys() - _TEXT_KEYS - _IMAGE_KEYS:
            raise ModelError(
                f"{type(self.processor).__name__} gives {sorted(unknown)}, which is not passed on to the model here. "
                "Models that read pixel_values alone, or with image_grid_thw, can be used: LLaVA, Qwen2-VL and alike."
            )
        token_ids = given["input_ids"][0].tolist()
        return tuple(token_ids), PromptImages(
            tensors={name: given[name] for name in sorted(_IMAGE_KEYS & given.keys())},
            token_types=tuple(int(token in self.processor.image_token_ids) for token in token_ids),
            digest=digest,
        )

    def num_tokens(self, prompt: Prompt) -> int:
        """Tokens that `encode` will give, from the text and the images' sizes; no pixels are read.

        Raises:
            DatasetError: a file is no image, or the messages cannot be rendered.
        """
        num_added = sum(self._num_added(_size_of(prompt, path)) for path in prompt.images)
        return len(self._tokens(self._rendered(prompt))) + num_added

    def _num_added(self, size: tuple[int, int]) -> int:
        """Tokens by which an image of a size [width, height] is longer than its placeholder."""
        if size not in self._tokens_of_size:
            from PIL import Image

            token = self.processor.image_token
            arguments = {"text": [token], "text_kwargs": self._text_arguments(token)}
            given = self.processor(images=[Image.new("RGB", size)], **arguments)
            self._tokens_of_size[size] = len(given["input_ids"][0]) - len(self._tokens(token))
        return self._tokens_of_size[size]

    def _tokens(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, **self._text_arguments(text))["input_ids"]

    def _text_arguments(self, text: str) -> dict[str, Any]:
        """The tokenizer's. Its special tokens are added as the processor itself does: unless the text has them."""
        begin = self.processor.tokenizer.bos_token
        return {"add_special_tokens": begin is None or not text.startswith(begin), "verbose": False}

    def _rendered(self, prompt: Prompt) -> str:
        """The chat as text, with the model's own placeholder for each image."""
        messages = [
            {"role": message.role, "content": list(self._parts(prompt, message))} for message in prompt.messages
        ]
        try:
            text = str(self.processor.apply_chat_template(messages, add_generation_prompt=True))
        except (ValueError, TemplateError) as exc:  # a template refuses what it cannot render
            raise DatasetError(f"prompt {prompt.id!r} cannot be rendered as a chat: {exc}") from exc
        if (written := text.count(self.processor.image_token)) != len(prompt.images):
            raise ModelError(
                f"the model's chat template writes {written} image tokens for the {len(prompt.images)} images of "
                f"prompt {prompt.id!r}. Expected one for each content part of type image; give a model whose template "
                "does that."
            )
        return text

    def _parts(self, prompt: Prompt, message: Message) -> Iterator[dict[str, str]]:
        """The message's content in parts, as chat templates of such models take it."""
        texts = message.content.split(PLACEHOLDER) if prompt.images else [message.content]
        for number, text in enumerate(texts):
            if number:
                yield {"type": "image"}
            if held := [token for token in self.processor.all_special_multimodal_tokens if token in text]:
                raise DatasetError(
                    f"prompt {prompt.id!r} holds the text {held[0]!r}, which to this model is an image. Take it out, "
                    "or name the image's file in the column that prompts.images_column names."
                )
            if text:
                yield {"type": "text", "text": text}


def _content_of(prompt: Prompt, path: str) -> bytes:
    with _readable(prompt, path):
        return Path(path).read_bytes()


def _opened(prompt: Prompt, path: str, content: bytes) -> Image:
    """Upright and in RGB, as transformers itself opens images."""
    from PIL import Image, ImageOps

    with _readable(prompt, path), Image.open(io.BytesIO(content)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _size_of(prompt: Prompt, path: str) -> tuple[int, int]:
    """[width, height] once it is upright, from the file's header."""
    from PIL import Image
    from PIL.ExifTags import Base

    with _readable(prompt, path), Image.open(path) as image:
        width, height = image.size
        is_lying = image.getexif().get(Base.Orientation, 1) >= 5
    return (height, width) if is_lying else (width, height)


@contextlib.contextmanager
def _readable(prompt: Prompt, path: str) -> Iterator[None]:
    """What Pillow raises for a file that is no whole image, as a DatasetError that names it."""
    from PIL.Image import DecompressionBombError

    try:
        yield
    except (OSError, ValueError, SyntaxError, EOFError, DecompressionBombError) as exc:
        raise DatasetError(
            f"image {path} of prompt {prompt.id!r} cannot be read: {exc}. Expected a whole file in a form that Pillow "
            "reads, such as PNG or JPEG."
        ) from exc
