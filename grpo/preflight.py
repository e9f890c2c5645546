"""RunConfig -> the parts of a run, each checked. What can be wrong is found here, before anything is written.

Cheap checks first: names, bounds, files and endpoints before the weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from grpo.config import BandBetaConfig, BetaConfig, RunConfig
from grpo.errors import ConfigError
from grpo.objectives import build_objectives, check_objectives_of_prompts
from grpo.prompts import EncodedPrompt, PromptSource, encode_prompt, open_prompts
from grpo.rollout.base import RolloutEngine, SamplingParams
from grpo.rollout.transformers_engine import TransformersEngine
from grpo.runtime.devices import choose_device, choose_dtype
from grpo.runtime.models import check_model, end_token_ids, load_model, load_tokenizer
from grpo.runtime.policy import Policy
from grpo.runtime.seeding import derived_seed
from grpo.scoring import Scorer
from grpo.types import Prompt
from grpo.update.beta import BandBeta, BetaController, FixedBeta
from grpo.update.step import Updater
from rewards.base import RewardContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParts:
    """All that the trainer puts together."""

    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSource
    max_prompt_tokens: int
    """Room that the model's context leaves beside rollout.max_new_tokens."""
    params: SamplingParams
    policy: Policy
    engine: RolloutEngine
    scorer: Scorer
    eval_scorer: Scorer
    updater: Updater

    def encode(self, prompts: list[Prompt]) -> list[EncodedPrompt]:
        """Prompts as token ids. Raises DatasetError for one that does not fit the context."""
        return [encode_prompt(prompt, self.tokenizer, max_tokens=self.max_prompt_tokens) for prompt in prompts]

    def close(self) -> None:
        """Stop the scorers' threads and free the engine."""
        self.scorer.close()
        self.eval_scorer.close()
        self.engine.close()


def open_run(config: RunConfig, *, audit_path: Path | None = None) -> RunParts:
    """Check a recipe and build its parts. Writes nothing but the cache of a packaged model.

    Raises:
        InputError: whatever is wrong with the recipe, the model, the prompts or a reward.
    """
    prompts = open_prompts(config.prompts, seed=config.seed, objectives=list(config.objectives))
    check_objectives_of_prompts(prompts.objective_sets(), config.objectives, source=_prompts_name(config))
    _check_held_out(config, prompts)
    device = choose_device(config.device)
    check_model(config.model, config.base_dir)
    context = RewardContext(base_dir=config.base_dir, audit_path=audit_path)
    scorer, eval_scorer = _open_scorers(config, context)
    try:
        return _with_model(config, device, prompts, scorer, eval_scorer)
    except BaseException:
        scorer.close()
        eval_scorer.close()
        raise


def build_controller(config: BetaConfig) -> BetaController:
    """The controller that a recipe's `beta` describes."""
    if isinstance(config, BandBetaConfig):
        return BandBeta(
            initial=config.initial,
            low=config.low,
            high=config.high,
            rate=config.rate,
            minimum=config.minimum,
            maximum=config.maximum,
        )
    return FixedBeta(value=config.value)


def _prompts_name(config: RunConfig) -> str:
    prompts = config.prompts
    if prompts.type == "tasks":
        return f"prompts.names {list(prompts.names)}"
    return str(prompts.path if prompts.type == "file" else prompts.name)


def _check_held_out(config: RunConfig, prompts: PromptSource) -> None:
    if (config.eval.before or config.eval.after) and not prompts.held_out(1):
        raise ConfigError(
            "eval.before or eval.after is on, but there are no held-out prompts. Name them "
            "(prompts.held_out_path or prompts.held_out_split), or set eval.before=false and eval.after=false."
        )


def _open_scorers(config: RunConfig, context: RewardContext) -> tuple[Scorer, Scorer]:
    """The training scorer and the evaluation's; only those rewards are asked that the run will use."""
    objectives = build_objectives(config.objectives, context)
    for_evaluation = build_objectives(config.objectives, context, for_evaluation=True)
    scorer, eval_scorer = Scorer(objectives), Scorer(for_evaluation)
    try:
        scorer.check()
        if config.eval.before or config.eval.after:
            eval_scorer.check()
    except BaseException:
        scorer.close()
        eval_scorer.close()
        raise
    return scorer, eval_scorer


def _with_model(
    config: RunConfig, device: torch.device, prompts: PromptSource, scorer: Scorer, eval_scorer: Scorer
) -> RunParts:
    dtype = choose_dtype(config.dtype, device)
    tokenizer = load_tokenizer(config.model, base_dir=config.base_dir)
    model = load_model(config.model, dtype=dtype, base_dir=config.base_dir).to(device)  # pyright: ignore[reportArgumentType]
    params = sampling_params(config, end_token_ids(tokenizer, model.generation_config, config.rollout.end_tokens))
    context_tokens = int(model.config.get_text_config().max_position_embeddings)
    max_prompt_tokens = context_tokens - config.rollout.max_new_tokens
    num_held_out = config.eval.num_prompts if config.eval.before or config.eval.after else 0
    for prompt in [*prompts.to_check(), *prompts.held_out(num_held_out)]:
        encode_prompt(prompt, tokenizer, max_tokens=max_prompt_tokens)
    policy = Policy(model, config.trainable, seed=derived_seed(config.seed, "adapter"))
    updater = Updater(
        policy,
        {name: build_controller(objective.beta) for name, objective in config.objectives.items()},
        observed={name: objective.beta.observed for name, objective in config.objectives.items()},
        params=params,
        update=config.update,
        optim=config.optim,
    )
    return RunParts(
        tokenizer=tokenizer,
        prompts=prompts,
        max_prompt_tokens=max_prompt_tokens,
        params=params,
        policy=policy,
        engine=TransformersEngine(policy, tokenizer, max_rows=config.rollout.max_rows),
        scorer=scorer,
        eval_scorer=eval_scorer,
        updater=updater,
    )


def sampling_params(config: RunConfig, ends: tuple[int, ...]) -> SamplingParams:
    """The sampling law that the recipe's `rollout` describes."""
    rollout = config.rollout
    return replace(
        SamplingParams(end_token_ids=ends),
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_new_tokens=rollout.max_new_tokens,
        min_new_tokens=rollout.min_new_tokens,
        presence_penalty=rollout.presence_penalty,
        frequency_penalty=rollout.frequency_penalty,
    )
