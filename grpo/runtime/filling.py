"""Counts of rows from a short list, so that the shapes of products come again.

For every new shape of a bfloat16 product oneDNN makes code, which takes longer than the product, and keeps up to a
megabyte of it, for up to a thousand shapes: a run whose batches are all of another size would grow by it step after
step.
"""

from __future__ import annotations

STEPS_PER_DOUBLING = 16


def filler(count: int) -> int:
    """Rows to add to so many, at most a sixteenth, for one of 16 sizes between a power of two and the next."""
    step = 1 << max((count // STEPS_PER_DOUBLING).bit_length() - 1, 0)
    return -count % step
