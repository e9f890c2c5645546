"""Overlap of boxes and masks by hand-worked areas; a bad answer is 0, a bad reference is missing."""

from __future__ import annotations

import asyncio
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import RewardInput, Score
from rewards.assignment import best_pairs
from rewards.region_shapes import decoded_counts
from rewards.regions import Regions


def score(completion: object, reference: object, **params) -> Score:
    text = completion if isinstance(completion, str) else json.dumps(completion)
    right = reference if isinstance(reference, str) or reference is None else json.dumps(reference)
    one = RewardInput(prompt_id="p", prompt="", completion=text, reference=right)
    return asyncio.run(Regions(**params).score([one]))[0]


@pytest.mark.parametrize(
    ("completion", "reference", "iou", "dice"),
    [
        ([0, 0, 2, 2], [0, 0, 2, 2], 1.0, 1.0),
        ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7, 2 / 8),  # common 1, joint 4 + 4 - 1
        ([0, 0, 4, 2], [0, 0, 2, 2], 4 / 8, 8 / 12),
        ([0, 0, 1, 1], [1, 0, 2, 1], 0.0, 0.0),  # they touch
        ([0.1, 0.1, 0.3, 0.3], [0.1, 0.1, 0.3, 0.2], 0.5, 2 / 3),
        ([[0, 0, 2, 2], [10, 10, 12, 12]], [[10, 10, 12, 12], [0, 0, 2, 2]], 1.0, 1.0),
        ([[0, 0, 2, 2], [5, 5, 6, 6]], [0, 0, 2, 2], 1 / 2, 1 / 2),  # one too many
        ([0, 0, 2, 2], [[0, 0, 2, 2], [5, 5, 6, 6]], 1 / 2, 1 / 2),  # one too few
        ([[0, 0, 2, 2], [0, 0, 2, 2]], [0, 0, 2, 2], 1 / 2, 1 / 2),  # twice the same
        ([], [], 1.0, 1.0),
        ([0, 0, 2, 2], [], 0.0, 0.0),
        ([], [0, 0, 2, 2], 0.0, 0.0),
    ],
)
def test_boxes(completion, reference, iou, dice):
    assert score(completion, reference).value == pytest.approx(iou)
    assert score(completion, reference, measure="dice").value == pytest.approx(dice)


def test_the_best_pairing_counts_not_the_first_come():
    # [0,0,4,1] overlaps A by 3/4 and B by 1/4; [0,0,3,1] overlaps A by 1: greedy by order would give A to the first
    given = [[0, 0, 4, 1], [0, 0, 3, 1]]
    reference = [[0, 0, 3, 1], [3, 0, 4, 1]]
    assert score(given, reference).value == pytest.approx((1 + 1 / 4) / 2)


@pytest.mark.parametrize(("reference", "value"), [([0, 0, 2, 2], 1.0), ([0, 0, 4, 2], 1.0), ([0, 0, 5, 2], 0.0)])
def test_a_threshold_makes_hits_and_misses(reference, value):
    assert score([0, 0, 2, 2], reference, threshold=0.5).value == value  # overlaps 1, 1/2 and 2/5


@pytest.mark.parametrize(
    "completion",
    [
        "[10, 20, 30, 40]",
        "It is at [10, 20, 30, 40].",
        '```json\n[{"bbox_2d": [10, 20, 30, 40], "label": "dog"}]\n```',
        '{"bbox": [10, 20, 30, 40]}',
        "<box>(10,20),(30,40)</box>",
        "<box>[10, 20, 30, 40]</box>",
        "first I thought [0, 0, 1, 1]; no: [10, 20, 30, 40] (see [1])",
        "<think>[0, 0, 1, 1]</think>[10, 20, 30, 40]",
        "[[[[ [10, 20, 30, 40]",
    ],
)
def test_ways_to_write_a_box(completion):
    assert score(completion, [10, 20, 30, 40]).value == 1.0


def test_several_boxes_in_tags():
    assert score("<box>0,0,1,1</box> and <box>2,2,3,3</box>", [[2, 2, 3, 3], [0, 0, 1, 1]]).value == 1.0


def test_boxes_by_width_and_height():
    assert score([10, 20, 20, 20], [10, 20, 30, 40], box_format="xywh").value == 1.0
    assert score([10, 20, 30, 40], [10, 20, 20, 20], reference_box_format="xywh").value == 1.0


@pytest.mark.parametrize(
    ("completion", "cause"),
    [
        ("", "no regions"),
        ("in the middle", "no regions"),
        ("[1, 2, 3]", "four numbers"),
        ("[3, 3, 1, 1]", "no area"),
        ("[1, 1, 1, 5]", "no area"),
        ("[NaN, 0, 1, 1]", "four numbers"),
        ("[0, 0, Infinity, 1]", "four numbers"),
        ("[0, 0, 1e300, 1e300]", "four numbers"),
        ("[true, 0, 1, 1]", "four numbers"),
        ("<box>ten</box>", "four numbers"),
        (f"[0, 0, {'9' * 5000}, 1]", "no regions"),
        ("[" * 100_000, "no regions"),
        (json.dumps([[0, 0, 1, 1]] * 101), "at most 100"),
    ],
)
def test_an_answer_that_is_no_region_is_0_with_a_reason(completion, cause):
    answer = score(completion, [0, 0, 1, 1])
    assert answer.value == 0.0
    assert cause in answer.reason


@pytest.mark.parametrize("reference", [None, "", "nowhere", "[1, 2]", "[3, 3, 1, 1]", '{"x": 1}', "[" * 100_000])
def test_a_reference_that_is_no_region_is_missing_not_0(reference):
    answer = score([0, 0, 1, 1], reference)
    assert answer.value is None
    assert answer.reason


SQUARE = [[1, 1, 0], [1, 1, 0]]  # by columns 1 1 1 1 0 0
CORNER = [[1, 0, 0], [0, 0, 0]]
# COCO's text for counts [0, 4, 2]: each below 16, so one character "0" + count
COMPRESSED = {"size": [2, 3], "counts": "042"}


@pytest.mark.parametrize(
    ("completion", "reference", "iou", "dice"),
    [
        (SQUARE, SQUARE, 1.0, 1.0),
        (CORNER, SQUARE, 1 / 4, 2 / 5),
        ([[0, 0, 1], [0, 0, 1]], SQUARE, 0.0, 0.0),
        (SQUARE, {"size": [2, 3], "counts": [0, 4, 2]}, 1.0, 1.0),
        (COMPRESSED, SQUARE, 1.0, 1.0),
        ({"size": [2, 3], "counts": [1, 4, 1]}, SQUARE, 3 / 5, 6 / 8),
        ([SQUARE, CORNER], SQUARE, 1 / 2, 1 / 2),
    ],
)
def test_masks(completion, reference, iou, dice):
    assert score(completion, reference, kind="masks").value == pytest.approx(iou)
    assert score(completion, reference, kind="masks", measure="dice").value == pytest.approx(dice)


@pytest.mark.parametrize(
    "completion",
    [
        [[1, 0], [0, 0]],  # of another size
        [[0, 0, 0], [0, 0, 0]],
        [[1, 1], [1]],
        [[2, 0, 0], [0, 0, 0]],
        {"size": [2, 3], "counts": [0, 4]},
        {"size": [2, 3], "counts": [-1, 7]},
        {"size": [2, 3], "counts": "0"},
        {"size": [2, 3], "counts": "\u00e9"},
        {"size": [0, 3], "counts": []},
        {"size": [10**30, 10**30], "counts": [0, 10**60]},
    ],
)
def test_a_mask_that_does_not_fit_is_0(completion):
    answer = score(completion, SQUARE, kind="masks")
    assert answer.value == 0.0
    assert answer.reason.startswith("invalid answer")


def coco_text(counts: list[int]) -> str:
    """COCO's rleToString (cocodataset/cocoapi, common/maskApi.c), written down anew from its description."""
    text = ""
    for index, count in enumerate(counts):
        number = count - counts[index - 2] if index > 2 else count
        while True:
            bits, number = number & 0x1F, number >> 5
            is_more = number != (-1 if bits & 0x10 else 0)
            text += chr((bits | 0x20 if is_more else bits) + 48)
            if not is_more:
                break
    return text


@given(st.lists(st.integers(0, 10**6), max_size=20))
def test_compressed_counts_are_read_back(counts):
    assert decoded_counts(coco_text(counts)) == counts


@given(
    st.integers(1, 5).flatmap(
        lambda columns: st.lists(st.lists(st.floats(0, 1), min_size=columns, max_size=columns), min_size=1, max_size=5)
    )
)
def test_the_pairing_is_the_best_of_all(values):
    rows, columns = len(values), len(values[0])
    pairs = best_pairs(values)
    assert len(pairs) == min(rows, columns)
    assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs)
    short, long = min(rows, columns), max(rows, columns)
    at = (lambda one, other: values[one][other]) if rows <= columns else (lambda one, other: values[other][one])
    best = max(sum(map(at, range(short), order)) for order in itertools.permutations(range(long), short))
    assert sum(values[row][column] for row, column in pairs) == pytest.approx(best)


box = st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(1, 50), st.integers(1, 50)).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


@given(st.lists(box, max_size=4), st.lists(box, max_size=4), st.randoms())
def test_the_score_is_between_0_and_1_symmetric_and_blind_to_order(one, other, random):
    value = score(one, other).value
    assert value is not None
    assert 0.0 <= value <= 1.0
    assert value <= score(one, other, measure="dice").value
    assert score(other, one).value == pytest.approx(value)
    assert score(random.sample(one, len(one)), random.sample(other, len(other))).value == pytest.approx(value)
    assert score(one, one).value == 1.0
