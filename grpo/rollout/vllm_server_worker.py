"""What a vLLM server's workers gain beside the weight sync: they say what they serve, and how.

Loaded by vLLM (`--worker-extension-cls` with `vllm_law.SERVER_EXTENSION`), as `python -m grpo.rollout.vllm_serve` asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from grpo.rollout.vllm_facts import ServerFacts, shape_of
from grpo.rollout.vllm_worker import WeightSync


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
            has_base_weights=self._grpo_has_base_weights,
        )
        return dataclasses.asdict(facts)

    def grpo_load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> dict[str, Any]:
        """As `WeightSync.grpo_load_weights`; from here on the base model's own weights are gone."""
        self._grpo_has_base_weights = False
        return super().grpo_load_weights(weights, version=version)
