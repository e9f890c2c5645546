"""JSON without room for two readings."""

from __future__ import annotations

import pytest

from judges.strict_json import strict_loads, strict_parse_at


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 1}',
        '[{"b": {"a": 1, "a": 2}}]',
        "NaN",
        '{"a": -Infinity}',
        "1e999",
        '"\\ud800"',
        '{"\\udc00": 1}',
        "[" * 10_000 + "]" * 10_000,
        "{} {}",
        "",
        "9" * 5000,
        b"\xff",
        b'"\xed\xa0\x80"',
    ],
    ids=lambda text: repr(text)[:30],
)
def test_what_two_readers_could_read_in_two_ways_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        strict_loads(text)


def test_what_is_plain_json_is_read() -> None:
    assert strict_loads(b'\xef\xbb\xbf{"a": [1, 2.5, -0.0, "\\ud83d\\ude00", null]}') == {
        "a": [1, 2.5, 0.0, "😀", None]
    }


@pytest.mark.parametrize("number", ["-0", "-0.0", "-0e5", "-1e-400"])
def test_a_negative_zero_is_fine_in_an_envelope_and_not_in_a_models_text(number: str) -> None:
    assert strict_loads(number) == 0
    with pytest.raises(ValueError, match="-0 is no score"):
        strict_parse_at(f'{{"score": {number}}}', 0)


def test_a_value_within_a_text_is_read_to_its_end() -> None:
    assert strict_parse_at('so: {"a": 1} and', 4) == ({"a": 1}, 12)
