"""Calibration: a judge whose accuracy is known is found to have it; and the figures are what their names say."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from judges import ChatRequest, EndpointConfig, Failed, JudgeConfig, Judgement, JudgeRequest, Scored, ScriptedClient
from judges.calibrate import Calibration, GoldRow, calibrate, compare, default_threshold, read_gold
from judges.clients.scripted import verdict_for
from judges.config import ScaleConfig
from judges.errors import JudgeConfigError, JudgeRejected
from judges.pool import JudgePool
from judges.prompts import read_fences
from judges.statistics import (
    Confusion,
    agreement,
    agreement_interval,
    cohens_kappa,
    flip_rate,
    kappa_interval,
    score_length_correlation,
)

HALUEVAL = Path(__file__).parents[3] / "shared" / "data" / "halueval" / "general_data.json"


def scored(value: float) -> Scored:
    return Scored(value=value, raw="", usage=None, attempts=1, cost=0.5)


FAILED = Failed(kind="timeout", attempts=1, fault="judge", detail="", cost=0.25)


def make_rows(*labels: bool, completion: str = "text") -> list[GoldRow]:
    return [GoldRow(question=f"q{n}", completion=completion, label=label) for n, label in enumerate(labels)]


def kappa_by_definition(labels: Sequence[bool], verdicts: Sequence[bool]) -> Fraction:
    """Cohen 1960, in exact arithmetic, from the raw opinions: no table in between."""
    n = len(labels)
    observed = Fraction(sum(a == b for a, b in zip(labels, verdicts, strict=True)), n)
    by_label, by_judge = Counter(labels), Counter(verdicts)
    expected = sum((Fraction(by_label[c], n) * Fraction(by_judge[c], n) for c in (True, False)), Fraction(0))
    return (observed - expected) / (1 - expected)


class Accurate:
    """Judges by the gold label, and errs in a drawn share of cases."""

    def __init__(self, rows: Sequence[GoldRow], *, accuracy: float, seed: int) -> None:
        self._labels = {(row.question, row.completion): row.label for row in rows}
        self._accuracy = accuracy
        self._draw = random.Random(seed)

    def opinion(self, question: str, completion: str) -> float:
        label = self._labels[question, completion]
        return float(label if self._draw.random() < self._accuracy else not label)

    async def judge(self, requests: Sequence[JudgeRequest]) -> list[Judgement]:
        return [scored(self.opinion(one.question, one.completion)) for one in requests]


def test_kappa_is_what_cohen_defined() -> None:
    # 20 + 15 of 50 agree: 0.7; by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5; so (0.7 - 0.5) / (1 - 0.5) = 0.4
    confusion = Confusion(true_positive=20, false_positive=10, false_negative=5, true_negative=15)
    assert agreement(confusion) == pytest.approx(0.7)
    assert cohens_kappa(confusion) == pytest.approx(0.4)
    assert cohens_kappa(Confusion(true_positive=1, false_positive=1, false_negative=1, true_negative=1)) == 0.0
    assert math.isnan(cohens_kappa(Confusion(true_positive=9, false_positive=0, false_negative=0, true_negative=0)))


def test_kappa_of_drawn_opinions_equals_the_slow_definition() -> None:
    draw = random.Random(0)
    for _ in range(50):
        p, q = draw.random(), draw.random()
        labels = [draw.random() < p for _ in range(draw.randrange(2, 200))]
        verdicts = [label if draw.random() < q else not label for label in labels]
        if len({*labels, *verdicts}) < 2:
            continue
        expected = kappa_by_definition(labels, verdicts)
        assert cohens_kappa(Confusion.count(labels, verdicts)) == pytest.approx(float(expected), abs=1e-12)


def test_the_bootstrap_draws_texts_as_the_slow_one_does() -> None:
    draw = random.Random(1)
    labels = [draw.random() < 0.3 for _ in range(120)]
    verdicts = [label if draw.random() < 0.8 else not label for label in labels]
    slow = []
    for _ in range(4000):
        places = [draw.randrange(120) for _ in range(120)]
        slow.append(float(kappa_by_definition([labels[i] for i in places], [verdicts[i] for i in places])))
    slow.sort()
    fast = kappa_interval(Confusion.count(labels, verdicts))
    assert fast is not None
    assert fast.low == pytest.approx(slow[100], abs=0.02)
    assert fast.high == pytest.approx(slow[-100], abs=0.02)


def test_the_interval_covers_the_true_accuracy_about_as_often_as_it_says() -> None:
    draw = random.Random(2)
    num_covered = 0
    for seed in range(300):
        labels = [draw.random() < 0.8 for _ in range(400)]
        verdicts = [label if draw.random() < 0.85 else not label for label in labels]
        found = agreement_interval(Confusion.count(labels, verdicts), seed=seed)
        assert found is not None
        num_covered += found.low <= 0.85 <= found.high
    assert 271 <= num_covered <= 299  # 0.95 * 300 = 285, and 3.7 standard deviations of 3.8


def halueval_rows() -> list[GoldRow]:
    if not HALUEVAL.exists():
        pytest.skip(f"{HALUEVAL} is not there")
    return read_gold(HALUEVAL, format="halueval")


@pytest.mark.parametrize(("accuracy", "seed"), [(0.6, 0), (0.75, 1), (0.9, 2), (0.97, 3)])
def test_a_judge_of_known_accuracy_is_recovered_from_the_labels_of_halueval(accuracy: float, seed: int) -> None:
    rows = halueval_rows()
    assert len(rows) == 4507
    assert Counter(row.label for row in rows) == {True: 3692, False: 815}  # False: people saw a hallucination
    judge = Accurate(rows, accuracy=accuracy, seed=seed)
    found = asyncio.run(calibrate(judge, rows, criterion="grounding", threshold=0.5))
    assert found.agreement is not None
    assert found.kappa is not None
    assert found.agreement.low <= accuracy <= found.agreement.high
    # a share of 4507 draws has a standard deviation of at most 0.0075
    assert found.agreement.high - found.agreement.low < 4 * 0.0075
    labels = [row.label is True for row in rows]
    verdicts = [one >= 0.5 for one in map(Accurate(rows, accuracy=accuracy, seed=seed).opinion, *texts_of(rows))]
    assert found.kappa.value == pytest.approx(float(kappa_by_definition(labels, verdicts)), abs=1e-12)
    assert found.kappa.low < found.kappa.value < found.kappa.high


def texts_of(rows: Sequence[GoldRow]) -> tuple[list[str], list[str]]:
    return [row.question for row in rows], [row.completion for row in rows]


@pytest.mark.long
def test_coverage_over_many_judges_of_one_accuracy_on_halueval() -> None:
    rows = halueval_rows()
    texts = texts_of(rows)
    num_covered = 0
    for seed in range(40):
        opinions = map(Accurate(rows, accuracy=0.8, seed=seed).opinion, *texts)
        found = compare(rows, [[scored(one)] for one in opinions], threshold=0.5, seed=seed).agreement
        assert found is not None
        num_covered += found.low <= 0.8 <= found.high
    assert 33 <= num_covered <= 40  # 38 expected; 33 has a probability below 0.01


def test_halueval_goes_through_the_whole_pool() -> None:
    rows = halueval_rows()[:300]
    judge = Accurate(rows, accuracy=1.0, seed=0)
    by_text = {row.completion: row for row in rows}

    def script(request: ChatRequest) -> str:
        completion = read_fences(request.messages[-1].content)[1]["completion"]
        row = by_text.get(completion)
        if row is None:  # characters that cannot be seen are taken out of what a judge reads
            raise JudgeRejected("unknown text")
        return verdict_for(request, judge.opinion(row.question, row.completion))

    config = JudgeConfig(
        endpoints=(EndpointConfig(url="http://127.0.0.1:9/v1", model="m"),), rubric="grounding", max_input_chars=10**6
    )
    pool = JudgePool(client=ScriptedClient(script), config=config)
    found = asyncio.run(calibrate(pool, rows, criterion="grounding", threshold=default_threshold(config), repeats=2))
    assert found.agreement is not None
    assert found.agreement.value == 1.0
    assert found.flip_rate == 0.0
    assert found.num_scored >= 290
    assert found.num_scored + found.failures.get("rejected", 0) / 2 == 300


def test_rows_without_a_verdict_are_counted_and_enter_no_figure() -> None:
    rows = make_rows(True, True, False, False)
    found = compare(rows, [[scored(1.0)], [FAILED], [scored(1.0)], [scored(0.0)]], threshold=0.5)
    assert (found.num_rows, found.num_scored, found.failures) == (4, 3, {"timeout": 1})
    assert found.confusion == Confusion(true_positive=1, false_positive=1, false_negative=0, true_negative=1)
    assert found.agreement is not None
    assert found.agreement.value == pytest.approx(2 / 3)
    assert found.cost == 3 * 0.5 + 0.25
    assert found.flip_rate is None
    nothing = compare(rows, [[FAILED]] * 4, threshold=0.5)
    assert (nothing.agreement, nothing.kappa, nothing.num_scored) == (None, None, 0)


def test_the_threshold_divides_scores_and_gold_scores() -> None:
    rows = [GoldRow(question=str(n), completion="x", score=score) for n, score in enumerate((1.0, 3.0, 5.0))]
    found = compare(rows, [[scored(2.9)], [scored(3.0)], [scored(2.0)]], threshold=3.0)
    assert found.confusion == Confusion(true_positive=1, false_positive=0, false_negative=1, true_negative=1)
    config = JudgeConfig(
        endpoints=(EndpointConfig(url="http://127.0.0.1:9/v1", model="m"),),
        rubric="fairness",
        scale=ScaleConfig(low=1.0, high=5.0),
    )
    assert default_threshold(config) == 3.0


def test_flips_are_pairs_of_verdicts_on_one_text_that_differ() -> None:
    # pairs: 1 of 1 differs; 2 of 3 differ; none of 1 (a missing one makes no pair); no pair
    opinions = [[True, False], [True, True, False], [True, None, True], [False]]
    assert flip_rate(opinions) == 3 / 5
    assert flip_rate([[True], [None, True]]) is None


def test_an_unsteady_judge_is_found_out_by_asking_again() -> None:
    rows = make_rows(*[True] * 300)
    found = asyncio.run(calibrate(Accurate(rows, accuracy=0.5, seed=4), rows, criterion="c", threshold=0.5, repeats=3))
    assert found.num_repeats == 3
    assert found.flip_rate == pytest.approx(0.5, abs=0.08)  # 900 pairs, of 300 texts


def test_each_repeat_asks_for_a_verdict_of_its_own() -> None:
    asked: list[JudgeRequest] = []

    class Noting(Accurate):
        async def judge(self, requests: Sequence[JudgeRequest]) -> list[Judgement]:
            asked.extend(requests)
            return await super().judge(requests)

    rows = [*make_rows(True, False), GoldRow(question="q0", completion="another", label=True)]
    asyncio.run(calibrate(Noting(rows, accuracy=1.0, seed=0), rows, criterion="c", threshold=0.5, repeats=2))
    assert sorted((one.completion, one.question, one.sample_index) for one in asked) == sorted(
        (row.completion, row.question, repeat) for row in rows for repeat in (0, 1)
    )


def test_the_correlation_with_length_is_spearmans() -> None:
    assert score_length_correlation([0.1, 0.2, 0.9], [1, 5, 1000]) == pytest.approx(1.0)
    assert score_length_correlation([0.9, 0.2, 0.1], [1, 5, 1000]) == pytest.approx(-1.0)
    # ranks 1, 2.5, 2.5, 4 against 2, 1, 4, 3: covariance (-1.5 * -0.5) + 0 + 0 + (1.5 * 0.5) = 1.5, by sqrt(4.5 * 5)
    assert score_length_correlation([0, 1, 1, 2], [20, 10, 40, 30]) == pytest.approx(1.5 / math.sqrt(4.5 * 5))
    assert score_length_correlation([0.1, None, 0.2, 0.3], [3, -1, 2, 1]) == pytest.approx(-1.0)
    assert score_length_correlation([0.5, 0.5, 0.5], [1, 2, 3]) is None
    assert score_length_correlation([0.1, 0.2], [1, 2]) is None
    assert score_length_correlation([None] * 5, [1, 2, 3, 4, 5]) is None


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_gold_rows_take_labels_as_people_write_them(tmp_path: Path) -> None:
    base = {"question": "q", "completion": "c"}
    labels = [True, 1, "yes", "Good", False, 0, "no", " bad"]
    path = write(
        tmp_path / "gold.jsonl",
        *[{**base, "label": label, "annotator": "A"} for label in labels],
        "",
        {**base, "reference": "r", "score": 2},
    )
    rows = read_gold(path)
    assert [row.label for row in rows[:-1]] == [True] * 4 + [False] * 4
    assert rows[-1] == GoldRow(question="q", completion="c", reference="r", score=2.0)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "q", "completion": "c"}, "expected either label or score"),
        ({"question": "q", "completion": "c", "label": 1, "score": 1}, "expected either label or score"),
        ({"question": "q", "completion": "c", "label": 2}, "label is 2; expected true or false"),
        ({"question": "q", "completion": "c", "score": True}, "score is True; expected a number"),
        ({"question": "q", "label": 1}, "completion is missing; expected a text"),
        ({"question": 5, "completion": "c", "label": 1}, "question is a int; expected a text"),
        ([1], "expected an object"),
        ('{"question": ', "not JSON"),
        ('{"question": "q", "completion": "c", "score": NaN}', "NaN is not JSON"),
    ],
)
def test_a_line_that_is_no_gold_row_is_named(row: Any, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path / "gold.jsonl", {"question": "q", "completion": "c", "label": 1}, row)
    with pytest.raises(JudgeConfigError, match=f"line 2: .*{problem}"):
        read_gold(path)


def test_a_gold_file_that_is_not_there_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(JudgeConfigError, match=r"none\.jsonl cannot be read"):
        read_gold(tmp_path / "none.jsonl")
    with pytest.raises(JudgeConfigError, match="holds no row"):
        read_gold(write(tmp_path / "gold.jsonl", ""))
    with pytest.raises(JudgeConfigError, match="hallucination is None"):
        read_gold(write(tmp_path / "gold.jsonl", {"question": "q"}), format="halueval")


def test_the_result_is_plain_json() -> None:
    found: Calibration = compare(make_rows(True, False), [[scored(1.0)], [scored(0.0)]], threshold=0.5)
    content = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert content["agreement"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert content["confusion"]["true_positive"] == 1
