"""Prompts with their completions -> a policy that has learned them: the supervised stage before the first step.

TRL's SFTTrainer trains the policy's own parameters (the adapter that reinforcement goes on with). What it leaves on
the model, in the process's random generators and in accelerate's state is put back. Knows nothing of rewards.
"""

from __future__ import annotations

import contextlib
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from grpo.config import WarmupConfig
from grpo.errors import ConfigError, DatasetError, NonFiniteUpdate
from grpo.prompt_rows import read_rows, to_messages
from grpo.prompts import encode_prompt
from grpo.runtime.packaged_model import quiet_transformers
from grpo.runtime.policy import Policy, dropout_off
from grpo.runtime.seeding import derived_seed
from grpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupExample:
    """One row of the file, as the model reads it."""

    token_ids: tuple[int, ...]
    """[T] the prompt as rollouts render it, then the completion up to and including its end token."""
    num_prompt_tokens: int
    """The first so many get no gradient."""
    is_cut: bool
    """It was longer than max_tokens, so its end is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupReport:
    """What the stage did."""

    steps: int
    """Optimizer steps taken; fewer than the recipe's where it was stopped."""
    loss_first: float
    """Mean negative log-likelihood of the first step's completion tokens, in nats, before it learned anything."""
    loss_last: float
    """The same of the last step's."""
    num_examples: int
    """Rows of the file."""
    num_tokens: int
    """Completion tokens of the file: what is learned from in one pass over it."""
    num_cut: int
    """Rows that were cut at max_tokens."""


def load_examples(
    config: WarmupConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_token_ids: Sequence[int],
    context_tokens: int | None,
) -> list[WarmupExample]:
    """Read and tokenise the file.

    The prompt's ids are those of rollouts, by construction: TRL would tokenise prompt and completion together, which
    can merge or drop tokens where they meet, and the policy would learn to answer another prompt than it is asked.
    A completion ends where a sampled one does, with its first end token.

    Args:
        end_token_ids: every token that ends a completion in rollouts.
        context_tokens: of the model; None where the context has no end.
    Raises:
        DatasetError: missing, empty or unreadable; a column is missing; a prompt leaves no room for its completion.
    """
    rows = read_rows(config.path)
    if not rows:
        raise DatasetError(f"{config.path} is empty: it holds no example for warmup")
    max_tokens = config.max_tokens if context_tokens is None else min(config.max_tokens, context_tokens)
    return [
        _to_example(
            row,
            config,
            tokenizer,
            end_token_ids=end_token_ids,
            max_tokens=max_tokens,
            place=f"{config.path} row {number}",
        )
        for number, row in enumerate(rows, start=1)
    ]


def micro_batch_rows(config: WarmupConfig, *, num_ranks: int) -> int:
    """Rows that go through the model together on a rank.

    Raises:
        ConfigError: a batch cannot be shared out among the ranks.
    """
    rows = config.micro_batch_size or max(config.batch_size // num_ranks, 1)
    if config.batch_size % (rows * num_ranks):
        raise ConfigError(
            f"warmup.batch_size is {config.batch_size}, which {num_ranks} processes with micro-batches of "
            f"{rows} cannot share out. Set it to a multiple of {num_ranks * rows}."
        )
    return rows


def warm_up(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    config: WarmupConfig,
    *,
    seed: int,
    end_token_ids: Sequence[int],
    context_tokens: int | None,
    on_step: Callable[[int, float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> WarmupReport:
    """Train the policy's trainable parameters on the file: AdamW, the learning rate falling linearly to 0.

    The reference stays what it is: the model before the warm-up. Rows are shuffled in every pass by the seed. On
    several ranks each takes its share of a batch.

    Args:
        seed: the run's.
        end_token_ids: every token that ends a completion in rollouts.
        context_tokens: of the model; None where the context has no end.
        on_step: told the step (counted from 1) and its loss in nats.
        should_stop: asked after every step. What is half warmed-up then is no state to go on from.
    Raises:
        ConfigError: a batch cannot be shared out among the ranks.
        DatasetError: the file cannot be used.
        NonFiniteUpdate: a loss or gradient is not finite; the parameters are lost.
    """
    examples = load_examples(config, tokenizer, end_token_ids=end_token_ids, context_tokens=context_tokens)
    losses: list[float] = []

    def after_step(step: int, loss: float) -> bool:
        losses.append(loss)
        if on_step is not None:
            on_step(step, loss)
        return should_stop is not None and should_stop()

    with (
        tempfile.TemporaryDirectory() as scratch,
        generators_kept(),
        accelerate_kept(),
        _model_kept(policy),
        dropout_off(policy.model),
        quiet_transformers(),
    ):
        arguments = _arguments(policy, config, seed=seed, scratch=scratch)
        trainer = _trainer(policy, tokenizer, arguments, examples, after_step=after_step)
        trainer.train()
    return WarmupReport(
        steps=len(losses),
        loss_first=losses[0],
        loss_last=losses[-1],
        num_examples=len(examples),
        num_tokens=sum(len(example.token_ids) - example.num_prompt_tokens for example in examples),
        num_cut=sum(example.is_cut for example in examples),
    )


def _to_example(
    row: Mapping[str, Any],
    config: WarmupConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_token_ids: Sequence[int],
    max_tokens: int,
    place: str,
) -> WarmupExample:
    for key in ("prompt_column", "completion_column"):
        if (column := getattr(config, key)) not in row:
            raise DatasetError(
                f"{place} has no column {column!r}; it has {sorted(row)}. Name the right one with warmup.{key}."
            )
    completion = row[config.completion_column]
    if not isinstance(completion, str) or not completion.strip():
        raise DatasetError(f"{place}: the completion is {completion!r}; expected a text that is not empty")
    messages = to_messages(row[config.prompt_column], place=place)
    prompt = Prompt(id=place, messages=messages, objectives=())
    prompt_ids = encode_prompt(prompt, tokenizer, max_tokens=None).token_ids
    if len(prompt_ids) >= max_tokens:
        raise DatasetError(
            f"{place}: the prompt has {len(prompt_ids)} tokens, and a row may have {max_tokens} with its completion "
            "(the smaller of warmup.max_tokens and the model's context). Raise warmup.max_tokens or drop the row."
        )
    token_ids = prompt_ids + _completion_ids(prompt, prompt_ids, completion, tokenizer, end_token_ids)
    return WarmupExample(
        token_ids=token_ids[:max_tokens], num_prompt_tokens=len(prompt_ids), is_cut=len(token_ids) > max_tokens
    )


def _completion_ids(
    prompt: Prompt,
    prompt_ids: tuple[int, ...],
    completion: str,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Sequence[int],
) -> tuple[int, ...]:
    """What follows the prompt in the rendered chat, through its first end token: what the policy should sample."""
    turns = [{"role": message.role, "content": message.content} for message in prompt.messages]
    turns.append({"role": "assistant", "content": completion})
    rendered: Any = tokenizer.apply_chat_template(
        turns, tokenize=True, return_dict=True, tokenizer_kwargs={"verbose": False}
    )
    whole = tuple(int(token) for token in rendered["input_ids"])
    if whole[: len(prompt_ids)] == prompt_ids:
        tail = whole[len(prompt_ids) :]
    else:
        # the template renders a finished turn in another way (it drops reasoning), or tokens merge where both meet:
        # after the prompt as rollouts have it comes the completion as it is
        tail = tuple(tokenizer.encode(completion, add_special_tokens=False))
    for place, token in enumerate(tail):
        if token in end_token_ids:
            return tail[: place + 1]
    ends = [token for token in whole if token in end_token_ids]
    return (*tail, ends[-1] if ends else end_token_ids[0])


def _arguments(policy: Policy, config: WarmupConfig, *, seed: int, scratch: str) -> Any:
    """TRL's SFTConfig: everything that would write, print, call home or cast is off."""
    from trl.trainer.sft_config import SFTConfig  # slow to import, and most runs have no warm-up

    ranks = PartialState().num_processes
    micro_batch_size = micro_batch_rows(config, num_ranks=ranks)
    on_cpu = policy.device.type == "cpu"
    training_seed = derived_seed(seed, "warmup") % 2**32  # numpy takes no longer one
    arguments = SFTConfig(
        output_dir=scratch,
        max_steps=config.steps,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=config.batch_size // (micro_batch_size * ranks),
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        seed=training_seed,
        data_seed=training_seed,
        max_length=None,  # rows are cut, and counted, when they are read
        bf16=policy.compute_dtype == torch.bfloat16,
        fp16=False,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would show the last good loss for one that is not finite
    )
    # one process drives one card; where it sees several, the trainer would take them for nn.DataParallel
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _trainer(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    arguments: Any,
    examples: Sequence[WarmupExample],
    *,
    after_step: Callable[[int, float], bool],
) -> Any:
    """TRL's trainer; `after_step` is told each step and its loss, and says whether to stop."""
    from datasets import Dataset
    from trl.trainer.sft_trainer import SFTTrainer

    class WarmupTrainer(SFTTrainer):
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            # instead of printing: no call of what it overrides
            if "loss" not in logs:  # the summary after the last step
                return
            if not all(math.isfinite(logs[key]) for key in ("loss", "grad_norm")):
                raise NonFiniteUpdate(
                    f"warmup step {self.state.global_step}: the loss is {logs['loss']}, the gradient's norm "
                    f"{logs['grad_norm']}. Lower warmup.learning_rate, and look at the rows of the file."
                )
            if after_step(self.state.global_step, logs["loss"]):
                self.control.should_training_stop = True

        def _send_telemetry(self) -> None:
            """Nobody is told of a run."""

    # ids and labels, as TRL makes them from prompt and completion; it takes them as they are
    rows = Dataset.from_list(
        [
            {
                "input_ids": list(example.token_ids),
                "labels": [-100] * example.num_prompt_tokens + list(example.token_ids[example.num_prompt_tokens :]),
            }
            for example in examples
        ]
    )
    return WarmupTrainer(model=policy.model, args=arguments, train_dataset=rows, processing_class=tokenizer)


@contextlib.contextmanager
def _model_kept(policy: Policy) -> Iterator[None]:
    """Puts back what the trainer and accelerate set on the model: forward, autocast wrapper, tags, config, mode.

    Weights are not touched. A forward that stays wrapped would change the arithmetic of every later step.
    """
    model = policy.causal_lm
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (vars(holder), dict(vars(holder)))
        for holder in (*policy.model.modules(), model.config, model.config.get_text_config(), model.generation_config)
        if holder is not None
    ]
    try:
        yield
    finally:
        for current, before in kept:
            current.clear()
            current.update(before)
        for parameter in policy.trainable_parameters().values():
            parameter.grad = None


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Puts back every global random generator: the trainer seeds them all."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def accelerate_kept() -> Iterator[None]:
    """Puts back accelerate's state, which the trainer resets; the process group stays as it is."""
    holders = (PartialState, AcceleratorState, GradientState)
    kept = [(holder._shared_state, dict(holder._shared_state)) for holder in holders]
    try:
        yield
    finally:
        for current, before in kept:
            current.clear()
            current.update(before)
