"""A recipe's `rollout.engine` -> the engine. Each is imported only where it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo.config import RunConfig, VllmEngineConfig, VllmServerConfig
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import RolloutEngine, SamplingParams
from grpo.runtime.distributed import Ranks
from grpo.runtime.models import resolve_model
from grpo.runtime.policy import Policy
from grpo.runtime.seeding import derived_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_engine(config: RunConfig) -> None:
    """What can be known of the engine before the weights are read: that it is installed, or that its servers answer.

    Raises:
        ConfigError: it is not, it is too old, or a server was not started for this.
    """
    if isinstance(config.rollout.engine, VllmEngineConfig):
        from grpo.rollout.vllm_engine import check_installed

        check_installed()
    if isinstance(config.rollout.engine, VllmServerConfig):
        from grpo.rollout.vllm_server import check_servers

        check_servers(config.rollout.engine, max_new_tokens=config.rollout.max_new_tokens)


def open_engine(
    config: RunConfig,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    params: SamplingParams,
    *,
    longest_prompt: int = 1,
    image_prompt: EncodedPrompt | None = None,
) -> RolloutEngine:
    """The engine with the policy's weights in it.

    Args:
        params: the law of training; an engine that cannot sample by it says so now.
        longest_prompt: tokens of the longest prompt there is; an engine without room for it says so now.
        image_prompt: for a vision-language model, any prompt with images; an engine that cannot sample after it says so
            now.
    Raises:
        ConfigError: it cannot be started with this recipe.
        ModelError: it cannot sample from this model.
    """
    rollout = config.rollout
    if isinstance(rollout.engine, VllmEngineConfig):
        from grpo.rollout.vllm_engine import VllmEngine

        return VllmEngine(
            policy,
            tokenizer,
            rollout.engine,
            model=resolve_model(config.model, config.base_dir),
            params=params,
            max_rows=rollout.max_rows,
            longest_prompt=longest_prompt,
            seed=derived_seed(config.seed, "engine"),
        )
    if isinstance(rollout.engine, VllmServerConfig):
        from grpo.rollout.vllm_server import VllmServerEngine

        ranks = Ranks(use_cpu=config.device == "cpu")  # joined already
        return VllmServerEngine(
            policy, tokenizer, rollout.engine, params=params, ranks=ranks, longest_prompt=longest_prompt
        )
    from grpo.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(
        policy,
        tokenizer,
        max_rows=rollout.max_rows,
        max_batch_tokens=rollout.max_batch_tokens,
        image_prompt=image_prompt,
    )
