"""What a vLLM server says of itself, so that a run can be refused before its first step. Imports no vLLM, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SERVER_EXTENSION = "grpo.rollout.vllm_server_worker.ServerWeightSync"
"""For a server's `--worker-extension-cls`."""

_SHAPE_KEYS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """Of one worker."""

    shape: dict[str, Any]
    """See `shape_of`."""
    dtype: str
    """Of the weights, such as bfloat16."""
    device: str
    """cpu or cuda."""
    max_model_len: int
    """Tokens that a prompt and its completion may have together."""
    logprobs_mode: str
    logits_processors: Sequence[str]
    """package.module:name of each that was loaded."""
    max_lora_rank: int | None
    """None without LoRA."""
    has_base_weights: bool
    """False once whole weights were synced: an adapter would be added to another base than the trainer's."""


def shape_of(config: Any) -> dict[str, Any]:
    """What two models of one architecture and size share, from a transformers config."""
    text = config.get_text_config()
    return {key: getattr(text, key, None) for key in _SHAPE_KEYS}
