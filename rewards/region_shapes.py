"""Boxes and masks: how they are written, how large they are and how far they overlap. Knows nothing of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

BoxFormat: TypeAlias = Literal["xyxy", "xywh"]

_BOX_KEYS = ("bbox_2d", "bbox", "box")


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle; left < right and top < bottom, in whatever unit."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        """Width times height, above 0."""
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """A set of pixels as runs, column by column from the top left, as COCO counts them."""

    size: tuple[int, int]
    """Height and width of the image."""
    runs: tuple[tuple[int, int], ...]
    """First pixel and the one after the last of each run; sorted, apart, at least one."""

    @property
    def area(self) -> float:
        """Number of pixels."""
        return float(sum(end - start for start, end in self.runs))


Region: TypeAlias = Box | Mask


def parse_box(value: Any, box_format: BoxFormat) -> Box:
    """Four numbers, bare or under "bbox_2d", "bbox" or "box" -> a Box.

    Raises:
        ValueError: it is something else, or the box is empty.
    """
    if isinstance(value, dict):
        value = next((value[key] for key in _BOX_KEYS if key in value), value)
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_finite, value)):
        raise ValueError(f"a box is four numbers, found {_shown(value)}")
    left, top, third, fourth = map(float, value)
    right, bottom = (left + third, top + fourth) if box_format == "xywh" else (third, fourth)
    box = Box(left=left, top=top, right=right, bottom=bottom)
    if right <= left or bottom <= top or not 0.0 < box.area < math.inf:
        raise ValueError(f"the box {_shown(value)} ({box_format}) has no area")
    return box


def parse_mask(value: Any) -> Mask:
    """COCO's run lengths {"size": [h, w], "counts": text or list}, or rows of 0 and 1 -> a Mask.

    Polygons are not read: which pixels they cover depends on who draws them.

    Raises:
        ValueError: it is something else, or no pixel is set.
    """
    if isinstance(value, dict) and {"size", "counts"} <= value.keys():
        mask = _from_run_lengths(value["size"], value["counts"])
    elif isinstance(value, list) and value and all(isinstance(row, list) for row in value):
        mask = _from_rows(value)
    else:
        raise ValueError(f'a mask is {{"size", "counts"}} or rows of 0 and 1, found {_shown(value)}')
    if not mask.runs:
        raise ValueError("the mask is empty")
    return mask


def intersection(one: Region, other: Region) -> float:
    """Area that both cover.

    Raises:
        ValueError: masks of different sizes, or a box with a mask.
    """
    if isinstance(one, Box) and isinstance(other, Box):
        width = min(one.right, other.right) - max(one.left, other.left)
        height = min(one.bottom, other.bottom) - max(one.top, other.top)
        return max(width, 0.0) * max(height, 0.0)
    if isinstance(one, Mask) and isinstance(other, Mask) and one.size == other.size:
        return float(_common_pixels(one.runs, other.runs))
    raise ValueError("only boxes with boxes, and masks of one size, can be compared")


def decoded_counts(text: str) -> list[int]:
    """COCO's compressed run lengths: 5 bits a character from "0" on; from the fourth on, the difference to two before.

    Raises:
        ValueError: a character outside of the alphabet, or the text ends within a number.
    """
    counts: list[int] = []
    number, shift, is_open = 0, 0, False
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("the counts are not COCO's compressed run lengths")
        number |= (bits & 0x1F) << shift
        shift += 5
        is_open = bool(bits & 0x20)
        if not is_open:
            signed = number - (1 << shift) if bits & 0x10 else number
            counts.append(signed + (counts[-2] if len(counts) > 2 else 0))
            number, shift = 0, 0
    if is_open:
        raise ValueError("the counts end within a number")
    return counts


def _from_run_lengths(size: Any, counts: Any) -> Mask:
    if not isinstance(size, list) or len(size) != 2 or not all(_is_count(side) and side > 0 for side in size):
        raise ValueError(f"a mask's size is [height, width], found {_shown(size)}")
    lengths = decoded_counts(counts) if isinstance(counts, str) else counts
    if not isinstance(lengths, list) or not all(map(_is_count, lengths)):
        raise ValueError("a mask's counts are whole numbers from 0 on")
    if sum(lengths) != size[0] * size[1]:
        raise ValueError(f"the counts add up to {sum(lengths)}, not to {size[0]} x {size[1]}")
    runs, position = [], 0
    for index, length in enumerate(lengths):
        if index % 2 and length:
            runs.append((position, position + length))
        position += length
    return Mask(size=(size[0], size[1]), runs=tuple(runs))


def _from_rows(rows: Sequence[list[Any]]) -> Mask:
    height, width = len(rows), len(rows[0])
    if not width or any(len(row) != width for row in rows):
        raise ValueError("the mask's rows differ in length")
    pixels = [row[column] for column in range(width) for row in rows]
    if any(pixel not in (0, 1) for pixel in pixels):
        raise ValueError("a mask's pixels are 0 or 1")
    runs = [(index, index + 1) for index, pixel in enumerate(pixels) if pixel]
    return Mask(size=(height, width), runs=tuple(runs))


def _common_pixels(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> int:
    common, here, there = 0, 0, 0
    while here < len(one) and there < len(other):
        common += max(0, min(one[here][1], other[there][1]) - max(one[here][0], other[there][0]))
        if one[here][1] <= other[there][1]:
            here += 1
        else:
            there += 1
    return common


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e150  # so that no area overflows


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
