"""Tiny random models of several parts: an image tower, a projector and a language model; Q-Former and T5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY, IMAGE = 64, 60
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
SEEN: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION, PROJECTOR, LANGUAGE = "model.vision_tower", "model.multi_modal_projector", "model.language_model"


def make_llava() -> PreTrainedModel:
    """CLIP tower, two-layer projector, two-layer Llama: parts VISION, PROJECTOR and LANGUAGE."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SEEN, image_size=8, patch_size=4),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
    )
    return _random(lambda: LlavaForConditionalGeneration(config))


def make_qwen_vl() -> PreTrainedModel:
    """Parts model.visual and model.language_model."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    return _random(lambda: Qwen2VLForConditionalGeneration(config))


def make_t5() -> PreTrainedModel:
    """Encoder and decoder: one part."""
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    return _random(lambda: T5ForConditionalGeneration(config))


def _random(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().train()


def llava_logits(model: Any) -> Tensor:
    """[2, T, V] of two fixed images with a text each."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, 8, 8, generator=generator)
    text = torch.randint(3, IMAGE, (2, 5), generator=generator)
    ids = torch.cat([torch.full((2, 4), IMAGE), text], dim=1)
    return model(input_ids=ids, pixel_values=pixels).logits


def llava_loss(model: Any) -> Callable[[], Tensor]:
    """The mean log-probability of a fixed token, negative: anything that moves it will do."""
    return lambda: -llava_logits(model)[:, -1].log_softmax(-1)[:, 7].mean()
