"""The weight of the KL penalty, one controller per objective. Plain Python: no torch (FORMULAS 4).

Call `observe(kl, rows=...)` once per window with the window's mean KL, then read `value` for the next window; without
scored rows do not call it. `is_stuck` says that beta has done all it may and the KL is still too high.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol

SMOOTHING = 0.9
"""Decay of the moving average of the observed KL."""

MAX_RELATIVE_ERROR = 0.2
"""Where ProportionalBeta clips the relative error of the KL (Ziegler et al. 2019, section 2.2)."""

_MAX_EXPONENT = 700.0  # exp overflows beyond 709; the bounds cut beta long before

BetaState = dict[str, float | None]
"""A controller's saved state: plain numbers, fit for JSON."""


class BetaController(Protocol):
    """What the update stage asks of a controller."""

    @property
    def value(self) -> float:
        """Weight of the KL penalty in the next window."""
        ...

    @property
    def is_stuck(self) -> bool:
        """Whether beta has long been at its maximum with the KL still too high: another estimator is needed."""
        ...

    def observe(self, kl: float, *, rows: int = 1) -> None:
        """Take the mean KL of a window, in nats per token, and the number of completions it is the mean over.

        Raises ValueError for a non-finite KL or for no rows; the controller is then as it was.
        """
        ...

    def state_dict(self) -> BetaState:
        """All that a resumed run needs, as plain numbers."""
        ...

    def load_state_dict(self, state: BetaState) -> None:
        """Take back what `state_dict` gave."""
        ...


class FixedBeta:
    """A constant weight."""

    def __init__(self, *, value: float) -> None:
        self._value = value

    @property
    def value(self) -> float:
        """Weight of the KL penalty."""
        return self._value

    @property
    def is_stuck(self) -> bool:
        """Never: it holds no KL."""
        return False

    def observe(self, kl: float, *, rows: int = 1) -> None:
        """Refuse what no controller takes; otherwise change nothing."""
        _check_observation(kl, rows)

    def state_dict(self) -> BetaState:
        """The weight."""
        return {"value": self._value}

    def load_state_dict(self, state: BetaState) -> None:
        """Take the weight back."""
        self._value = _number(state["value"])


class _AdaptiveBeta(ABC):
    """Beta within its bounds, the moving average of the KL, and the alarm; a subclass says by what factor beta moves.

    Owns those three numbers; all are in `state_dict`, so a restored controller goes on bit for bit.
    """

    def __init__(self, *, initial: float, highest_kl: float, minimum: float, maximum: float, alarm_after: int) -> None:
        """Args: highest_kl: smoothed KL, in nats per token, above which beta at its maximum counts as stuck."""
        if not 0 < minimum <= initial <= maximum:
            raise ValueError(f"beta needs 0 < minimum <= initial <= maximum, got {minimum}, {initial}, {maximum}")
        if alarm_after < 1:
            raise ValueError(f"alarm_after is {alarm_after}, but an alarm needs at least 1 observation")
        self.minimum, self.maximum, self.alarm_after = minimum, maximum, alarm_after
        self._highest_kl = highest_kl
        self._value = initial
        self._average: float | None = None
        self._num_stuck = 0

    @property
    def value(self) -> float:
        """Weight of the KL penalty in the next window."""
        return self._value

    @property
    def is_stuck(self) -> bool:
        """Whether the last `alarm_after` windows all ran at the maximum with the smoothed KL above band or target."""
        return self._num_stuck >= self.alarm_after

    def observe(self, kl: float, *, rows: int = 1) -> None:
        """Smooth the KL and move beta by it."""
        _check_observation(kl, rows)
        average = kl if self._average is None else SMOOTHING * self._average + (1 - SMOOTHING) * kl
        # the beta that this window ran with, not the one that its KL leads to
        is_powerless = self._value >= self.maximum and average > self._highest_kl
        self._num_stuck = self._num_stuck + 1 if is_powerless else 0
        self._average = average
        self._value = min(max(self._value * self._factor(average, rows), self.minimum), self.maximum)

    def state_dict(self) -> BetaState:
        """Beta, the moving average (None before the first observation), and the windows counted toward the alarm."""
        return {"value": self._value, "average": self._average, "num_stuck": self._num_stuck}

    def load_state_dict(self, state: BetaState) -> None:
        """Take all three back; without `num_stuck` the alarm counts anew, which moves no beta.

        Raises ValueError for what is no number; the controller is then as it was.
        """
        saved = state["average"]
        average = None if saved is None else _number(saved)
        value, num_stuck = _number(state["value"]), int(_number(state.get("num_stuck", 0)))
        self._value, self._average, self._num_stuck = value, average, num_stuck

    @abstractmethod
    def _factor(self, average: float, rows: int) -> float:
        """What beta is multiplied by, given the smoothed KL; the bounds are applied afterwards."""


class BandBeta(_AdaptiveBeta):
    """Holds the smoothed KL inside [low, high]: above it beta grows by `rate`, below it shrinks, inside it rests."""

    def __init__(
        self,
        *,
        initial: float,
        low: float,
        high: float,
        rate: float = 0.1,
        minimum: float = 1e-4,
        maximum: float = 10.0,
        alarm_after: int = 20,
    ) -> None:
        """Args: see FORMULAS 4; low, high in nats per token. Raises ValueError for bounds that cannot hold."""
        if not 0 <= low < high:
            raise ValueError(f"a KL band needs 0 <= low < high, got low={low} and high={high}")
        if not 0 < rate < 1:
            raise ValueError(f"rate is {rate}, but must lie between 0 and 1")
        super().__init__(initial=initial, highest_kl=high, minimum=minimum, maximum=maximum, alarm_after=alarm_after)
        self.low, self.high, self.rate = low, high, rate

    def _factor(self, average: float, rows: int) -> float:
        return 1 + self.rate * ((average > self.high) - (average < self.low))


class ProportionalBeta(_AdaptiveBeta):
    """Moves beta by the KL's relative error, clipped to a fifth, times the window's share of `horizon` rows.

    It counts rows and not windows, so `observe` needs them: 64 rows a window and the default horizon move beta by at
    most 0.13 % a window. Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2, with rows / horizon for its
    constant K as in its code; the error there is that of the last batch, here that of the moving average.
    """

    def __init__(
        self,
        *,
        initial: float,
        target: float,
        horizon: float = 10_000,
        minimum: float = 1e-4,
        maximum: float = 10.0,
        alarm_after: int = 20,
    ) -> None:
        """Args: target in nats per token; horizon in rows. Raises ValueError for bounds that cannot hold."""
        if not horizon > 0:
            raise ValueError(f"horizon is {horizon} rows, but must be above 0")
        _check_target(target)
        super().__init__(initial=initial, highest_kl=target, minimum=minimum, maximum=maximum, alarm_after=alarm_after)
        self.target, self.horizon = target, horizon

    def _factor(self, average: float, rows: int) -> float:
        error = min(max(average / self.target - 1, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        return 1 + error * rows / self.horizon


class DualBeta(_AdaptiveBeta):
    """Integrates the KL's relative error into log beta: dual ascent on "KL <= target" that cannot go negative.

    It falls by at most `rate` a window, but rises without such a bound: far above the target it overshoots.
    """

    def __init__(
        self,
        *,
        initial: float,
        target: float,
        rate: float = 0.1,
        minimum: float = 1e-4,
        maximum: float = 10.0,
        alarm_after: int = 20,
    ) -> None:
        """Args: target in nats per token; rate per window. Raises ValueError for bounds that cannot hold."""
        if not rate > 0:
            raise ValueError(f"rate is {rate}, but must be above 0")
        _check_target(target)
        super().__init__(initial=initial, highest_kl=target, minimum=minimum, maximum=maximum, alarm_after=alarm_after)
        self.target, self.rate = target, rate

    def _factor(self, average: float, rows: int) -> float:
        return math.exp(min(self.rate * (average / self.target - 1), _MAX_EXPONENT))


def _check_observation(kl: float, rows: int) -> None:
    if not math.isfinite(kl):
        raise ValueError(f"observed KL is {kl}; a controller takes finite values only")
    if rows < 1:
        raise ValueError(f"observed KL is the mean over {rows} rows; without scored rows there is nothing to observe")


def _check_target(target: float) -> None:
    if not target > 0:
        raise ValueError(f"the target KL is {target}, but must be above 0")


def _number(value: float | None) -> float:
    if value is None or not math.isfinite(value):
        raise ValueError(f"the saved state of a beta controller holds {value}; expected a finite number")
    return value
