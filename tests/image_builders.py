"""Small makers of images, of prompts that show them, and of a vision-language model with its processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from grpo.config import LoraTrainable
from grpo.prompt_images import ImageTextEncoder
from grpo.prompts import EncodedPrompt, encode_prompt, made_up_prompt
from grpo.runtime.image_processors import load_image_text_processor
from grpo.runtime.models import load_model, load_tokenizer
from grpo.runtime.policy import Policy
from grpo.types import Message, Prompt

IN_EVERY_PART = ("q_proj", "v_proj", "qkv", "fc1", "linear_1", "up_proj")
"""Layers of image towers, projectors and language models."""


def save_image(path: Path, width: int, height: int, *, seed: int = 0) -> str:
    """Random colours; gives the path."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def image_prompt(name: str, text: str, *images: str) -> Prompt:
    """One user message that says where the images belong."""
    return Prompt(id=name, messages=(Message(role="user", content=text),), objectives=("a",), images=images)


def mixed_prompts(folder: Path) -> list[Prompt]:
    """With no, one and two images, of different sizes: tall, wide and square."""
    tall, wide, square = (
        save_image(folder / f"{number}.png", *size, seed=number)
        for number, size in enumerate([(20, 33), (40, 17), (31, 31)])
    )
    return [
        image_prompt("text", "Hello there, who are you?"),
        image_prompt("one", "<image>What is it?", tall),
        image_prompt("two", "Compare <image> with <image>, please.", wide, square),
        image_prompt("short", "Add 1 and 2."),
        image_prompt("last", "Look: <image>", square),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionModel:
    """A policy with an adapter that is not zero, and what renders its prompts."""

    policy: Policy
    tokenizer: Any
    processor: Any
    encoder: ImageTextEncoder

    def encoded(self, prompts: list[Prompt]) -> list[EncodedPrompt]:
        return [encode_prompt(one, self.tokenizer, max_tokens=None, image_encoder=self.encoder) for one in prompts]

    def made_up_prompt(self) -> EncodedPrompt:
        return made_up_prompt(self.encoder)

    def own_inputs(self, prompt: EncodedPrompt, token_ids: tuple[int, ...] = ()) -> Mapping[str, torch.Tensor]:
        """What the model's own forward pass and its `generate` take for a prompt and tokens behind it."""
        ids = torch.tensor([[*prompt.token_ids, *token_ids]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.images is not None:
            inputs |= prompt.images.tensors
            if "image_grid_thw" in inputs:
                inputs["mm_token_type_ids"] = torch.tensor([[*prompt.images.token_types, *(0 for _ in token_ids)]])
        return inputs


def load_vision_model(folder: Path) -> VisionModel:
    """In float32."""
    tokenizer = load_tokenizer(str(folder), base_dir=folder)
    processor = load_image_text_processor(str(folder), tokenizer, base_dir=folder)
    assert processor is not None
    model = load_model(str(folder), dtype=torch.float32, base_dir=folder)
    policy = Policy(model, LoraTrainable(rank=4, modules=IN_EVERY_PART), seed=0, tokenizer=processor)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return VisionModel(policy=policy, tokenizer=tokenizer, processor=processor, encoder=ImageTextEncoder(processor))
