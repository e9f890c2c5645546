"""The grid of `grpo bench memory`: what is varied, one thing at a time. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 96}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 256}
"""A window over the text: no prompt is shared."""
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 16384,
    "n_embd": 512,
    "n_layer": 8,
    "n_head": 8,
    "n_positions": 2048,
}
GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "sliding_window": 256,
    "max_position_embeddings": 8192,
}
LORA = {"type": "lora", "rank": 16}
FULL = {"type": "full"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCase:
    """One configuration: a model with random weights, and the recipe keys that memory depends on."""

    name: str
    model: Mapping[str, Any] = field(default_factory=lambda: LLAMA)
    """Of its config.json."""
    dtype: str = "float32"
    trainable: Mapping[str, Any] = field(default_factory=lambda: LORA)
    prompts: int = 2
    """Of a step."""
    group_size: int = 8
    prompt_tokens: int = 64
    max_new_tokens: int = 64
    micro_batch_tokens: int = 8192
    top_p: float = 1.0
    checkpointing: str = "none"
    quantization: str = "none"
    is_calibration: bool = False
    """Its figure set one of the two allowances for libraries on a CPU."""

    @property
    def needs(self) -> str | None:
        """An installed package without which it cannot run; None: nothing that is optional."""
        return None if self.quantization == "none" else "bitsandbytes"

    def recipe(self, model_folder: Path, *, device: str) -> dict[str, Any]:
        """Keys and values of a recipe."""
        return {
            "model": str(model_folder),
            "steps": 1,
            "output_dir": str(model_folder.parent / "run"),
            "device": device,
            "dtype": self.dtype,
            "prompts": {"type": "tasks", "names": ["fairness"], "per_step": self.prompts},
            "objectives": {"fairness": {"rewards": [{"name": "choice"}], "beta": {"type": "fixed", "value": 0.02}}},
            "rollout": {
                "group_size": self.group_size,
                "max_new_tokens": self.max_new_tokens,
                "top_p": self.top_p,
            },
            "update": {"micro_batch_tokens": self.micro_batch_tokens, "checkpointing": self.checkpointing},
            "quantization": self.quantization,
            "optim": {"learning_rate": 1e-4},
            "trainable": dict(self.trainable),
            "eval": {"before": False, "after": False},
        }


CASES = (
    MemoryCase(name="llama, float32", is_calibration=True),
    MemoryCase(name="llama, bfloat16", dtype="bfloat16", is_calibration=True),
    MemoryCase(name="half the micro-batch", micro_batch_tokens=600),
    MemoryCase(name="K = 16", group_size=16),
    MemoryCase(name="160 new tokens", max_new_tokens=160),
    MemoryCase(name="160 new tokens, bfloat16", max_new_tokens=160, dtype="bfloat16"),
    MemoryCase(name="prompts of 600", prompts=1, prompt_tokens=600),
    MemoryCase(name="every block computed again", checkpointing="full", max_new_tokens=160),
    MemoryCase(name="every second block computed again", checkpointing="selective", max_new_tokens=160),
    MemoryCase(name="every block computed again, bfloat16", checkpointing="full", dtype="bfloat16"),
    MemoryCase(name="all weights, every block computed again", checkpointing="full", trainable=FULL),
    MemoryCase(name="mistral, every block computed again", checkpointing="full", model=MISTRAL),
    MemoryCase(name="weights in 4 bits", quantization="nf4"),
    MemoryCase(name="weights in 4 bits, bfloat16", quantization="nf4", dtype="bfloat16"),
    MemoryCase(name="rank 128", trainable={"type": "lora", "rank": 128}),
    MemoryCase(name="adapters on q and v", trainable={**LORA, "modules": ["q_proj", "v_proj"]}),
    MemoryCase(name="all weights", trainable=FULL),
    MemoryCase(name="all weights, bfloat16", trainable=FULL, dtype="bfloat16"),
    MemoryCase(
        name="fused attention",  # too many scores for the plain one
        model={**LLAMA, "num_hidden_layers": 4},
        prompts=4,
        prompt_tokens=512,
        group_size=16,
        max_new_tokens=128,
        micro_batch_tokens=16384,
    ),
    MemoryCase(name="vocabulary of 100k", model={**LLAMA, "vocab_size": 100_000, "num_hidden_layers": 4}),
    MemoryCase(name="top-p in the law", top_p=0.9, model={**LLAMA, "vocab_size": 100_000, "num_hidden_layers": 2}),
    MemoryCase(name="mistral, prompts not shared", model=MISTRAL),
    MemoryCase(name="qwen3", model=QWEN3),
    MemoryCase(name="qwen3, bfloat16", model=QWEN3, dtype="bfloat16"),
    MemoryCase(name="gemma3", model=GEMMA3),
    MemoryCase(name="gemma3, bfloat16", model=GEMMA3, dtype="bfloat16"),
    MemoryCase(name="gpt2", model=GPT2),
    MemoryCase(name="gpt2, all weights", model=GPT2, trainable=FULL),
)
QUICK = ("llama, float32", "half the micro-batch", "gpt2")
