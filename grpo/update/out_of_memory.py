"""A micro-batch that does not fit into memory: how small is the next try? Holds no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo.errors import OutOfMemory

MAX_HALVINGS = 8
"""In one step: then micro-batches have 1/256 of the budget, and it is something else that takes the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A micro-batch that a rank had no memory for."""

    cause: str
    """The allocator's message, its first line."""
    num_rows: int
    """Of the micro-batch."""
    largest_tokens: int
    """Of the rank's micro-batches, padding included."""


def halved_budget(budget: int, shortages: Sequence[Shortage], *, num_halvings: int) -> int:
    """The budget, in padded tokens, for another try.

    Args:
        budget: of the try that failed.
        shortages: of all ranks that had one; the answer is the same on every rank.
        num_halvings: in this step so far.
    Raises:
        OutOfMemory: smaller micro-batches cannot help, or were tried too often.
    """
    cause = f"the update ran out of memory ({shortages[0].cause})"
    advice = (
        "`grpo plan RECIPE` shows what takes it and what fits: a smaller rollout.max_new_tokens, fewer trainable "
        "parameters (trainable.type=lora), dtype=bfloat16 or a smaller model."
    )
    if any(shortage.num_rows == 1 for shortage in shortages):
        raise OutOfMemory(f"{cause} on a micro-batch of a single completion, which cannot be cut further. {advice}")
    if num_halvings >= MAX_HALVINGS:
        raise OutOfMemory(
            f"{cause}, and {num_halvings} halvings of its micro-batches, now {budget}, did not help. {advice}"
        )
    # the recipe's budget may be more than there ever was in a micro-batch: halving it alone would change nothing
    return max(min(budget, *(shortage.largest_tokens for shortage in shortages)) // 2, 1)
