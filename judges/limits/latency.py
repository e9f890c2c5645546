"""How long an endpoint usually takes: when a call is late enough for a twin."""

from __future__ import annotations

from collections import deque

LATENCIES_KEPT = 200


class Latencies:
    """The last 200 answered calls' durations, in seconds."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=LATENCIES_KEPT)

    def __len__(self) -> int:
        return len(self._seconds)

    def note(self, seconds: float) -> None:
        """A call was answered after so long."""
        self._seconds.append(seconds)

    def quantile(self, share: float) -> float | None:
        """The smallest kept duration that at least this share of the calls did not exceed; None without any."""
        if not self._seconds:
            return None
        ordered = sorted(self._seconds)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
