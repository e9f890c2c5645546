"""The weight of the KL penalty, one controller per objective. Plain Python: no torch (FORMULAS 4).

Call `observe(kl)` once per window with the window's mean KL, then read `value` for the next window.
"""

from __future__ import annotations

import math
from typing import Protocol

SMOOTHING = 0.9
"""Decay of the moving average of the observed KL."""


class BetaController(Protocol):
    """What the update stage asks of a controller."""

    @property
    def value(self) -> float:
        """Weight of the KL penalty in the next window."""
        ...

    def observe(self, kl: float) -> None:
        """Take the mean KL of a window, in nats. Raises ValueError for a non-finite one."""
        ...

    def state_dict(self) -> dict[str, float | None]:
        """All that a resumed run needs, as plain numbers."""
        ...

    def load_state_dict(self, state: dict[str, float | None]) -> None:
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

    def observe(self, kl: float) -> None:
        """Refuse a non-finite KL; otherwise change nothing."""
        _check_finite(kl)

    def state_dict(self) -> dict[str, float | None]:
        """The weight."""
        return {"value": self._value}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Take the weight back."""
        self._value = _number(state["value"])


class BandBeta:
    """Holds the smoothed KL inside [low, high]: above it beta grows by `rate`, below it beta shrinks, inside it rests.

    Owns beta and the moving average of the KL; both are in `state_dict`.
    """

    def __init__(
        self,
        *,
        initial: float,
        low: float,
        high: float,
        rate: float = 0.1,
        minimum: float = 1e-4,
        maximum: float = 10.0,
    ) -> None:
        """Args: see FORMULAS 4; low, high in nats per token. Raises ValueError for bounds that cannot hold."""
        if not 0 <= low < high:
            raise ValueError(f"a KL band needs 0 <= low < high, got low={low} and high={high}")
        if not 0 < minimum <= initial <= maximum:
            raise ValueError(f"beta needs 0 < minimum <= initial <= maximum, got {minimum}, {initial}, {maximum}")
        if not 0 < rate < 1:
            raise ValueError(f"rate is {rate}, but must lie between 0 and 1")
        self.low, self.high, self.rate = low, high, rate
        self.minimum, self.maximum = minimum, maximum
        self._value = initial
        self._average: float | None = None

    @property
    def value(self) -> float:
        """Weight of the KL penalty in the next window."""
        return self._value

    def observe(self, kl: float) -> None:
        """Move beta by the smoothed KL's place against the band."""
        _check_finite(kl)
        self._average = kl if self._average is None else SMOOTHING * self._average + (1 - SMOOTHING) * kl
        factor = 1.0
        if self._average > self.high:
            factor = 1 + self.rate
        elif self._average < self.low:
            factor = 1 - self.rate
        self._value = min(max(self._value * factor, self.minimum), self.maximum)

    def state_dict(self) -> dict[str, float | None]:
        """Beta and the moving average."""
        return {"value": self._value, "average": self._average}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Take beta and the moving average back."""
        average = state["average"]
        self._value, self._average = _number(state["value"]), None if average is None else _number(average)


def _check_finite(kl: float) -> None:
    if not math.isfinite(kl):
        raise ValueError(f"observed KL is {kl}; a controller takes finite values only")


def _number(value: float | None) -> float:
    if value is None or not math.isfinite(value):
        raise ValueError(f"the saved state of a beta controller holds {value}; expected a finite number")
    return value
