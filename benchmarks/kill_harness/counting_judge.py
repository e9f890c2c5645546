"""The demo judge, keeping account of what it was asked and has answered: what a killed run bought twice shows here."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from judges.config import PriceConfig
from judges.demo_server import DemoServer, DemoSettings
from judges.prompts import read_fences


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One question that the judge was asked, and has answered as far as it knows."""

    question: str
    """Criterion and texts; the same for all who ask the same."""
    nonce: str
    """Of this one call: the reply repeats it."""
    prompt_tokens: int
    completion_tokens: int

    def cost(self, price: PriceConfig) -> float:
        """What the judge bills for it."""
        return price.cost(prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens)


class CountingJudge(DemoServer):
    """Use it by `serve_counting`. Half of its verdicts are flipped, drawn by what is asked: what a tiny model babbles
    would all be wrong otherwise."""

    def __init__(self, *, delay_s: float) -> None:
        super().__init__(port=0, settings=DemoSettings(error_rate=0.5, delay_s=delay_s))
        self._asking = threading.Lock()
        self._asked: list[Asked] = []

    def handle_error(self, *_: object) -> None:
        """Silent: those who ask are killed, and their connections with them."""

    def answer(self, prompt: str) -> tuple[int, dict[str, object]]:
        """Status and body; the count goes by the texts, for the nonce is another in each call."""
        nonce, texts = read_fences(prompt)
        status, body = super().answer(prompt)
        usage = body["usage"]
        assert isinstance(usage, dict)  # it fails nobody: the settings above
        asked = Asked(
            question=prompt.partition("\n")[0] + json.dumps(texts, sort_keys=True),
            nonce=nonce,
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
        )
        with self._asking:
            self._asked.append(asked)
        return status, body

    def take_asked(self) -> list[Asked]:
        """All that it was asked since the last call, in order."""
        with self._asking:
            asked, self._asked = self._asked, []
        return asked


def count(asked: Sequence[Asked]) -> Counter[str]:
    """Question -> how often it was asked."""
    return Counter(one.question for one in asked)


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
