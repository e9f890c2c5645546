"""How well do the regions that a completion gives cover those of the reference? From 0 to 1, by IoU or Dice.

Several regions are paired one to one so that the sum is largest, and the sum is divided by the larger of the two
numbers: a region too many costs as much as one too few. Labels are not compared.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from rewards.answer_text import ReadsAnswer
from rewards.assignment import best_pairs
from rewards.region_shapes import BoxFormat, Region, intersection, parse_box, parse_mask
from rewards.types import RewardInput, Score

MAX_REGIONS = 100
"""More in one completion are no answer; pairing them would take long."""
_MAX_OPENINGS = 200  # brackets that open nothing; past them a text of brackets alone would take long to read

_OPENING = re.compile(r"[\[{]")
_BOX_TAG = re.compile(r"<box>([^<]*)</box>")
_BOX_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")


class Regions(ReadsAnswer):
    """The mean overlap of paired regions; 0 where the completion gives none that can be read.

    The reference is a JSON list of regions (or one), `[]` meaning that there is nothing to find; it is missing where
    it cannot be read. A completion gives its regions as JSON, the last that can be read counting, or each box in
    `<box>...</box>` with four numbers, as in `<box>(10,20),(30,40)</box>`.
    """

    kind: Literal["boxes", "masks"] = "boxes"
    """"boxes": four numbers, bare or as {"bbox_2d": [...]} ("bbox" and "box" as well). "masks": COCO run lengths
    {"size": [height, width], "counts": ...}, compressed or not, or rows of 0 and 1."""
    measure: Literal["iou", "dice"] = "iou"
    """"iou": common area / joint area. "dice": 2 common area / (area + area)."""
    box_format: BoxFormat = "xyxy"
    """The completion's four numbers: "xyxy" is left, top, right, bottom; "xywh" is left, top, width, height."""
    reference_box_format: BoxFormat = "xyxy"
    """The reference's; COCO's annotations are "xywh"."""
    threshold: float | None = Field(None, gt=0, le=1)
    """With 0.5, a pair counts 1 from an overlap of 0.5 on and 0 below; None counts the overlap itself."""

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per completion; missing where the reference gives no regions."""
        return await asyncio.to_thread(lambda: [self._score_one(one) for one in inputs])

    def _score_one(self, one: RewardInput) -> Score:
        if one.reference is None:
            return Score(value=None, reason="the prompt has no reference")
        try:
            expected = self._parsed(json.loads(one.reference), self.reference_box_format)
        except (ValueError, RecursionError) as exc:
            return Score(value=None, reason=f"unusable reference: {exc}")
        answer = self.answer_in(one.completion)
        if answer is None:
            return Score(value=0.0, reason=self.no_answer)
        try:
            given = self._read(answer)
            value = self._value(given, expected)
        except ValueError as exc:
            return Score(value=0.0, reason=f"invalid answer: {exc}")
        return Score(value=value, reason=f"{len(given)} given, {len(expected)} expected")

    def _value(self, given: Sequence[Region], expected: Sequence[Region]) -> float:
        if not given or not expected:
            return float(not given and not expected)
        overlaps = [[self._overlap(one, other) for other in expected] for one in given]
        total = sum(overlaps[row][column] for row, column in best_pairs(overlaps))
        return min(1.0, total / max(len(given), len(expected)))

    def _overlap(self, one: Region, other: Region) -> float:
        common, areas = intersection(one, other), one.area + other.area
        overlap = 2 * common / areas if self.measure == "dice" else common / (areas - common)
        return overlap if self.threshold is None else float(overlap >= self.threshold)

    def _read(self, text: str) -> list[Region]:
        tagged = _BOX_TAG.findall(text) if self.kind == "boxes" else []
        if tagged:
            return self._parsed([_numbers(inside) for inside in tagged], self.box_format)
        problem = ValueError("no regions in it")
        for value in reversed(_json_values(text)):
            try:
                return self._parsed(value, self.box_format)
            except ValueError as exc:
                problem = exc
        raise problem

    def _parsed(self, value: Any, box_format: BoxFormat) -> list[Region]:
        items = value if isinstance(value, list) and not self._is_one(value) else [value]
        if len(items) > MAX_REGIONS:
            raise ValueError(f"{len(items)} regions, at most {MAX_REGIONS} are compared")
        return [parse_box(item, box_format) if self.kind == "boxes" else parse_mask(item) for item in items]

    def _is_one(self, value: list[Any]) -> bool:
        """Whether the list is itself a region: four numbers, or rows of pixels."""
        if not value:
            return False
        if self.kind == "boxes":
            return not any(isinstance(item, list | dict) for item in value)
        return isinstance(value[0], list) and not any(isinstance(item, list) for item in value[0])


def _numbers(text: str) -> list[float]:
    return [float(number) for number in _BOX_NUMBER.findall(text)]


def _json_values(text: str) -> list[Any]:
    """Every JSON list or object that stands in the text, in order, none inside another."""
    decoder, values, position = json.JSONDecoder(), [], 0
    for _ in range(_MAX_OPENINGS):
        opening = _OPENING.search(text, position)
        if opening is None:
            break
        try:
            value, position = decoder.raw_decode(text, opening.start())
            values.append(value)
        except (ValueError, RecursionError):
            position = opening.end()
    return values
