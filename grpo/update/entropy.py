"""The weight of the entropy bonus in the loss. Plain Python: no torch (FORMULAS 5).

Read `value` for a window, then call `observe(entropy)` once with that window's mean entropy over all ranks.
"""

from __future__ import annotations

import math
from typing import Protocol

EntropyState = dict[str, float | None]
"""A bonus's saved state: plain numbers, fit for JSON."""


class EntropyBonus(Protocol):
    """What the update stage asks of a bonus: the loss gets - value * mean entropy of the window's loss tokens."""

    @property
    def value(self) -> float:
        """Weight of the entropy in the next window; 0 where it rests."""
        ...

    def observe(self, entropy: float) -> None:
        """Take a window's mean entropy, in nats per loss token. Raises ValueError for a non-finite one."""
        ...

    def state_dict(self) -> EntropyState:
        """All that a resumed run needs, as plain numbers."""
        ...

    def load_state_dict(self, state: EntropyState) -> None:
        """Take back what `state_dict` gave."""
        ...


class FixedEntropyBonus:
    """A constant weight."""

    def __init__(self, *, coefficient: float) -> None:
        if not coefficient >= 0:
            raise ValueError(f"the entropy coefficient is {coefficient}, but must not be negative")
        self._coefficient = coefficient

    @property
    def value(self) -> float:
        """Weight of the entropy."""
        return self._coefficient

    def observe(self, entropy: float) -> None:
        """Refuse a non-finite entropy; otherwise change nothing."""
        _check_finite(entropy)

    def state_dict(self) -> EntropyState:
        """The weight."""
        return {"coefficient": self._coefficient}

    def load_state_dict(self, state: EntropyState) -> None:
        """Take the weight back."""
        self._coefficient = _number(state["coefficient"])


class AdaptiveEntropyBonus:
    """Keeps the entropy above `target`: the coefficient grows by `step` at or below it and shrinks by `step` above it.

    The coefficient acts only while the last observed entropy is at or below the target; above it `value` is 0 and the
    coefficient is kept for the next fall. Owns the coefficient and the last entropy; both are in `state_dict`.
    Source: Skywork-OR1 (arXiv:2505.22312), adaptive entropy control; the bound `maximum` is ours.
    """

    def __init__(self, *, target: float, step: float = 1e-3, initial: float = 0.0, maximum: float = 0.05) -> None:
        """Args: target in nats per token; initial acts until the first observation. Raises ValueError: bad bounds."""
        if not target > 0:
            raise ValueError(f"the target entropy is {target}, but must be above 0")
        if not step > 0:
            raise ValueError(f"step is {step}, but must be above 0")
        if not 0 <= initial <= maximum:
            raise ValueError(f"the coefficient needs 0 <= initial <= maximum, got {initial} and {maximum}")
        self.target, self.step, self.maximum = target, step, maximum
        self._coefficient = initial
        self._last: float | None = None

    @property
    def value(self) -> float:
        """Weight of the entropy in the next window."""
        return self._coefficient if self._last is None or self._last <= self.target else 0.0

    def observe(self, entropy: float) -> None:
        """Move the coefficient one step by the entropy's side of the target."""
        _check_finite(entropy)
        change = self.step if entropy <= self.target else -self.step
        self._coefficient = min(max(self._coefficient + change, 0.0), self.maximum)
        self._last = entropy

    def state_dict(self) -> EntropyState:
        """The coefficient, also where it rests, and the last entropy (None before the first observation)."""
        return {"coefficient": self._coefficient, "entropy": self._last}

    def load_state_dict(self, state: EntropyState) -> None:
        """Take both back. Raises ValueError for what is no number; the bonus is then as it was."""
        saved = state["entropy"]
        last = None if saved is None else _number(saved)
        self._coefficient, self._last = _number(state["coefficient"]), last


def _check_finite(entropy: float) -> None:
    if not math.isfinite(entropy):
        raise ValueError(f"observed entropy is {entropy}; a bonus takes finite values only")


def _number(value: float | None) -> float:
    if value is None or not math.isfinite(value):
        raise ValueError(f"the saved state of an entropy bonus holds {value}; expected a finite number")
    return value
