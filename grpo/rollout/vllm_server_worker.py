"""What a vLLM server's workers gain beside the weight sync: they say what they serve, and how.

Loaded by vLLM (`--worker-extension-cls` with `vllm_facts.SERVER_EXTENSION`), as `grpo.rollout.vllm_serve` asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from grpo.rollout.vllm_facts import ServerFacts, shape_of
from grpo.rollout.vllm_worker import WeightSync, check_weights


class ServerWeightSync(WeightSync):
    """Methods that a server's worker gains; see `WeightSync`."""

    vllm_config: Any  # the worker's own
    _grpo_has_base_weights: bool = True

    def grpo_facts(self) -> dict[str, Any]:
        """`ServerFacts` as a dict."""
        config = self.vllm_config
        lora = config.lora_config
        facts = ServerFacts(
            shape=shape_of(config.model_config.hf_config),
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            device=str(config.device_config.device_type),
            max_model_len=int(config.model_config.max_model_len),
            logprobs_mode=str(config.model_config.logprobs_mode),
            logits_processors=[str(path) for path in config.model_config.logits_processors or ()],
            max_lora_rank=int(lora.max_lora_rank) if lora is not None else None,
            num_shards=int(config.parallel_config.tensor_parallel_size * config.parallel_config.pipeline_parallel_size),
            has_base_weights=self._grpo_has_base_weights,
        )
        return dataclasses.asdict(facts)

    def grpo_check_base_file(self, path: str) -> int:
        """How many of the base model's weights were compared with the trainer's.

        Args:
            path: safetensors of `vllm_sync.read_back_samples`.
        Raises:
            EngineError: one differs: an adapter would be added to another model than the one it is learned on.
        """
        return check_weights(self.model_runner.get_model(), load_file(path))

    def grpo_load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> dict[str, Any]:
        """As `WeightSync.grpo_load_weights`; from here on the base model's own weights are gone."""
        self._grpo_has_base_weights = False
        return super().grpo_load_weights(weights, version=version)
