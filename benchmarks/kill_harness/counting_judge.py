"""The demo judge, counting how often it was asked about each text: what a killed run bought twice shows here."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from judges.demo_server import DemoServer, DemoSettings
from judges.prompts import read_fences


class CountingJudge(DemoServer):
    """Use it by `serve_counting`. Half of its verdicts are flipped, drawn by what is asked: what a tiny model babbles
    would all be wrong otherwise."""

    def __init__(self, *, delay_s: float) -> None:
        super().__init__(port=0, settings=DemoSettings(error_rate=0.5, delay_s=delay_s))
        self._asking = threading.Lock()
        self._asked: Counter[str] = Counter()

    def handle_error(self, *_: object) -> None:
        """Silent: those who ask are killed, and their connections with them."""

    def answer(self, prompt: str) -> tuple[int, dict[str, object]]:
        """Status and body; the count goes by the texts, for the nonce is another in each call."""
        _, texts = read_fences(prompt)
        key = prompt.partition("\n")[0] + json.dumps(texts, sort_keys=True)
        with self._asking:
            self._asked[key] += 1
        return super().answer(prompt)

    def take_asked(self) -> Counter[str]:
        """Question -> how often it was asked since the last call."""
        with self._asking:
            asked, self._asked = self._asked, Counter()
        return asked


@contextmanager
def serve_counting(*, delay_s: float) -> Iterator[CountingJudge]:
    """A counting judge in a thread. Args: delay_s: before each answer, so that calls are in flight at a kill."""
    with CountingJudge(delay_s=delay_s) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
