"""Ctrl-C and SIGTERM as something that a loop looks at between its steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_HEARD = b"\nfinishing the current step or evaluation, then saving; press Ctrl-C again to stop at once\n"


@contextmanager
def interruptions() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, with a line on stderr at once. A second Ctrl-C raises KeyboardInterrupt."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals belong to the main thread
        return

    def on_signal(number: int, _: object) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not event.is_set():
            event.set()
            with contextlib.suppress(OSError):  # stderr may be closed
                os.write(2, _HEARD)  # sys.stderr may be in the middle of a write, and then refuses a second one

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
