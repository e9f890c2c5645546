"""How far a judge agrees with people, with itself, and with the length of what it judges. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

NUM_RESAMPLES = 10_000
COVERAGE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """Two yes/no opinions on the same texts, counted; the judge's against the gold label."""

    true_positive: int
    """Both say yes."""
    false_positive: int
    """The judge alone says yes."""
    false_negative: int
    """The label alone says yes."""
    true_negative: int
    """Both say no."""

    @property
    def total(self) -> int:
        """Texts."""
        return self.true_positive + self.false_positive + self.false_negative + self.true_negative

    @classmethod
    def count(cls, labels: Sequence[bool], verdicts: Sequence[bool]) -> Confusion:
        """Args: labels, verdicts: [N], one of each per text."""
        pairs = [(bool(label), bool(verdict)) for label, verdict in zip(labels, verdicts, strict=True)]
        return cls(
            true_positive=pairs.count((True, True)),
            false_positive=pairs.count((False, True)),
            false_negative=pairs.count((True, False)),
            true_negative=pairs.count((False, False)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its uncertainty."""

    value: float
    """Over the texts at hand."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end."""


def agreement(confusion: Confusion) -> float:
    """Share of texts on which both opinions are the same; NaN of no texts."""
    return float(_agreement(_cells(confusion)))


def cohens_kappa(confusion: Confusion) -> float:
    """Agreement beyond chance: (observed - expected) / (1 - expected).

    NaN where both opinions are one and the same for all texts: nothing could be expected to differ.

    Source: Cohen 1960, "A Coefficient of Agreement for Nominal Scales".
    """
    return float(_kappa(_cells(confusion)))


def agreement_interval(confusion: Confusion, *, seed: int = 0) -> Estimate | None:
    """Agreement with its bootstrap interval; None of no texts.

    The interval of a judge that always (or never) agrees has no width: the bootstrap draws from what it has seen.
    """
    return _bootstrap(confusion, _agreement, seed=seed)


def kappa_interval(confusion: Confusion, *, seed: int = 0) -> Estimate | None:
    """Cohen's kappa with its bootstrap interval; None where kappa has no value."""
    return _bootstrap(confusion, _kappa, seed=seed)


def flip_rate(repeats: Sequence[Sequence[bool | None]]) -> float | None:
    """How often a judge that is asked twice contradicts itself.

    Args:
        repeats: [N][R] opinions on the same text; None where there is none.
    Returns:
        Share of pairs of opinions on one text that differ, over all pairs of all texts; so it does not depend on R.
        None where no text has two opinions.
    """
    num_pairs = num_flips = 0
    for opinions in repeats:
        for first, second in combinations([one for one in opinions if one is not None], 2):
            num_pairs += 1
            num_flips += first != second
    return num_flips / num_pairs if num_pairs else None


def score_length_correlation(scores: Sequence[float | None], lengths: Sequence[float]) -> float | None:
    """Spearman's rank correlation of scores with lengths: does the judge like long answers, whatever they say?

    Beyond about 0.5 either way, look at what is being rewarded.

    Args:
        scores: [N], None where there is no verdict: the text is left out.
        lengths: [N], in characters or tokens.
    Returns:
        -1 to 1; None where fewer than three texts have a score, or all scores or all lengths are equal.
    """
    pairs = [(score, length) for score, length in zip(scores, lengths, strict=True) if score is not None]
    if len(pairs) < 3:
        return None
    ranks = [_ranks([pair[column] for pair in pairs]) for column in (0, 1)]
    x, y = (np.asarray(column) - (len(pairs) + 1) / 2 for column in ranks)  # every ranking has the same mean
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale else None


def _cells(confusion: Confusion) -> np.ndarray:
    """[4] true positive, false positive, false negative, true negative."""
    counts = (confusion.true_positive, confusion.false_positive, confusion.false_negative, confusion.true_negative)
    return np.asarray(counts, dtype=np.float64)


def _agreement(cells: np.ndarray) -> np.ndarray:
    """[..., 4] -> [...]."""
    total = cells.sum(-1)
    return np.divide(cells[..., 0] + cells[..., 3], total, out=np.full(total.shape, np.nan), where=total > 0)


def _kappa(cells: np.ndarray) -> np.ndarray:
    """[..., 4] -> [...]."""
    total = cells.sum(-1)
    label_yes, judge_yes = cells[..., 0] + cells[..., 2], cells[..., 0] + cells[..., 1]
    label_no, judge_no = total - label_yes, total - judge_yes
    # times total squared, all of it: whole numbers, so that "nothing left beyond chance" is exactly 0
    observed = (cells[..., 0] + cells[..., 3]) * total
    expected = label_yes * judge_yes + label_no * judge_no
    beyond_chance = total * total - expected
    return np.divide(observed - expected, beyond_chance, out=np.full(total.shape, np.nan), where=beyond_chance > 0)


def _bootstrap(confusion: Confusion, statistic, *, seed: int) -> Estimate | None:
    """Percentile bootstrap over texts. Drawing N texts with replacement is one multinomial draw of the four counts."""
    cells = _cells(confusion)
    value = float(statistic(cells))
    if math.isnan(value):
        return None
    draws = np.random.default_rng(seed).multinomial(confusion.total, cells / cells.sum(), size=NUM_RESAMPLES)
    resampled = statistic(draws.astype(np.float64))
    tail = (1 - COVERAGE) / 2
    low, high = np.nanquantile(resampled, (tail, 1 - tail))
    return Estimate(value=value, low=float(low), high=float(high))


def _ranks(values: Sequence[float]) -> list[float]:
    """[N] ranks from 1; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + 1 + end) / 2
        start = end
    return ranks
