"""A random one-layer Llama over twelve numbers: a language model that GRPO trains in seconds on one core.

Its prompts and completions are token ids; there is no text to speak of. Shared by objective_fronts.py and
tests/grpo/test_learning.py, whose tasks have a known optimum.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, START, VOCABULARY = 0, 1, 12
"""Token ids of the end and the start of a sequence, and how many tokens there are; from 2 on they mean nothing."""


def tiny_llama(seed: int, *, head_scale: float = 1.0) -> LlamaForCausalLM:
    """The model, in float32. Leaves torch's global random state alone.

    Args:
        seed: of the weights.
        head_scale: the head's weights are multiplied by this; they are drawn with a deviation of 0.02.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(head_scale)
    return model


def numbers_as_words() -> PreTrainedTokenizerFast:
    """Its tokenizer: token 7 is written "7"."""
    backend = Tokenizer(models.WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token=str(END)))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=str(END))
