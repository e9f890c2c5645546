"""The sampling law as vLLM takes it: native arguments, and the rest as text for our logits processor. Imports no vLLM.

vLLM divides by the temperature and keeps top-p and top-k as the trainer's replay does. Bans, penalties and processors
of one's own run in `grpo.rollout.vllm_processors`, which the engine or the server loads.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from grpo.errors import ConfigError
from grpo.rollout.base import SamplingParams
from grpo.rollout.processors import build_processors

PROCESSOR = "grpo.rollout.vllm_processors:LawProcessor"
"""For `LLM(logits_processors=[...])` and `--logits-processors`."""
WORKER_EXTENSION = "grpo.rollout.vllm_worker.WeightSync"
"""For `LLM(worker_extension_cls=...)` and `--worker-extension-cls`."""
LAW_KEY = "grpo_law"
"""Of a request's `extra_args` (over HTTP: `vllm_xargs`)."""
PROCESSORS_VARIABLE = "GRPO_VLLM_PROCESSORS"
"""Environment variable of a server: the processors of one's own that requests may name, separated by commas. Without
it none: a name is imported and called, and requests may come from anywhere."""
LOWEST_TEMPERATURE = 0.01
"""vLLM raises lower ones to this with a warning; 0 is greedy."""


def native_arguments(params: SamplingParams, *, seed: int) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams`, and fields of `/v1/completions`, for one completion; the law's text apart.

    The end tokens are exactly `params.end_token_ids`: vLLM's own is ignored, for it may not be among them.
    """
    filters: dict[str, Any] = {"top_p": params.top_p, "top_k": params.top_k or -1, "min_p": params.min_p}
    if needs_own_filters(params):
        filters = {"top_p": 1.0, "top_k": -1, "min_p": 0.0}
    return {
        "n": 1,
        "seed": seed,
        "temperature": params.temperature,
        **filters,
        "max_tokens": params.max_new_tokens,
        "stop_token_ids": list(params.end_token_ids),
        "ignore_eos": True,
        "logprobs": 0,  # the sampled token's alone
    }


def extra_arguments(params: SamplingParams) -> dict[str, str]:
    """A request's `extra_args`: the law as text where our processor has work to do."""
    if build_processors(params) or needs_own_filters(params):
        return {LAW_KEY: law_text(params)}
    return {}


def needs_own_filters(params: SamplingParams) -> bool:
    """Whether the kept set must be ours: vLLM's min-p comes before its top-p, whose mass is then another one."""
    return params.temperature > 0 and params.min_p > 0 and params.top_p < 1


def check_law(params: SamplingParams) -> None:
    """Whether vLLM can sample by this law.

    Raises:
        ConfigError: it cannot; or a processor of one's own cannot be loaded.
    """
    if 0 < params.temperature < LOWEST_TEMPERATURE:
        raise ConfigError(
            f"rollout.temperature is {params.temperature}, but vLLM samples at {LOWEST_TEMPERATURE} where less is "
            "asked for, which the trainer would not know. Set it higher, or use the transformers engine."
        )
    build_processors(params)


def law_text(params: SamplingParams) -> str:
    """The law as JSON; equal laws give equal texts."""
    return json.dumps(dataclasses.asdict(params), sort_keys=True)


def law_of(text: str) -> SamplingParams:
    """The law that `law_text` wrote.

    Raises:
        ValueError: it is none.
    """
    try:
        return SamplingParams(**{name: _as_tuple(value) for name, value in json.loads(text).items()})
    except (TypeError, AttributeError, ValueError) as exc:
        raise ValueError(f"{LAW_KEY} is no sampling law of this version of grpo-toolkit: {exc}") from exc


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value
