"""A judge's server to measure with, in a process of its own: seeded latencies, and faults on demand.

`python benchmarks/judge_load/server.py` prints its base URL and serves until it is ended. A request is known by what is
judged, not by its nonce, so that a second call for a verdict that was delivered is seen. `GET /v1/log` tells how every
call of every request went.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from judges.prompts import read_fences

MODEL = "measured-judge"
Fault: TypeAlias = Literal["429", "500", "reset", "reset_in_body", "wrong_code", "out_of_scale", "no_json"]
FAULTS: tuple[Fault, ...] = get_args(Fault)


def draw(seed: int, what: str, identity: str) -> float:
    """A number in [0, 1), the same for the same request."""
    digest = hashlib.sha256(f"{seed}\n{what}\n{identity}".encode()).digest()
    return int.from_bytes(digest[:6]) / (1 << 48)


def latency_s(seed: int, identity: str, *, low_s: float, high_s: float) -> float:
    """Seconds that the judge thinks about a request, on every try."""
    return low_s + (high_s - low_s) * draw(seed, "latency", identity)


def score_of(seed: int, identity: str) -> float:
    """The verdict on a request."""
    return round(draw(seed, "score", identity), 6)


def identity_of(fences: Mapping[str, str]) -> str:
    """What is judged, without the nonce."""
    return f"{fences['question']}\n{fences['completion']}"


@dataclass(slots=True)
class MeasuredJudge:
    """Owns what it was asked and how it answered."""

    seed: int
    low_s: float
    high_s: float
    fault_rate: float
    slots: int
    """Calls that it takes at a time; more are answered with 429 at once. 0: any number."""
    log: dict[str, list[str]] = field(default_factory=dict)
    """Request -> how each of its calls ended: "verdict", or the fault."""
    num_in_flight: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, as long as it lasts."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                lengths = [line[15:] for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
                body = await reader.readexactly(int(lengths[0]) if lengths else 0)
                if head.startswith(b"get /v1/log"):
                    await self._send(writer, 200, self.log)
                elif head.startswith(b"get"):
                    await self._send(writer, 200, {"data": [{"id": MODEL}]})
                else:
                    await self._judge(writer, json.loads(body)["messages"][-1]["content"])
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # whoever asked has left
        finally:
            writer.close()

    async def _judge(self, writer: asyncio.StreamWriter, prompt: str) -> None:
        nonce, fences = read_fences(prompt)
        identity = identity_of(fences)
        calls = self.log.setdefault(identity, [])
        if self.slots and self.num_in_flight >= self.slots:
            calls.append("429")
            await self._send(writer, 429, {"error": {"message": "too many at a time"}})
            return
        number = len(calls)
        calls.append("in flight")
        self.num_in_flight += 1
        try:
            await asyncio.sleep(latency_s(self.seed, identity, low_s=self.low_s, high_s=self.high_s))
        finally:
            self.num_in_flight -= 1
        fault = self._fault(identity, number)
        calls[number] = fault or "verdict"
        score = score_of(self.seed, identity)
        match fault:
            case "429" | "500":
                await self._send(writer, int(fault), {"error": {"message": "on purpose"}})
            case "reset":
                _reset(writer)
            case "reset_in_body":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
                await writer.drain()
                _reset(writer)
            case "wrong_code":
                await self._say(writer, json.dumps({"nonce": "0" * 16, "reason": "", "score": score}))
            case "out_of_scale":
                await self._say(writer, json.dumps({"nonce": nonce, "reason": "", "score": 8}))
            case "no_json":
                await self._say(writer, "I would rather give it 8/10.")
            case None:
                await self._say(writer, json.dumps({"nonce": nonce, "reason": "", "score": score}))

    def _fault(self, identity: str, number: int) -> Fault | None:
        if draw(self.seed, f"fault {number}", identity) >= self.fault_rate:
            return None
        return FAULTS[int(draw(self.seed, f"kind {number}", identity) * len(FAULTS))]

    async def _say(self, writer: asyncio.StreamWriter, text: str) -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        await self._send(writer, 200, {"choices": [choice], "usage": {"prompt_tokens": 300, "completion_tokens": 30}})

    async def _send(self, writer: asyncio.StreamWriter, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST instead of an end."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    raise ConnectionResetError


async def run(judge: MeasuredJudge) -> None:
    """Serve until cancelled."""
    server = await asyncio.start_server(judge.serve, "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


def main() -> None:
    """Parse and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--low-s", type=float, default=0.05)
    parser.add_argument("--high-s", type=float, default=0.4)
    parser.add_argument("--fault-rate", type=float, default=0.0)
    parser.add_argument("--slots", type=int, default=0, help="calls taken at a time; 0: any number")
    arguments = parser.parse_args()
    asyncio.run(run(MeasuredJudge(**vars(arguments))))


if __name__ == "__main__":
    main()
