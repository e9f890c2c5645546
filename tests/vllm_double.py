"""A vLLM server as far as HTTP shows one, on a loopback port: no vLLM and no model, and it misbehaves on demand.

`with VllmDouble(facts) as server:` answers as `python -m grpo.rollout.vllm_serve` does. A completion's tokens follow
from the request's seed and its log-probabilities from the weights that were synced, so that a server which keeps old
ones gives itself away. `server.instead[path] = function of an Exchange` replaces an answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import select
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from safetensors.torch import load_file

from grpo.rollout.vllm_facts import ServerFacts
from grpo.rollout.vllm_sync import Checksum

ADAPTER = "grpo-policy"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as it came."""

    path: str
    """Without its query."""
    query: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: Any


class Exchange:
    """A request that waits for its answer."""

    def __init__(self, handler: BaseHTTPRequestHandler, asked: Asked, server: VllmDouble) -> None:
        self.asked, self.server, self._handler = asked, server, handler

    def reply(self, status: int, body: Any, **headers: str) -> None:
        """Bytes as they are, all else as JSON. Header names have underscores for hyphens."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._handler.send_response_only(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self._handler.send_header(name.replace("_", "-"), value)
        self._handler.end_headers()
        self._handler.wfile.write(content)

    def usual(self) -> None:
        """What a good server answers."""
        self.server.answer(self)

    def half(self) -> None:
        """The first bytes of a longer answer, and then nothing."""
        self._handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices"')
        self._handler.close_connection = True

    def reset(self) -> None:
        """Break the connection off."""
        connection = self._handler.connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
        self._handler.close_connection = True

    def wait(self, limit_s: float) -> bool:
        """Until then, or until the client has left or the server is closed; whether it is still wanted."""
        for _ in range(int(limit_s / 0.005) + 1):
            if self.server.closing.wait(0.005):
                return False
            readable, _, _ = select.select([self._handler.connection], [], [], 0)
            if readable and not self._handler.connection.recv(1, socket.MSG_PEEK):
                return False
        return True


class VllmDouble:
    """Owns a port, and what was asked of it."""

    def __init__(self, facts: ServerFacts, *, key: str | None = None, delay_s: float = 0.0) -> None:
        """Args: key: that requests to /v1 must bring. delay_s: for each completion."""
        self.facts, self.key, self.delay_s = dataclasses.asdict(facts), key, delay_s
        self.vllm_version = "0.32.0"
        self.ignores_weights = False
        """It reports each sync as taken, and samples from the first."""
        self.instead: dict[str, Callable[[Exchange], None]] = {}
        """Path, or an rpc's method -> what answers it."""
        self.asked: list[Asked] = []
        self.weights: dict[str, Any] = {"version": None, "checksum": "0" * 32}
        self.sampled_from = ""
        self.has_adapter = False
        self.is_paused = False
        self.num_running = self.most_running = self.num_left = 0
        """Completions now; the most at once; those whose client left."""
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._port = 0
        self._open()

    def __enter__(self) -> VllmDouble:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def paths(self) -> list[str]:
        """What was asked for, in order; a worker's method stands for its rpc."""
        return [_name(asked) for asked in self.asked]

    def rows(self) -> list[Any]:
        """The bodies of all requests for completions."""
        return [asked.body for asked in self.asked if asked.path == "/v1/completions"]

    def kill(self) -> None:
        """The port is closed and every connection broken. May be called twice."""
        if self.closing.is_set():
            return
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # the client was first
                    connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def start_anew(self) -> None:
        """As another process on the same port, which knows nothing of any sync."""
        self.kill()
        self.closing.clear()
        self.weights = {"version": None, "checksum": "0" * 32}
        self.sampled_from, self.has_adapter, self.is_paused = "", False, False
        self._open()

    def answer(self, exchange: Exchange) -> None:
        """As a good server does."""
        asked = exchange.asked
        if (
            self.key is not None
            and asked.path.startswith("/v1")
            and (asked.headers.get("authorization") != f"Bearer {self.key}")
        ):
            exchange.reply(401, {"error": "Unauthorized"})
        elif asked.path == "/version":
            exchange.reply(200, {"version": self.vllm_version})
        elif asked.path == "/v1/models":
            exchange.reply(200, {"data": [{"id": "model"}]})
        elif asked.path in ("/pause", "/resume"):
            self.is_paused = asked.path == "/pause"
            exchange.reply(200, {"status": "done"})
        elif asked.path == "/reset_prefix_cache":
            exchange.reply(200, {"success": True})
        elif asked.path == "/v1/load_lora_adapter":
            known, self.has_adapter = self.has_adapter, True
            exchange.reply(400, {"error": "it has already been loaded"}) if known else exchange.reply(200, b"Success")
        elif asked.path == "/collective_rpc":
            exchange.reply(200, {"results": [self._rpc(asked.body["method"], asked.body["kwargs"])]})
        elif asked.path == "/v1/completions":
            self._complete(exchange)
        else:
            exchange.reply(404, {"detail": "Not Found"})

    def _open(self) -> None:
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer's body waits 40 ms for the client to confirm its head

            def setup(self) -> None:
                super().setup()
                with double._lock:
                    double._connections.add(self.connection)

            def finish(self) -> None:
                with double._lock:
                    double._connections.discard(self.connection)
                super().finish()

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # the client has left, or the server is killed
                    super().handle()

            def do_GET(self) -> None:
                self._take(None)

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._take(json.loads(content) if content else None)

            def _take(self, body: Any) -> None:
                path, _, query = self.path.partition("?")
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(path=path, query=query, headers=headers, body=body)
                with double._lock:
                    double.asked.append(asked)
                exchange = Exchange(self, asked, double)
                double.instead.get(_name(asked), Exchange.usual)(exchange)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, request: Any, client_address: Any) -> None:
                if not double.closing.is_set():
                    super().handle_error(request, client_address)

        self._http = Listener(("127.0.0.1", self._port), Handler)
        self._port = self._http.server_address[1]
        self._thread = threading.Thread(target=lambda: self._http.serve_forever(poll_interval=0.01))
        self._thread.start()

    def _rpc(self, method: str, arguments: Mapping[str, Any]) -> Any:
        """A worker's answer as /collective_rpc gives it: numbers and sets as text."""
        if method == "grpo_facts":
            return self.facts
        if method == "grpo_weight_version":
            version = self.weights["version"]
            return None if version is None else str(version)
        if method == "list_loras":
            return [1]
        if method == "grpo_check_base_file":
            return str(len(load_file(arguments["path"])))
        assert method in ("grpo_load_weights_file", "grpo_load_adapter_file"), method
        assert self.is_paused
        checksum = Checksum()
        num_checked = len(list(checksum.counted(load_file(arguments["path"]).items())))
        self.weights = {"version": arguments["version"], "checksum": checksum.value()}
        if not (self.ignores_weights and self.sampled_from):
            self.sampled_from = checksum.value()
        return {**self.weights, "num_checked": num_checked}

    def _complete(self, exchange: Exchange) -> None:
        body = exchange.asked.body
        if body.get("model") == ADAPTER and not self.has_adapter:
            exchange.reply(404, {"error": "The model does not exist."})
            return
        with self._lock:
            self.num_running += 1
            self.most_running = max(self.most_running, self.num_running)
        is_wanted = not self.delay_s or exchange.wait(self.delay_s)
        with self._lock:
            self.num_running -= 1
            self.num_left += not is_wanted
        if is_wanted:
            exchange.reply(200, completion(body, sampled_from=self.sampled_from))


def completion(body: Mapping[str, Any], *, sampled_from: str = "") -> dict[str, Any]:
    """The answer to a request: tokens from its seed, log-probabilities from the weights' checksum."""
    draw = random.Random(body["seed"])
    tokens: list[int] = []
    while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in body["stop_token_ids"]):
        tokens.append(body["stop_token_ids"][0] if draw.random() < 0.1 else draw.randrange(100, 200))
    has_ended = tokens[-1] in body["stop_token_ids"]
    shift = int(sampled_from[:6] or "0", 16) / 16**6
    choice = {
        "token_ids": tokens,
        "prompt_token_ids": body["prompt"],
        "logprobs": {"token_logprobs": [-1.0 - shift] * len(tokens)},
        "finish_reason": "stop" if has_ended else "length",
    }
    return {"choices": [choice]}


def _name(asked: Asked) -> str:
    return asked.body["method"] if asked.path == "/collective_rpc" else asked.path
