"""A one-layer Llama with random weights and sixteen words: small enough to change its mind within a dozen steps."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "<pad>",
    "<end>",
    "<user>",
    "who",
    "where",
    "why",
    "Anna",
    "Omar",
    "because",
    "nobody",
    "knows",
    "said",
    "it",
    "the",
    "bus",
    "was",
]


def save_few_words_llama(folder: Path, *, spread: float = 0.2) -> None:
    """Write weights and tokenizer. Args: spread: standard deviation of the weights; near 0 every word is as likely."""
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", model_max_length=64
    )
    tokenizer.chat_template = "{% for message in messages %}<user> {{ message['content'] }} {% endfor %}"
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        initializer_range=spread,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
