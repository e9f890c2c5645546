"""A recipe's `rollout` section -> SamplingParams, the law that engine and trainer share. Knows no engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from grpo.config import RunConfig
from grpo.errors import ConfigError
from grpo.rollout.banned_texts import banned_sequences
from grpo.rollout.base import SamplingParams
from grpo.rollout.processors import load_processor
from rewards.registry import make_local_module_importable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grpo.config import RolloutConfig


def sampling_params(config: RunConfig, ends: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> SamplingParams:
    """The sampling law that the recipe's `rollout` describes.

    Raises:
        ConfigError: a banned text is empty, or would rule out an end token; parameters of a processor are no JSON.
    """
    rollout = config.rollout
    return replace(
        SamplingParams(end_token_ids=ends),
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        max_new_tokens=rollout.max_new_tokens,
        min_new_tokens=rollout.min_new_tokens,
        presence_penalty=rollout.presence_penalty,
        frequency_penalty=rollout.frequency_penalty,
        penalties_over=rollout.penalties_over,
        repetition_penalty=rollout.repetition_penalty,
        repetition_over=rollout.repetition_over,
        banned=banned_sequences(rollout.banned, tokenizer, end_token_ids=ends),
        no_repeat_ngram=rollout.no_repeat_ngram,
        custom=_custom_processors(rollout),
    )


def check_processors(rollout: RolloutConfig, base_dir: Path) -> None:
    """Load them; from here on their modules can be imported. Raises ConfigError for one that cannot be loaded."""
    for path, parameters in _custom_processors(rollout):
        make_local_module_importable(path.partition(":")[0], base_dir)
        load_processor(path, parameters)


def _custom_processors(rollout: RolloutConfig) -> tuple[tuple[str, str], ...]:
    """(path, parameters as JSON) of each."""
    found: list[tuple[str, str]] = []
    for place, processor in enumerate(rollout.processors):
        try:
            found.append((processor.path, json.dumps(processor.params, sort_keys=True, allow_nan=False)))
        except (TypeError, ValueError) as exc:
            raise ConfigError(
                f"rollout.processors[{place}].params of {processor.path} cannot be written as JSON: {exc}. Use texts, "
                "finite numbers, lists and tables of them."
            ) from exc
    return tuple(found)
