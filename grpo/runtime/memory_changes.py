"""A recipe that may not fit -> what could be changed in it. Knows keys and values; counts no bytes; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grpo.config import LoraTrainable, RunConfig
from grpo.runtime.memory_rows import largest_micro_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One change."""

    values: Mapping[str, Any]
    """Arguments of `changed`."""
    text: str
    """The same as `grpo train` takes it."""
    why: str
    keeps_gradient: bool = True
    takes_time: bool = False
    """Arithmetic or copies that there were not before."""


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """The recipe with other values. Args: changes: "section__key" or "key" -> value."""
    updated = config
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        if section:
            value = getattr(updated, section).model_copy(update={key: value})
        updated = updated.model_copy(update={section or key: value})
    return updated


def candidate_changes(
    config: RunConfig,
    *,
    is_cpu: bool,
    gains_bfloat16: bool,
    micro_batch_tokens: int,
    largest_budget: int | None,
    prompt_tokens: int,
) -> list[Candidate]:
    """All that might lower the peak, one key each, in no order.

    Args:
        gains_bfloat16: the run would be in float32, and the hardware multiplies bfloat16.
        micro_batch_tokens: of the largest micro-batch as it is now, padding included.
        largest_budget: the largest update.micro_batch_tokens that fits; None where none does.
        prompt_tokens: of the longest prompt.
    """
    smaller = list(_smaller_micro_batches(config, micro_batch_tokens, largest_budget, prompt_tokens))
    return [
        *_recomputed(config),
        *([] if is_cpu else _moved_to_the_host(config)),
        *smaller,
        *_in_turns(config),
        *_fewer_numbers(config, gains_bfloat16=gains_bfloat16),
    ]


def _smaller_micro_batches(config: RunConfig, now: int, largest: int | None, prompt_tokens: int) -> Iterator[Candidate]:
    """The largest that fit, then half as many tokens each, down to one completion."""
    row = prompt_tokens + config.rollout.max_new_tokens
    why = "smaller micro-batches, more of them: the same effective batch"
    budgets: list[int] = []

    def exact(budget: int) -> int:  # no more than its rows take
        return largest_micro_batch(changed(config, update__micro_batch_tokens=budget), prompt_tokens).padded_tokens

    if largest is not None:
        budgets.append(exact(largest))
    tokens = now
    while tokens > row:
        tokens = exact(max(tokens // 2, row))
        budgets.append(tokens)
    for budget in dict.fromkeys(budget for budget in budgets if budget < now):
        yield Candidate(
            values={"update__micro_batch_tokens": budget}, text=f"update.micro_batch_tokens={budget}", why=why
        )


def _in_turns(config: RunConfig) -> Iterator[Candidate]:
    rollout = config.rollout
    if rollout.engine.type == "transformers" and rollout.max_rows > rollout.group_size:
        yield Candidate(
            values={"rollout__max_rows": rollout.group_size},
            text=f"rollout.max_rows={rollout.group_size}",
            why="fewer rows decoded side by side: the same completions, sampled in turns",
        )


def _fewer_numbers(config: RunConfig, *, gains_bfloat16: bool) -> Iterator[Candidate]:
    """Another run: fewer parameters, fewer bits, fewer tokens."""
    if config.trainable.type == "lora" and config.quantization == "none":
        why = "frozen weights in 4 bits (the extra qlora): rounded, and multiplied more slowly"
        yield Candidate(
            values={"quantization": "nf4"}, text="quantization=nf4", why=why, keeps_gradient=False, takes_time=True
        )
    if config.trainable.type == "full":
        why = "adapters in place of all weights: no second model, few moments"
        yield Candidate(
            values={"trainable": LoraTrainable()}, text="trainable={type: lora}", why=why, keeps_gradient=False
        )
        if config.optim.type == "adamw":
            why = "moments in 8 bits (the extra 8bit)"
            yield Candidate(
                values={"optim__type": "adamw_8bit"}, text="optim.type=adamw_8bit", why=why, keeps_gradient=False
            )
    if gains_bfloat16:
        why = "half the bytes of weights and activations"
        yield Candidate(values={"dtype": "bfloat16"}, text="dtype=bfloat16", why=why, keeps_gradient=False)
    if config.rollout.max_new_tokens > 1:
        half = config.rollout.max_new_tokens // 2
        why = "shorter completions: another task"
        yield Candidate(
            values={"rollout__max_new_tokens": half},
            text=f"rollout.max_new_tokens={half}",
            why=why,
            keeps_gradient=False,
        )


def _recomputed(config: RunConfig) -> Iterator[Candidate]:
    """Blocks that are computed again for their gradient."""
    stages = ("none", "selective", "full")
    for value in stages[stages.index(config.update.checkpointing) + 1 :]:
        share = "every second block" if value == "selective" else "every block"
        yield Candidate(
            values={"update__checkpointing": value},
            text=f"update.checkpointing={value}",
            why=f"{share} keeps its input alone and is computed again: the same gradient, in more time",
            takes_time=True,
        )


def _moved_to_the_host(config: RunConfig) -> Iterator[Candidate]:
    """What can wait in the host's memory."""
    if config.update.offload == "none":
        yield Candidate(
            values={"update__offload": "activations"},
            text="update.offload=activations",
            why="what a pass keeps waits in the host's memory: the same gradient, for the time of the copies",
            takes_time=True,
        )
    if config.optim.offload == "none" and config.trainable.type == "full":
        yield Candidate(
            values={"optim__offload": "states"},
            text="optim.offload=states",
            why="moments wait in the host's memory between steps: the same step, for the time of the copies",
            takes_time=True,
        )
