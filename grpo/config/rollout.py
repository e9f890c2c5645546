"""How completions are sampled, and by which engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo.config.base import StrictModel

PenaltyScope = Literal["completion", "prompt", "both"]


class CustomProcessorConfig(StrictModel):
    """A logits processor of one's own: a `grpo.rollout.processors.Processor`, built with these parameters."""

    path: str = Field(pattern=r"^[\w.]+:[\w.]+$")
    """package.module:name of a class, installed or beside the recipe; also importable where vLLM's workers run."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Its keyword arguments."""


class TransformersEngineConfig(StrictModel):
    """transformers in the trainer's process. Needs nothing more; the reference the others are held against."""

    type: Literal["transformers"] = "transformers"


class _VllmConfig(StrictModel):
    """What both ways to run vLLM have."""

    sync: Literal["auto", "adapter", "merged"] = "auto"
    """What a weight sync carries: the LoRA tensors, or whole weights with the adapter merged in. auto is adapter on
    GPUs and merged on the CPU, where vLLM's LoRA costs three times as much per token."""
    sync_timeout_s: float = Field(default=300.0, gt=0)
    """A sync that takes longer stops the run and names what it waited for."""


class VllmEngineConfig(_VllmConfig):
    """vLLM in the trainer's process (extra `vllm`; on a CPU scripts/install_vllm_cpu.sh)."""

    type: Literal["vllm"]
    memory_fraction: float = Field(default=0.45, gt=0, lt=1)
    """Share of the GPU's memory that vLLM may take; on a CPU kv_cache_gib counts instead."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Of the cache, on a CPU."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Tokens of the longest prompt and completion together; None: the model's context."""
    compile: bool = False
    """Compile the model: minutes at the start, faster afterwards."""
    sleep: bool = True
    """Free the engine's memory while the update runs, where the platform can."""


class VllmServerConfig(_VllmConfig):
    """One or more `vllm serve` processes, started with `python -m grpo.rollout.vllm_serve` for weight sync."""

    type: Literal["vllm_server"]
    urls: tuple[str, ...] = Field(min_length=1)
    """http://host:port of each; requests are spread over them, and each takes every sync."""
    api_key: str | None = Field(default=None, pattern=r"^env:[A-Za-z_][A-Za-z0-9_]*$")
    """env:NAME, never the key itself."""
    transfer_dir: Path | None = None
    """Folder that trainer and servers both see, through which weights go; None: /dev/shm, for servers on this
    machine."""
    max_connections: int = Field(default=64, ge=1)
    """Requests in flight per server."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """For one completion, waiting in the server's queue included."""


EngineConfig = Annotated[TransformersEngineConfig | VllmEngineConfig | VllmServerConfig, Field(discriminator="type")]


class RolloutConfig(StrictModel):
    """How completions are sampled. temperature, top_p, top_k and min_p go to the engine as its own arguments."""

    engine: EngineConfig = TransformersEngineConfig()
    group_size: int = Field(default=8, ge=2)
    """K completions per prompt; advantages are relative to the group, so at least 2."""
    temperature: float = Field(default=1.0, gt=0)
    """A greedy policy (0) has no policy gradient: refused."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 keeps all tokens."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Drops tokens less likely than this share of the likeliest."""
    max_new_tokens: int = Field(default=256, ge=1)
    min_new_tokens: int = Field(default=0, ge=0)
    """No end token among the first so many tokens."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken off the logit of each token that occurred, before the temperature (OpenAI, vLLM)."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """As presence_penalty, times the number of occurrences."""
    penalties_over: PenaltyScope = "completion"
    """Where presence and frequency are counted."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    """Divides positive logits and multiplies negative ones of tokens that occurred (Keskar et al. 2019); 1 is none."""
    repetition_over: PenaltyScope = "both"
    """Where the tokens of repetition_penalty are looked for; both is what vLLM and transformers do."""
    banned: tuple[str, ...] = ()
    """Texts that no completion shall hold, as the tokenizer writes them: as they stand, after a space and at the start
    of a line. The last token is ruled out where the others came before it; another split of the text gets through."""
    no_repeat_ngram: int = Field(default=0, ge=0)
    """No sequence of so many tokens twice in a completion; 0 allows all."""
    processors: tuple[CustomProcessorConfig, ...] = ()
    """One's own, after the others, in this order."""
    end_tokens: tuple[str | int, ...] = ()
    """Further end tokens, by id or text, besides those of tokenizer, generation config and chat template."""
    resample_rounds: int = Field(default=0, ge=0)
    """Dynamic sampling (DAPO): groups whose scores are all equal are replaced by groups of other prompts, at most so
    many times a step."""
    max_rows: int = Field(default=64, ge=1)
    """Rows decoded side by side; more prompts are sampled in turns."""
    max_batch_tokens: int | None = Field(default=None, ge=1)
    """Most tokens, prompts and max_new_tokens together, that the rows decoded side by side may come to; None: no
    limit beside max_rows."""

    @model_validator(mode="after")
    def _ends_fit(self) -> RolloutConfig:
        if self.min_new_tokens >= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens = {self.min_new_tokens} leaves no token for an end within "
                f"max_new_tokens = {self.max_new_tokens}; set it lower"
            )
        return self
