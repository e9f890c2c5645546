"""A small judge to try things with: `python -m judges.demo_server` prints its base URL and serves until SIGTERM.

Speaks OpenAI's chat completions on 127.0.0.1, reads the prompts that `judges.prompts` makes, grades them by text rules
and errs as often as it is told to. Under one seed the same request gets the same grade, and fails at the same tries.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from judges.demo_grading import grade
from judges.prompts import read_fences

MODEL = "demo-judge"
MAX_REQUEST_BYTES = 4 << 20
CRITERION_LABEL = "Criterion:"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """How good and how reliable the demo judge is."""

    error_rate: float = 0.0
    """Share of requests whose verdict is flipped, drawn by a hash of the request."""
    failure_rate: float = 0.0
    """Share of tries answered with 503, drawn by a hash of the request and the number of its try."""
    delay_s: float = 0.0
    """Seconds before each answer."""
    seed: int = 0
    """Draws other errors and failures."""


class DemoServer(ThreadingHTTPServer):
    """Owns the socket and the counts. `url` is the base URL; use it by `serve(...)`."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, *, port: int, settings: DemoSettings) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.settings = settings
        self._counting = threading.Lock()
        self._stats: Counter[str] = Counter(requests=0, verdicts=0, flipped=0, failures=0)
        self._tries: Counter[str] = Counter()

    @property
    def url(self) -> str:
        """The base URL, up to /v1."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def stats(self) -> dict[str, int]:
        """Chat requests served so far, and how they went."""
        with self._counting:
            return dict(self._stats)

    def answer(self, prompt: str) -> tuple[int, dict[str, Any]]:
        """Status and body for one judge prompt."""
        self.count("requests")
        try:
            label, _, criterion = prompt.partition("\n")[0].partition(" ")
            if label != CRITERION_LABEL:
                raise ValueError(f"the prompt's first line is not '{CRITERION_LABEL} <name>'")
            nonce, texts = read_fences(prompt)
            content = json.dumps([criterion, texts["question"], texts["reference"], texts["completion"]])
            score = grade(criterion, texts["question"], texts["reference"], texts["completion"])
        except (KeyError, ValueError) as exc:
            return 400, _error(f"this demo judge cannot read the prompt: {type(exc).__name__}: {exc}")
        if self._fails(content):
            self.count("failures")
            return 503, _error("the demo judge fails on purpose (--failure-rate)")
        is_flipped = _draw(self.settings.seed, "error", content) < self.settings.error_rate
        if is_flipped:
            self.count("flipped")
            score = 0.0 if score >= 0.5 else 1.0
        self.count("verdicts")
        verdict = json.dumps({"nonce": nonce, "reason": "graded by the demo judge's rules", "score": score})
        return 200, _completion(verdict, num_prompt_words=len(prompt.split()))

    def count(self, name: str) -> None:
        """Count one event for /stats."""
        with self._counting:
            self._stats[name] += 1

    def _fails(self, content: str) -> bool:
        if not self.settings.failure_rate:
            return False
        key = hashlib.sha256(content.encode()).hexdigest()
        with self._counting:
            self._tries[key] += 1
            number = self._tries[key]
        return _draw(self.settings.seed, f"failure {number}", content) < self.settings.failure_rate


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer  # pyright: ignore[reportIncompatibleVariableOverride]  # what typeshed's base has is wider
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body leave in one packet
    timeout = 60

    def do_GET(self) -> None:
        match self.path.removeprefix("/v1"):
            case "/health":
                self._send(200, {"status": "ok"})
            case "/stats":
                self._send(200, self.server.stats())
            case "/models":
                self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "judges"}]})
            case _:
                self._send(404, _error("no such path"))

    def do_POST(self) -> None:
        length = self.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > MAX_REQUEST_BYTES:
            self.close_connection = True
            self._send(413, _error(f"expected a Content-Length of at most {MAX_REQUEST_BYTES}"))
            return
        body = self.rfile.read(int(length))
        if self.path.removeprefix("/v1") != "/chat/completions":
            self._send(404, _error("no such path"))
            return
        try:
            prompt = json.loads(body)["messages"][-1]["content"]
            if not isinstance(prompt, str):
                raise TypeError("content is not text")
        except (ValueError, KeyError, IndexError, TypeError) as exc:
            self._send(400, _error(f"not a chat completion request: {type(exc).__name__}"))
            return
        time.sleep(self.server.settings.delay_s)
        self._send(*self.server.answer(prompt))

    def _send(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()
        except ConnectionError:
            self.close_connection = True  # whoever asked has left

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the one line on stdout is the URL."""


@contextmanager
def serve(
    *, port: int = 0, error_rate: float = 0.0, failure_rate: float = 0.0, delay_s: float = 0.0, seed: int = 0
) -> Iterator[DemoServer]:
    """A demo judge in a thread, for as long as the block runs; `.url` is its base URL."""
    settings = DemoSettings(error_rate=error_rate, failure_rate=failure_rate, delay_s=delay_s, seed=seed)
    with DemoServer(port=port, settings=settings) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m judges.demo_server", description=__doc__)
    parser.add_argument("--port", type=int, default=8008, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--error-rate", type=_rate, default=0.05, help="share of flipped verdicts (default: %(default)s)"
    )
    parser.add_argument("--failure-rate", type=_rate, default=0.0, help="share of tries answered 503")
    parser.add_argument("--delay-s", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--seed", type=int, default=0, help="draws other errors and failures")
    options = vars(parser.parse_args(arguments))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with serve(**options) as server:
        print(server.url, flush=True)
        stop.wait()
    return 0


def _rate(text: str) -> float:
    rate = float(text)
    if not 0.0 <= rate <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not a rate between 0 and 1")
    return rate


def _draw(seed: int, what: str, content: str) -> float:
    """A number in [0, 1), the same for the same content."""
    digest = hashlib.sha256(f"{seed}\n{what}\n{content}".encode()).digest()
    return int.from_bytes(digest[:7]) / (1 << 56)


def _completion(text: str, *, num_prompt_words: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    num_words = len(text.split())
    return {
        "id": "chatcmpl-demo",
        "object": "chat.completion",
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        # words, for want of a tokenizer
        "usage": {
            "prompt_tokens": num_prompt_words,
            "completion_tokens": num_words,
            "total_tokens": num_prompt_words + num_words,
        },
    }


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "demo_judge"}}


if __name__ == "__main__":
    raise SystemExit(main())
