"""Sizes that come again, for little more work."""

from __future__ import annotations

from grpo.runtime.filling import filler


def test_at_most_a_sixteenth_is_added_and_few_sizes_are_left() -> None:
    sizes = {count: count + filler(count) for count in range(1, 4097)}
    assert all(0 <= sizes[count] - count <= count / 16 for count in sizes)
    assert all(filler(size) == 0 for size in sizes.values())
    for low in (16, 64, 1024):
        assert len({sizes[count] for count in range(low, 2 * low)}) <= 17
