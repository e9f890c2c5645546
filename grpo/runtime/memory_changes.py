"""A recipe that may not fit -> what could be changed in it. Knows keys and values; counts no bytes; no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

from grpo.config import LoraTrainable, RunConfig
from grpo.runtime.memory_rows import largest_micro_batch

Candidate: TypeAlias = tuple[dict[str, Any], str, str, bool]
"""Arguments of `changed`, the same as `grpo train` takes it, why it helps, and whether the gradient stays the same."""


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
    config: RunConfig, *, is_cpu: bool, gains_bfloat16: bool, micro_batch_tokens: int, prompt_tokens: int
) -> list[Candidate]:
    """All that might lower the peak, in no order.

    Args:
        gains_bfloat16: the run would be in float32, and the hardware multiplies bfloat16.
        micro_batch_tokens: of the largest micro-batch as it is now, padding included.
        prompt_tokens: of the longest prompt.
    """
    rollout = config.rollout
    row = prompt_tokens + rollout.max_new_tokens
    candidates: list[Candidate] = []
    candidates += _recomputed(config, row)
    if not is_cpu:
        candidates += _moved_to_the_host(config)
    if config.trainable.type == "lora" and config.quantization == "none":
        why = "frozen weights in 4 bits (the extra qlora): rounded, and multiplied more slowly"
        candidates.append(({"quantization": "nf4"}, "quantization=nf4", why, False))
        if rollout.engine.type == "transformers":
            all_three = {
                "quantization": "nf4",
                "update__micro_batch_tokens": row,
                "rollout__max_rows": rollout.group_size,
            }
            text = f"quantization=nf4 update.micro_batch_tokens={row} rollout.max_rows={rollout.group_size}"
            candidates.append((all_three, text, f"{why}; one completion at a time", False))
    tokens = micro_batch_tokens
    while tokens > row:
        cut = changed(config, update__micro_batch_tokens=max(tokens // 2, row))
        tokens = largest_micro_batch(cut, prompt_tokens).padded_tokens  # no more than its rows take
        why = "smaller micro-batches, more of them: the same effective batch"
        candidates.append(({"update__micro_batch_tokens": tokens}, f"update.micro_batch_tokens={tokens}", why, True))
    if rollout.engine.type == "transformers" and rollout.max_rows > rollout.group_size:
        why = "fewer rows decoded side by side: the same completions, sampled in turns"
        candidates.append(
            ({"rollout__max_rows": rollout.group_size}, f"rollout.max_rows={rollout.group_size}", why, True)
        )
        both = {"update__micro_batch_tokens": row, "rollout__max_rows": rollout.group_size}
        text = f"update.micro_batch_tokens={row} rollout.max_rows={rollout.group_size}"
        candidates.append((both, text, "one completion at a time: the same effective batch", True))
    if config.trainable.type == "full":
        why = "adapters in place of all weights: no second model, few moments"
        candidates.append(({"trainable": LoraTrainable()}, "trainable={type: lora}", why, False))
        if config.optim.type == "adamw":
            candidates.append(({"optim__type": "adamw_8bit"}, "optim.type=adamw_8bit", "moments in 8 bits", False))
    if gains_bfloat16:
        candidates.append(({"dtype": "bfloat16"}, "dtype=bfloat16", "half the bytes of weights and activations", False))
    if rollout.max_new_tokens > 1:
        half = rollout.max_new_tokens // 2
        why = "shorter completions: another task"
        candidates.append(({"rollout__max_new_tokens": half}, f"rollout.max_new_tokens={half}", why, False))
    return candidates


def _recomputed(config: RunConfig, row: int) -> Iterable[Candidate]:
    """Blocks that are computed again for their gradient; where that is not enough, one completion at a time as well."""
    stages = ("none", "selective", "full")
    for value in stages[stages.index(config.update.checkpointing) + 1 :]:
        share = "every second block" if value == "selective" else "every block"
        why = f"{share} keeps its input alone and is computed again: the same gradient, in more time"
        yield {"update__checkpointing": value}, f"update.checkpointing={value}", why, True
    if config.update.checkpointing != "full":
        both = {"update__checkpointing": "full", "update__micro_batch_tokens": row}
        text = f"update.checkpointing=full update.micro_batch_tokens={row}"
        yield both, text, "one completion at a time, every block computed again: the same effective batch", True


def _moved_to_the_host(config: RunConfig) -> Iterable[Candidate]:
    """What can wait in the host's memory."""
    if config.update.offload == "none":
        why = "what a pass keeps waits in the host's memory: the same gradient, for the time of the copies"
        yield {"update__offload": "activations"}, "update.offload=activations", why, True
    if config.optim.offload == "none" and config.trainable.type == "full":
        why = "moments wait in the host's memory between steps: the same step, for the time of the copies"
        yield {"optim__offload": "states"}, "optim.offload=states", why, True
        both = {"optim__offload": "states", "update__checkpointing": "full"}
        text = "optim.offload=states update.checkpointing=full"
        yield both, text, "moments in the host's memory, every block computed again: the same step, in more time", True
