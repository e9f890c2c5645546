"""The names of metrics.jsonl, the sums behind them, its reader and writer, and the intervals of eval.json.

Comes in: numbers. Goes out: rows, means, intervals. Knows no tensor and no stage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from grpo.durable_files import append_lines, cut_last_lines
from grpo.errors import InputError

STEP = "step"
KL_CLAMPED_FRAC = "kl/clamped_frac"
POLICY_LOSS = "loss/policy"
KL_LOSS = "loss/kl"
GRAD_NORM = "grad_norm"
ENTROPY = "entropy"
CLIP_LOW_FRAC = "clip/low_frac"
CLIP_HIGH_FRAC = "clip/high_frac"
CLIP_DELTA_FRAC = "clip/delta_frac"
ZERO_VARIANCE_FRAC = "groups/zero_variance_frac"
SAMPLER_RATIO_P99 = "sampler/ratio_p99"
SAMPLER_RATIO_MAX = "sampler/ratio_max"
CORRECTION_WEIGHT_MEAN = "sampler/correction_mean"
CORRECTION_MASKED_FRAC = "sampler/correction_masked_frac"
ENTROPY_COEFFICIENT = "entropy/coefficient"
SKIPPED = "update/skipped"
OUT_OF_MEMORY = "update/out_of_memory"
"""Times in the step that the micro-batches were halved for want of memory."""
RESAMPLED_GROUPS = "groups/resampled"
JUDGE_CALLS = "judge/calls"
JUDGE_EXTRA_CALLS = "judge/extra_calls"
"""Of the calls: retries and hedges."""
JUDGE_COST = "judge/cost"
"""Money known to be spent."""
JUDGE_BREAKER_OPENED = "judge/breaker_opened"
PROMPT_TOKENS = "tokens/prompt"
COMPLETION_TOKENS = "tokens/completion"
IDLE_TOKENS = "tokens/idle"
"""Loss tokens of groups that teach nothing and have no KL or entropy term. No pass is spent on them: entropy, KL,
ratios and the sampler's figures are of the others."""
PEAK_MEMORY_BYTES = "memory/peak_bytes"
STAGES = ("rollout", "judge", "judge_wait", "update", "sync", "step", "eval")
"""What `time_name` takes. "judge" runs beside the rollout; "judge_wait" is the part of it that nothing hid. "eval" is
no part of the step, but follows it where eval.every says so."""

_BOOTSTRAP_BLOCK = 1_000_000  # draws held at once: 8 MB of indices, whatever the number of prompts


def reward_mean_name(objective: str) -> str:
    return f"reward/{objective}/mean"


def reward_std_name(objective: str) -> str:
    return f"reward/{objective}/std"


def unscored_frac_name(objective: str) -> str:
    return f"reward/{objective}/unscored_frac"


def zero_variance_frac_name(objective: str) -> str:
    """Share of the groups with at least two verdicts of the objective in which all of them are equal. The run's
    `ZERO_VARIANCE_FRAC` is of every group and objective, with verdicts or without."""
    return f"groups/{objective}/zero_variance_frac"


def length_correlation_name(objective: str) -> str:
    """Spearman's rank correlation of scores with lengths in tokens."""
    return f"reward/{objective}/length_correlation"


def judge_failed_name(kind: str) -> str:
    """Judgements that failed in this way."""
    return f"judge/failed/{kind}"


def judge_count_name(what: str) -> str:
    """Such as "cached" or "shared": questions that cost no call."""
    return f"judge/{what}"


def kl_name(objective: str) -> str:
    return f"kl/{objective}"


def kl_max_name(objective: str) -> str:
    return f"kl/{objective}/max"


def kl_penalty_name(objective: str) -> str:
    return f"kl/{objective}/penalty"


def observed_kl_name(objective: str, observe: str | None) -> str:
    """The metric that the objective's beta controller observes; `observe` is the recipe's `beta.observe`."""
    return kl_penalty_name(objective) if observe == "penalty" else kl_name(objective)


def beta_name(objective: str) -> str:
    return f"beta/{objective}"


def gradient_cosine_name(first: str, second: str) -> str:
    return f"gradients/cosine/{first}/{second}"


def gradient_norm_name(objective: str) -> str:
    return f"gradients/norm/{objective}"


def length_mean_name(objective: str | None = None) -> str:
    """Tokens a completion: of one objective's completions, or of all."""
    return "completion/length_mean" if objective is None else f"completion/{objective}/length_mean"


def truncated_frac_name(objective: str | None = None) -> str:
    """Share of completions cut at max_new_tokens: of one objective's completions, or of all."""
    return "completion/truncated_frac" if objective is None else f"completion/{objective}/truncated_frac"


def end_token_frac_name(token_id: int) -> str:
    """Share of all completions that ended by this token; with the truncated share they sum to 1."""
    return f"completion/end_token/{token_id}"


def eval_name(
    objective: str,
    figure: Literal["mean", "low", "high", "unscored_frac", "answers_changed", "scores_changed"] = "mean",
) -> str:
    """Of an evaluation during the run: the mean held-out score with its 95% interval, the share without a verdict, and
    how many answers (word for word) and scores are others than at the evaluation before."""
    return f"eval/{objective}/{figure}"


def time_name(stage: str) -> str:
    """Seconds spent in one of `STAGES`."""
    assert stage in STAGES, stage
    return f"time/{stage}_s"


class MeanAccumulator:
    """Owns one `(sum, count)` per name, so that micro-batches and ranks add up to the mean over all rows.

    `add` per micro-batch, `merge` per rank, `means` once a step.
    """

    def __init__(self) -> None:
        self._totals: dict[str, tuple[float, float]] = {}

    def add(self, name: str, sum: float, count: float) -> None:
        """Adds `count` more values of `name` that sum to `sum`.

        Raises:
            ValueError: the count is negative or not finite.
        """
        if not (math.isfinite(count) and count >= 0):
            raise ValueError(f"{name}: count is {count}, expected a finite number >= 0")
        if count == 0:
            return  # the sum of no values says nothing, even where a masked mean made it NaN
        total, total_count = self._totals.get(name, (0.0, 0.0))
        self._totals[name] = (total + float(sum), total_count + float(count))

    def merge(self, totals: Mapping[str, tuple[float, float]]) -> None:
        """Adds the `totals()` of another micro-batch or rank."""
        for name, (total, count) in totals.items():
            self.add(name, total, count)

    def totals(self) -> dict[str, tuple[float, float]]:
        """name -> (sum, count), to be sent to another rank."""
        return dict(self._totals)

    def means(self) -> dict[str, float]:
        """name -> sum / count. A name without values is absent, never 0."""
        return {name: total / count for name, (total, count) in self._totals.items()}


def iter_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, one at a time. NaN and Infinity read as None: they are missing.

    An unterminated last line that does not parse was torn by a kill (or is being written now) and is dropped.

    Raises:
        InputError: the file cannot be opened, or another line is not a JSON object; the message has its number.
    """
    try:
        file = path.open("rb")
    except OSError as exc:
        raise InputError(
            f"{path} cannot be read ({exc.strerror}). Expected a file with one JSON object a line."
        ) from exc
    with file:
        for number, line in enumerate(file, start=1):  # bytes: a str would also be split at U+2028
            if not line.strip():
                continue
            try:
                yield _json_object(line)
            except ValueError as exc:
                if not line.endswith(b"\n"):
                    return
                raise InputError(
                    f"{path}, line {number}: {exc}. Expected one JSON object a line; only a last line without its "
                    "newline may be incomplete. Repair or remove that line."
                ) from exc


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in file order. Torn last line and errors as in `iter_json_lines`."""
    return list(iter_json_lines(path))


def append_metrics(path: Path, row: Mapping[str, float | int | str | None]) -> None:
    """Appends one row as one line, and syncs it. A non-finite float is written as null: JSON has no NaN, and missing is
    None.

    A torn last line, left by a kill, is removed first: behind it the new row would be unreadable.

    Raises:
        TypeError: a value is not a plain number, string or None; nothing is written.
        StorageError: the disk refuses it.
    """
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    line = json.dumps(finite, allow_nan=False).encode()
    cut_last_lines(path, is_json_object, only_half_line=True)
    append_lines(path, [line])


def is_json_object(line: bytes) -> bool:
    """Whether a line is whole."""
    try:
        _json_object(line)
    except ValueError:
        return False
    return True


def _json_object(line: bytes) -> dict[str, Any]:
    value = json.loads(line.decode("utf-8"), parse_constant=lambda _: None)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and its 95% interval."""

    mean: float
    """Of the values as given."""
    low: float
    """2.5th percentile of the resampled means."""
    high: float
    """97.5th percentile of the resampled means."""


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> Interval:
    """Mean with a 95% percentile bootstrap interval.

    Args:
        values: [P] one number a prompt (average over a prompt's completions first: they are not independent).
            Missing ones left out by the caller.
        seed: same seed, same interval.
        resamples: how many times P values are drawn with replacement.
    Returns:
        The interval; with one value nothing is known of the spread, and low = high = mean.
    Raises:
        ValueError: no value (an objective without a verdict is absent, not 0), or one that is not finite.
    Source: Efron 1979, "Bootstrap methods: another look at the jackknife"; percentile method.
    """
    array = np.asarray(values, dtype=np.float64)  # [P]
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(
            f"bootstrap over {array.size} values, shape {array.shape}; expected a list of at least one finite number, "
            "missing ones left out"
        )
    mean = float(array.mean())
    if array.size < 2:
        return Interval(mean=mean, low=mean, high=mean)
    rng = np.random.default_rng(seed)
    block = max(1, _BOOTSTRAP_BLOCK // array.size)
    means = np.empty(resamples)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        draws = rng.integers(0, array.size, size=(rows, array.size))
        means[start : start + rows] = array[draws].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(mean=mean, low=float(low), high=float(high))


def bootstrap_difference(
    before: Sequence[float], after: Sequence[float], *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """Mean of after - before with a 95% paired percentile bootstrap interval.

    Args:
        before: [P] one number a prompt.
        after: [P] the same prompts in the same order. Drawing prompts, not values, keeps a prompt's difficulty
            out of the interval; that is the same as drawing differences.
        seed: same seed, same interval.
        resamples: how many times P prompts are drawn with replacement.
    Raises:
        ValueError: the lengths differ, or as in `bootstrap_mean`.
    """
    if len(before) != len(after):
        raise ValueError(
            f"{len(before)} values before and {len(after)} after; a paired difference needs both of every prompt"
        )
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return bootstrap_mean(differences, seed=seed, resamples=resamples)
