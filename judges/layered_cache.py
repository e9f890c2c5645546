"""Two caches of verdicts as one: what this step has received already, before what runs share."""

from __future__ import annotations

from judges.seams import VerdictCache
from judges.types import Verdict


class LayeredCache:
    """Asks the first, then the second; keeps in both, the first one first. Owns neither."""

    def __init__(self, first: VerdictCache, second: VerdictCache | None) -> None:
        self._first, self._second = first, second
        self.num_from_first = 0
        """Questions that the first has answered."""

    async def get(self, key: str) -> Verdict | None:
        """The verdict kept under the key."""
        found = await self._first.get(key)
        if found is not None:
            self.num_from_first += 1
            return found
        return None if self._second is None else await self._second.get(key)

    async def put(self, key: str, verdict: Verdict) -> None:
        """Keep a verdict in both."""
        await self._first.put(key, verdict)
        if self._second is not None:
            await self._second.put(key, verdict)
