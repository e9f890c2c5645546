"""An endpoint's key, kept out of every text that leaves a client. Knows nothing of HTTP."""

from __future__ import annotations

import base64
import html
import json
import logging
from urllib.parse import quote

from pydantic import SecretStr

MIN_SECRET_CHARS = 8
"""A shorter key ("EMPTY", for a local server) guards nothing, and taking it out would maul the text."""
MARK = "[key]"
HTTP_LOGGERS = ("httpx", "httpcore.connection", "httpcore.http11")


class Redactor:
    """Takes one key out of texts, and out of what the HTTP libraries log while it is attached.

    Use: `redactor.attach()` before the first call, `redactor.redacted(text)` on all that a server says,
    `redactor.detach()` at the end.
    """

    def __init__(self, key: SecretStr | None) -> None:
        self._key = key
        self._filter = _LogFilter(self)

    def redacted(self, text: str) -> str:
        """The text without the key, in any spelling that a server is likely to echo."""
        for spelling in self._spellings():
            text = text.replace(spelling, MARK)
        return text

    def attach(self) -> None:
        """Filter what the HTTP libraries log: at level DEBUG they log an answer's headers."""
        for name in HTTP_LOGGERS:
            logging.getLogger(name).addFilter(self._filter)

    def detach(self) -> None:
        """Stop filtering. May be called twice."""
        for name in HTTP_LOGGERS:
            logging.getLogger(name).removeFilter(self._filter)

    def _spellings(self) -> list[str]:
        """Longest first, so that no part of a longer one stays."""
        key = self._key.get_secret_value() if self._key else ""
        if len(key) < MIN_SECRET_CHARS:
            return []
        in_json = json.dumps(key)[1:-1]
        basic = base64.b64encode(key.encode()).decode()
        spellings = {key, in_json, in_json.replace("/", "\\/"), quote(key, safe=""), html.escape(key), basic}
        return sorted(spellings, key=len, reverse=True)


class _LogFilter(logging.Filter):
    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self._redactor = redactor

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._redactor.redacted(record.getMessage()), ()
        return True
