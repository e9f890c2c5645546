"""A tiny InstructBLIP, with T5 or OPT as its language model, and LoRA on whatever some patterns match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

LanguageModel = Literal["t5", "opt"]
VOCABULARY, IMAGE, QUERIES = 64, 60, 4
ANSWER = (7, 11, 5, 2)
"""What every labelled example is answered with."""


def make_instruct_blip(language_model: LanguageModel) -> nn.Module:
    """Random weights, in train mode without dropout, nothing frozen yet."""
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, OPTConfig, T5Config

    size: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    ends: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    t5 = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4, dropout_rate=0.0)
    t5.decoder_start_token_id = 0
    opt = OPTConfig(
        **{**size, "hidden_size": 32, "num_hidden_layers": 4},
        **ends,
        vocab_size=VOCABULARY,
        ffn_dim=64,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        dropout=0.0,
    )
    config = InstructBlipConfig(
        vision_config={**size, "intermediate_size": 32, "image_size": 16, "patch_size": 8, "initializer_range": 0.02},
        qformer_config={
            **size,
            "vocab_size": VOCABULARY,
            "intermediate_size": 32,
            "encoder_hidden_size": 16,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config=(t5 if language_model == "t5" else opt).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return InstructBlipForConditionalGeneration(config).train()


def with_lora(
    model: nn.Module, patterns: str | Sequence[str], *, task_type: str | None = None, dropout: float = 0.0
) -> PeftModel:
    """As people write it: patterns for the modules, and a task type that sounds like a scope."""
    modules = patterns if isinstance(patterns, str) else list(patterns)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type=task_type, lora_dropout=dropout)  # pyright: ignore
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapted = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    assert isinstance(adapted, PeftModel)
    return adapted


def labelled_examples(count: int) -> list[dict[str, Tensor]]:
    """Images with a question and the answer that T5 is to give, as transformers' trainers take them."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(count, 3, 16, 16, generator=generator)
    questions = torch.randint(3, IMAGE, (count, 5), generator=generator)
    image = torch.full((QUERIES,), IMAGE)
    return [
        {
            "pixel_values": seen,
            "qformer_input_ids": question,
            "input_ids": torch.cat([image, question]),
            "labels": torch.tensor(ANSWER),
        }
        for seen, question in zip(pixels, questions, strict=True)
    ]


def loss_of(model: nn.Module, *, batch: int = 2) -> Callable[[], Tensor]:
    """Of fixed images with a question and its answer."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(batch, 3, 16, 16, generator=generator)
    question = torch.randint(3, IMAGE, (batch, 5), generator=generator)
    image = torch.full((batch, QUERIES), IMAGE)
    prompt = torch.cat([image, question], dim=1)

    def loss() -> Tensor:
        dtype = next(model.parameters()).dtype
        given = {"pixel_values": pixels.to(dtype), "qformer_input_ids": question, "input_ids": prompt}
        has_decoder = model.config.text_config.is_encoder_decoder  # pyright: ignore[reportAttributeAccessIssue]
        labels = question if has_decoder else prompt.masked_fill(prompt == IMAGE, -100)
        return model(**given, labels=labels).loss

    return loss
