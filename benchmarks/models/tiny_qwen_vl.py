"""A random Qwen2-VL or Qwen2.5-VL (hidden 32, two layers, positions in three dimensions) with its processor, as a
folder that loads offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from models.tiny_chat_llama import byte_level_tokenizer
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PATCH_SIZE, MERGE_SIZE = 4, 2
"""Pixels, and patches; an image takes a token for each 8 x 8 pixels, between 4 and 16 tokens."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_qwen_vl(folder: Path, *, family: Literal["qwen2_vl", "qwen2_5_vl"] = "qwen2_vl") -> None:
    """Write weights and processor. Leaves torch's global random state alone."""
    tokenizer = byte_level_tokenizer(SPECIAL_TOKENS)
    start, end, image, video = (tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS)
    common: dict[str, Any] = {
        "text_config": {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.1,  # larger than usual: what an image says shall be seen in the logits
            # of the 4 frequencies of a head, so many turn with time, height and width
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
    }
    vision = {"depth": 2, "num_heads": 2, "patch_size": PATCH_SIZE, "spatial_merge_size": MERGE_SIZE}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "qwen2_vl":
            vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
            model: Any = Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, **common))
        else:
            vision |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 16}
            vision |= {"fullatt_block_indexes": [1]}
            model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, **common))
    model.save_pretrained(folder)
    # the processor's parts: as a whole it cannot be made without torchvision, which its part for videos needs
    Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE, merge_size=MERGE_SIZE, size={"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    ).save_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
