"""The child's side of `rewards.processes`: one function, called with JSON, until the parent hangs up.

Started as `python -P -m rewards.worker`. Messages are JSON over an inherited socket: what a completion made of this
process can hand its parent text, and nothing that runs.
"""

from __future__ import annotations

import functools
import importlib
import json
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

ORPHAN_GRACE_S = 5.0
"""The parent kills at the limit; this much later the kernel does, should the parent be gone."""


def main() -> None:
    """Serve until the parent closes its end, a call needs too much memory, or somebody kills us."""
    order = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")  # a completion that sympy compiles must not write to the user's terminal
    pipe = Connection(order["fd"])
    try:
        function = _prepared(order["function"], order["warm_up"])
        _limit_memory(order["memory_bytes"])
    except Exception as exc:  # noqa: BLE001  # the parent reports it
        _answer(pipe, {"failed": "start", "detail": _described(exc)})
        return
    _answer(pipe, {"ready": True})
    while True:
        try:
            args = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        # no handler: the kernel ends the process even where a C loop keeps the interpreter busy
        signal.setitimer(signal.ITIMER_REAL, order["timeout_s"] + ORPHAN_GRACE_S)
        reply = _reply(function, args)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _answer(pipe, reply)


def _prepared(path: str, warm_up: list[Any] | None) -> Callable[..., Any]:
    module_name, _, name = path.partition(":")
    function: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module_name))
    if warm_up is not None:
        function(*warm_up)
    return function


def _limit_memory(memory_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _reply(function: Callable[..., Any], args: list[Any]) -> dict[str, Any]:
    try:
        reply = {"value": function(*args)}
        json.dumps(reply)
    except MemoryError:
        return {"failed": "memory", "detail": "needs more memory than the limit"}
    except Exception as exc:  # noqa: BLE001  # the parent reports it as this call's outcome
        return {"failed": "raised", "detail": _described(exc)}
    return reply


def _answer(pipe: Connection, reply: dict[str, Any]) -> None:
    pipe.send_bytes(json.dumps(reply).encode())


def _described(exc: BaseException) -> str:
    try:
        message = str(exc)
    except Exception:  # noqa: BLE001  # some libraries' errors cannot be printed
        message = ""
    return f"{type(exc).__name__}: {message}"[:500] if message else type(exc).__name__


if __name__ == "__main__":
    main()
