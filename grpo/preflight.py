"""RunConfig -> the parts of a run, each checked. What can be wrong is found here, before anything is written.

Cheap checks first: names, bounds, files and endpoints before the weights are read.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from grpo.config import (
    BandBetaConfig,
    BetaConfig,
    CustomLossConfig,
    DualBetaConfig,
    EntropyConfig,
    FixedEntropyConfig,
    ProportionalBetaConfig,
    RunConfig,
    TransformersEngineConfig,
)
from grpo.errors import ConfigError
from grpo.journal import Journal
from grpo.objectives import build_objectives, check_objectives_of_prompts
from grpo.prompt_images import ImageTextEncoder
from grpo.prompts import PromptSource, check_prompt, made_up_prompt, open_prompts
from grpo.rollout.engines import check_engine, open_engine
from grpo.rollout.processors import check_custom_processors
from grpo.run_parts import RunParts
from grpo.runtime.devices import check_offload, choose_attention, choose_device, choose_dtype
from grpo.runtime.distributed import Ranks, launched_for_cpu
from grpo.runtime.image_processors import load_image_text_processor
from grpo.runtime.models import (
    check_model,
    end_token_ids,
    has_flash_attention,
    load_model,
    load_tokenizer,
    reads_images,
)
from grpo.runtime.policy import Policy, language_model_head
from grpo.runtime.quantization import check_quantization, quantize
from grpo.runtime.seeding import derived_seed
from grpo.sampling_law import check_processors, sampling_params
from grpo.scoring import Scorer
from grpo.trackers import check_trackers
from grpo.update.beta import BandBeta, BetaController, DualBeta, FixedBeta, ProportionalBeta
from grpo.update.entropy import AdaptiveEntropyBonus, EntropyBonus, FixedEntropyBonus
from grpo.update.losses import load_custom_loss
from grpo.update.step import Updater
from grpo.warmup import load_examples, micro_batch_rows
from rewards.base import RewardContext
from rewards.registry import make_local_module_importable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


Purpose: TypeAlias = Literal["train", "evaluate"]
"""What a run is opened for. Rewards that it will not ask are neither built nor checked: a judged run can be evaluated
where its judge cannot be reached."""


def open_run(
    config: RunConfig,
    *,
    purpose: Purpose = "train",
    audit_path: Path | None = None,
    journal: Journal | None = None,
    ranks: Ranks | None = None,
) -> RunParts:
    """Check a recipe and build its parts. Writes nothing but the cache of a packaged model.

    Args:
        purpose: what the parts are for; only what that needs is checked.
        audit_path: where judges write what they were asked and answered; nowhere where None.
        journal: keeps what was sampled and scored of the step under way; nothing is kept where None.
        ranks: the processes of the run; found from the environment where None.
    Raises:
        InputError: whatever is wrong with the recipe, the model, the prompts or a reward.
    """
    prompts = open_prompts(config.prompts, seed=config.seed, objectives=list(config.objectives))
    check_objectives_of_prompts(prompts.objective_sets(), config.objectives, source=_prompts_name(config))
    _check_held_out(config, prompts, purpose)
    _check_update(config, purpose)
    check_processors(config.rollout, config.base_dir)
    if purpose == "train":
        check_trackers(config.trackers)
    ranks = ranks or Ranks(use_cpu=config.device == "cpu")
    if purpose == "train" and config.warmup is not None:
        micro_batch_rows(config.warmup, num_ranks=ranks.count)
    device_name = "cpu" if config.device == "auto" and launched_for_cpu() else config.device
    device = choose_device(device_name, index=ranks.device_index)
    if purpose == "train":
        check_offload(device, update_offload=config.update.offload, optim_offload=config.optim.offload)
    check_quantization(config.quantization)
    check_model(config.model, config.base_dir)
    if reads_images(config.model, base_dir=config.base_dir):
        _check_offered_with_images(config)
    check_engine(config)
    context = RewardContext(
        base_dir=config.base_dir,
        audit_path=audit_path,
        replay_path=config.scoring.replay,
        received=journal,
        num_processes=ranks.count,
    )
    scorer, eval_scorer = _open_scorers(config, context, purpose, journal)
    try:
        return _with_model(config, device, ranks, prompts, scorer, eval_scorer, purpose)
    except BaseException:
        scorer.close()
        eval_scorer.close()
        raise


def build_controller(config: BetaConfig) -> BetaController:
    """The controller that a recipe's `beta` describes."""
    arguments = config.model_dump(exclude={"type", "observe"})
    match config:
        case BandBetaConfig():
            return BandBeta(**arguments)
        case ProportionalBetaConfig():
            return ProportionalBeta(**arguments)
        case DualBetaConfig():
            return DualBeta(**arguments)
        case _:
            return FixedBeta(**arguments)


def build_entropy_bonus(config: EntropyConfig | None) -> EntropyBonus | None:
    """The bonus that a recipe's `update.entropy` describes."""
    if config is None:
        return None
    arguments = config.model_dump(exclude={"type"})
    return (
        FixedEntropyBonus(**arguments) if isinstance(config, FixedEntropyConfig) else AdaptiveEntropyBonus(**arguments)
    )


def _check_update(config: RunConfig, purpose: Purpose) -> None:
    if isinstance(config.update.loss, CustomLossConfig):  # in an evaluation too: the updater is built there as well
        _check_custom_loss(config.update.loss, config.base_dir)
    if purpose == "train" and config.warmup is not None and not config.warmup.path.is_file():
        raise ConfigError(f"warmup.path {config.warmup.path} is no file. Name a JSON-lines file of examples.")


def _check_custom_loss(loss: CustomLossConfig, base_dir: Path) -> None:
    """Load it, and bind its parameters; from here on its module can be imported, as a reward's beside the recipe can.

    Raises:
        ConfigError: it cannot be found, its module cannot be run, or the parameters do not fit.
    """
    make_local_module_importable(loss.path.partition(":")[0], base_dir)
    try:
        function = load_custom_loss(loss.path)
    except ValueError as exc:
        raise ConfigError(f"update.loss.path: {exc}") from exc
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some C callables have none
        return
    try:
        signature.bind(None, **loss.params)
    except TypeError as exc:
        raise ConfigError(
            f"update.loss.params: they do not fit {loss.path}{signature}, which gets a LossInput and the parameters as "
            f"keyword arguments: {exc}"
        ) from exc


def _prompts_name(config: RunConfig) -> str:
    prompts = config.prompts
    if prompts.type == "tasks":
        return f"prompts.names {list(prompts.names)}"
    return str(prompts.path if prompts.type == "file" else prompts.name)


def _evaluates(config: RunConfig, purpose: Purpose) -> bool:
    return purpose == "evaluate" or config.eval.is_on


def _check_held_out(config: RunConfig, prompts: PromptSource, purpose: Purpose) -> None:
    if not _evaluates(config, purpose) or prompts.held_out(1):
        return
    if purpose == "evaluate":
        raise ConfigError(
            "there are no held-out prompts to evaluate on. Name them: prompts.held_out_path=FILE for prompts from a "
            "file, prompts.held_out_split=NAME for those from the hub."
        )
    raise ConfigError(
        "eval.before, eval.after or eval.every is on, but there are no held-out prompts. Name them "
        "(prompts.held_out_path or prompts.held_out_split), or set eval.before=false, eval.after=false and "
        "eval.every=null."
    )


def _open_scorers(
    config: RunConfig, context: RewardContext, purpose: Purpose, journal: Journal | None
) -> tuple[Scorer, Scorer]:
    """The training scorer and the evaluation's; each without rewards where the run will not use it."""
    training = build_objectives(config.objectives, context) if purpose == "train" else ()
    evaluating = (
        build_objectives(config.objectives, context, for_evaluation=True) if _evaluates(config, purpose) else ()
    )
    scorer, eval_scorer = Scorer(training, journal=journal), Scorer(evaluating, journal=journal)
    try:
        scorer.check()
        eval_scorer.check()
    except BaseException:
        scorer.close()
        eval_scorer.close()
        raise
    return scorer, eval_scorer


def _with_model(
    config: RunConfig,
    device: torch.device,
    ranks: Ranks,
    prompts: PromptSource,
    scorer: Scorer,
    eval_scorer: Scorer,
    purpose: Purpose,
) -> RunParts:
    dtype = choose_dtype(config.dtype, device)
    tokenizer = load_tokenizer(config.model, base_dir=config.base_dir)
    processor = load_image_text_processor(config.model, tokenizer, base_dir=config.base_dir)
    image_encoder = None if processor is None else ImageTextEncoder(processor)
    attention = choose_attention(
        config.attention, device, dtype, model_has_flash=has_flash_attention(config.model, base_dir=config.base_dir)
    )
    model = load_model(config.model, dtype=dtype, base_dir=config.base_dir, attention=attention)
    if config.quantization != "none":
        model = quantize(model, device=device, compute_dtype=dtype)
    model = model.to(device)  # pyright: ignore[reportArgumentType]
    ends = end_token_ids(tokenizer, model.generation_config, config.rollout.end_tokens)
    params = sampling_params(config, ends, tokenizer)
    check_custom_processors(params, vocab_size=language_model_head(model).weight.shape[0])
    context_tokens = context_length(model.config)
    max_prompt_tokens = None if context_tokens is None else context_tokens - config.rollout.max_new_tokens
    to_check = prompts.to_check() if purpose == "train" else []
    held_out = prompts.held_out(config.eval.num_prompts) if _evaluates(config, purpose) else []
    lengths = [
        check_prompt(prompt, tokenizer, max_tokens=max_prompt_tokens, image_encoder=image_encoder)
        for prompt in [*to_check, *held_out]
    ]
    longest_prompt = max(lengths, default=1)
    if purpose == "train" and config.warmup is not None:
        load_examples(
            config.warmup, tokenizer, end_token_ids=params.end_token_ids, context_tokens=context_tokens
        )  # its rows must be good before anything is written
    policy = Policy(
        model, config.trainable, seed=derived_seed(config.seed, "adapter"), tokenizer=processor or tokenizer
    )
    updater = Updater(
        policy,
        {name: build_controller(objective.beta) for name, objective in config.objectives.items()},
        observed={name: objective.beta.observed for name, objective in config.objectives.items()},
        params=params,
        update=config.update,
        optim=config.optim,
        entropy_bonus=build_entropy_bonus(config.update.entropy),
        ranks=ranks,
    )
    return RunParts(
        ranks=ranks,
        tokenizer=tokenizer,
        prompts=prompts,
        max_prompt_tokens=max_prompt_tokens,
        params=params,
        policy=policy,
        engine=open_engine(
            config,
            policy,
            tokenizer,
            params,
            longest_prompt=longest_prompt,
            image_prompt=None if image_encoder is None else made_up_prompt(image_encoder),
        ),
        scorer=scorer,
        eval_scorer=eval_scorer,
        updater=updater,
        image_encoder=image_encoder,
    )


def _check_offered_with_images(config: RunConfig) -> None:
    """Raises ConfigError for what is not offered for a vision-language model, with or without images."""
    if not isinstance(config.rollout.engine, TransformersEngineConfig):
        raise ConfigError(
            f"rollout.engine {config.rollout.engine.type} does not take vision-language models, such as "
            f"{config.model!r}, yet. Set rollout.engine.type=transformers."
        )
    if config.warmup is not None:
        raise ConfigError(
            f"warmup does not take vision-language models, such as {config.model!r}. Leave warmup out, or name a model "
            "that has been fine-tuned already."
        )


def context_length(config: PreTrainedConfig) -> int | None:
    """Tokens that fit the model's context; None where its config names no end, as with ALiBi or recurrent models."""
    tokens = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(tokens) if tokens is not None and tokens > 0 else None
