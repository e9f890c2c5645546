"""What a vLLM server says of itself, so that a run can be refused before its first step. Imports no vLLM, no torch."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from grpo.errors import ConfigError
from grpo.rollout.vllm_law import PROCESSOR

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
    num_shards: int
    """Workers that the model is split over."""
    has_base_weights: bool
    """False once whole weights were synced: an adapter would be added to another base than the trainer's."""

    def takes_adapters(self, rank: int) -> bool:
        """Whether an adapter of this rank can be given to it, and read back."""
        return (self.max_lora_rank or 0) >= rank and self.num_shards == 1 and self.has_base_weights


def shape_of(config: Any) -> dict[str, Any]:
    """What two models of one architecture and size share, from a transformers config."""
    text = config.get_text_config()
    return {key: getattr(text, key, None) for key in _SHAPE_KEYS}


def check_facts(facts: ServerFacts, *, url: str, max_new_tokens: int) -> None:
    """Raises ConfigError for a server that samples otherwise than a run needs, or has no room for a completion."""
    if facts.logprobs_mode != "processed_logprobs" or PROCESSOR not in facts.logits_processors:
        raise ConfigError(
            f"{url} answers {facts.logprobs_mode} with the logits processors {list(facts.logits_processors)}; expected "
            f"processed_logprobs with {PROCESSOR}. Start it with python -m grpo.rollout.vllm_serve."
        )
    if facts.max_model_len <= max_new_tokens:
        raise ConfigError(
            f"{url} has room for {facts.max_model_len} tokens, too short for a prompt and rollout.max_new_tokens = "
            f"{max_new_tokens}. Start it with a higher --max-model-len, or set rollout.max_new_tokens lower."
        )


def check_shape(facts: ServerFacts, config: Any, *, dtype: str, url: str) -> None:
    """Raises ConfigError for a server with another model than the one of this transformers config, or another dtype."""
    own = shape_of(config)
    differing = {key: (facts.shape.get(key), value) for key, value in own.items() if facts.shape.get(key) != value}
    if differing:
        told = ", ".join(f"{key} {theirs} where the recipe's has {ours}" for key, (theirs, ours) in differing.items())
        raise ConfigError(f"{url} serves another model than the recipe's: {told}. Start it with the recipe's model.")
    if facts.dtype != dtype:
        raise ConfigError(
            f"{url} computes in {facts.dtype}, the trainer in {dtype}: their log-probabilities would differ. Start it "
            f"with --dtype {dtype}, or set dtype in the recipe."
        )


def server_url(url: str) -> str:
    """Without a slash or /v1 at its end. Raises ConfigError where it is no URL of a server."""
    try:
        parts = urlsplit(url)
        is_server = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        is_bare = parts.username is None and not parts.query and not parts.fragment
    except ValueError:
        is_server = is_bare = False
    if not (is_server and is_bare):
        raise ConfigError("rollout.engine.urls must look like http://127.0.0.1:8000, without credentials or a query.")
    return url.rstrip("/").removesuffix("/v1")


def is_loopback(url: str) -> bool:
    """Whether it names this machine itself."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
