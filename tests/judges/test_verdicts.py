"""Reading a judge's verdict, and asking for one by a schema."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from judges.errors import InvalidVerdict
from judges.verdicts import TextVerdict, parse_group_verdict, parse_pair_verdict, parse_verdict, verdict_schema

NONCE = "0123456789abcdef"


def parse(text: str, *, low: float = 0.0, high: float = 1.0) -> float:
    return parse_verdict(text, nonce=NONCE, low=low, high=high)


def parse_group(verdicts: object) -> dict[str, TextVerdict]:
    text = json.dumps({"nonce": NONCE, "verdicts": verdicts})
    return parse_group_verdict(text, nonce=NONCE, ids=("aaaa", "bbbb", "cccc"), low=0.0, high=1.0)


def entry(name: str, score: object = 1, **more: object) -> dict[str, object]:
    return {"id": name, "reason": "", "score": score, **more}


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (f'{{"nonce": "{NONCE}", "score": 1}}', 1.0),
        (f'Let me see {{x}}. ```json\n{{"nonce": "{NONCE}", "reason": "a }} b", "score": 0.5}}\n```', 0.5),
        (f'{{"nonce": "{NONCE}", "score": 0}} no: {{"nonce": "{NONCE}", "score": 1}} done', 1.0),
        (f'{{"nonce": "{NONCE}", "score": 0}} {{"nonce": "fedcba9876543210", "score": 1}}', 0.0),
        (f'{{ {{"nonce": "{NONCE}", "score": 1e0}}', 1.0),
    ],
)
def test_the_last_object_with_the_nonce_is_the_verdict(reply: str, score: float) -> None:
    assert parse(reply) == score


@pytest.mark.parametrize(
    "verdict",
    [
        '"score": true',
        '"score": "1"',
        '"score": null',
        '"score": [1]',
        '"score": NaN',
        '"score": Infinity',
        '"score": 1e400',
        '"score": 1.5',
        '"score": -0.1',
        '"score": 0, "score": 1',
        '"score": 1, "x": NaN',
        '"score": 1, "x": {"a": 1, "a": 2}',
        '"grade": 1',
        '"score": 01',
        '"score": 1,',
        '"score": ' + "9" * 5000,
    ],
)
def test_a_verdict_that_is_not_strict_json_with_a_number_in_scale_is_invalid(verdict: str) -> None:
    with pytest.raises(InvalidVerdict):
        parse(f'{{"nonce": "{NONCE}", {verdict}}}')


@pytest.mark.parametrize(
    "reply",
    ["", "1", "score: 1", '{"score": 1}', '{"nonce": "fedcba9876543210", "score": 1}', f"{NONCE} 1", "{" * 9000],
)
def test_a_reply_without_a_verdict_of_this_call_is_invalid(reply: str) -> None:
    with pytest.raises(InvalidVerdict):
        parse(reply)


@pytest.mark.parametrize("last", ['"score": NaN', '"score": 7', '"score": 0,', '"score": 0'])
def test_a_bad_last_verdict_never_falls_back_to_an_earlier_one(last: str) -> None:
    end = "" if last == '"score": 0' else "}"  # without its brace it is cut off
    with pytest.raises(InvalidVerdict):
        parse(f'{{"nonce": "{NONCE}", "score": 1}} I correct myself: {{"nonce": "{NONCE}", {last}{end}')


def test_deep_nesting_is_invalid_and_not_a_crash() -> None:
    with pytest.raises(InvalidVerdict):
        parse('{"a":' * 3000 + json.dumps({"nonce": NONCE, "score": 1}) + "}")


def test_the_scale_bounds_are_included_and_kept_as_they_are() -> None:
    assert parse(f'{{"nonce": "{NONCE}", "score": -5}}', low=-5, high=10) == -5.0
    assert parse(f'{{"nonce": "{NONCE}", "score": 10}}', low=-5, high=10) == 10.0


@pytest.mark.parametrize(
    "score",
    ["-0", "-0.0", "-0e9", '"8/10"', '"NaN"', "-Infinity", "1e999", "9" * 400, "{}", "false", "1.0000001", "0x1"],
)
def test_a_score_that_is_no_plain_number_in_the_scale_is_invalid(score: str) -> None:
    with pytest.raises(InvalidVerdict):
        parse(f'{{"nonce": "{NONCE}", "reason": "", "score": {score}}}')


@pytest.mark.parametrize(
    "reply",
    [
        f'{{"nonce": "{NONCE}", "score": NaN, "x": {{"nonce": "{NONCE}", "score": 1}}}}',
        f'{{"verdict": {{"nonce": "{NONCE}", "score": 1}}}}',
        f'{{"nonce": "{NONCE}", "score": 1, "confidence": 0.2}}',
        f'{{"nonce": "{NONCE}", "score": 0,}} and then {{"nonce": "{NONCE}", "score": 1}}',
        f'{{"nonce": "{NONCE}", "reason": "\\ud800", "score": 1}}',
        f'{{"nonce": ["{NONCE}"], "score": 1}}',
    ],
    ids=["inside a broken one", "inside another", "an unknown key", "after a broken one", "half a pair", "a list"],
)
def test_an_object_of_another_form_is_never_a_verdict(reply: str) -> None:
    with pytest.raises(InvalidVerdict):
        parse(reply)


@pytest.mark.parametrize("reply", ['{"a":' * 200_000, "{" * 1_000_000, '{"a":{"b":[' * 100_000, '{"a":1}' * 100_000])
def test_a_reply_made_to_be_slow_to_read_is_given_up_on(reply: str) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidVerdict):
        parse(f"{reply} {NONCE}")
    assert time.monotonic() - started < 2.0


def test_a_group_is_read_by_id_in_any_order_and_a_missing_id_stays_missing() -> None:
    verdicts = parse_group([entry("cccc", 0), entry("aaaa", 0.5)])
    assert {name: one.score for name, one in verdicts.items()} == {"cccc": 0.0, "aaaa": 0.5}
    assert json.loads(verdicts["aaaa"].raw) == {"id": "aaaa", "reason": "", "score": 0.5}


@pytest.mark.parametrize("bad", [True, "1", None, 7, [1]])
def test_one_bad_entry_costs_its_own_text_alone(bad: object) -> None:
    assert set(parse_group([entry("aaaa", bad), entry("bbbb")])) == {"bbbb"}
    assert set(parse_group([entry("aaaa", x=1), entry("bbbb")])) == {"bbbb"}


@pytest.mark.parametrize(
    "verdicts",
    [
        [entry("aaaa"), entry("aaaa", 0)],
        [entry("aaaa"), entry("dddd")],
        [entry("aaaa"), 1],
        [],
        [entry("aaaa", "1")],
        {"aaaa": 1},
        None,
    ],
    ids=["twice", "unknown", "no object", "none", "none usable", "no list", "null"],
)
def test_a_group_in_which_an_id_is_doubtful_is_invalid_as_a_whole(verdicts: object) -> None:
    with pytest.raises(InvalidVerdict):
        parse_group(verdicts)


def pair(winner: object) -> str | None:
    text = json.dumps({"nonce": NONCE, "reason": "", "winner": winner})
    return parse_pair_verdict(text, nonce=NONCE, ids=("aaaa", "bbbb"))


def test_a_pair_has_one_winner_or_is_a_tie() -> None:
    assert pair("aaaa") == "aaaa"
    assert pair("tie") is None


@pytest.mark.parametrize("winner", ["cccc", "A", "", None, 1, ["aaaa"]])
def test_a_winner_that_was_not_asked_about_is_invalid(winner: object) -> None:
    with pytest.raises(InvalidVerdict):
        pair(winner)


def test_the_schema_asks_for_the_reason_before_the_score_and_for_nothing_else() -> None:
    schema = verdict_schema("pointwise", low=0.0, high=10.0)
    assert schema == {
        "type": "object",
        "properties": {
            "nonce": {"type": "string"},
            "reason": {"type": "string"},
            "score": {"type": "number", "minimum": 0.0, "maximum": 10.0},
        },
        "required": ["nonce", "reason", "score"],
        "additionalProperties": False,
    }
    assert list(schema["properties"]) == ["nonce", "reason", "score"]
    (name, verdicts) = list(verdict_schema("groupwise", low=0.0, high=10.0)["properties"].items())[1]
    assert name == "verdicts"
    assert verdicts["items"]["required"] == ["id", "reason", "score"]
    assert "$defs" not in json.dumps(verdict_schema("groupwise", low=0.0, high=10.0))
    assert list(verdict_schema("pairwise", low=0.0, high=1.0)["properties"]) == ["nonce", "reason", "winner"]


PIECES = st.sampled_from(
    [
        "{",
        "}",
        '"',
        ",",
        ":",
        f'"nonce": "{NONCE}"',
        NONCE,
        '"score": 1',
        '"score": NaN',
        "[",
        "]",
        " ",
        "\\",
        "x",
        "-0",
    ]
)


@given(st.lists(PIECES, max_size=30).map("".join))
@example(f'{{"nonce": "{NONCE}", "score": 1}}')
def test_whatever_a_judge_says_is_a_score_in_the_scale_or_an_invalid_verdict(text: str) -> None:
    try:
        score = parse(text)
    except InvalidVerdict:
        return
    assert score == 1.0


@given(st.text(max_size=300))
def test_a_reply_that_does_not_know_the_nonce_is_never_a_verdict(text: str) -> None:
    with pytest.raises(InvalidVerdict):
        parse(text)
