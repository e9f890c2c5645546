"""How many tries beyond the first an endpoint gets, over all requests: an outage must not be answered with a storm.

Source: "retry budget" in Site Reliability Engineering, ch. 21 (Beyer et al. 2016).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from judges.config import RetryBudgetConfig


class RetryBudget:
    """Counts first and extra tries of the last window. Hedges spend it too."""

    def __init__(self, config: RetryBudgetConfig, *, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._firsts: deque[float] = deque()
        self._extras: deque[float] = deque()

    def note_first(self) -> None:
        """A request asks this endpoint for the first time: that earns a share of an extra try."""
        self._firsts.append(self._clock())

    def take(self) -> bool:
        """Spend one extra try, if there is one."""
        if self._num_left() < 1:
            return False
        self._extras.append(self._clock())
        return True

    def wait_s(self) -> float:
        """Seconds until an extra try may be had, as far as is known now; inf where there never is one."""
        if self._num_left() >= 1:
            return 0.0
        if not self._extras:
            return float("inf")
        return max(0.0, self._extras[0] + self._config.window_s - self._clock())

    def _num_left(self) -> float:
        horizon = self._clock() - self._config.window_s
        for times in (self._firsts, self._extras):
            while times and times[0] <= horizon:
                times.popleft()
        return self._config.floor + self._config.share * len(self._firsts) - len(self._extras)
