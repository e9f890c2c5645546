"""A key that a server echoes, in whatever spelling, goes no further."""

from __future__ import annotations

import base64
import html
import json
import logging
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from judges.clients.redaction import HTTP_LOGGERS, Redactor

KEY = 'sk-a/b+c"<&\\d=='


@pytest.mark.parametrize(
    "spelling",
    [
        KEY,
        json.dumps({"message": KEY}),
        json.dumps(KEY).replace("/", "\\/"),
        quote(KEY, safe=""),
        html.escape(KEY),
        base64.b64encode(KEY.encode()).decode(),
    ],
)
def test_no_spelling_of_the_key_is_left(spelling: str) -> None:
    redacted = Redactor(SecretStr(KEY)).redacted(f"bad key {spelling}, sorry")
    assert "[key]" in redacted
    assert "sk-a" not in redacted
    assert redacted.startswith("bad key ")
    assert redacted.endswith(", sorry")


def test_no_key_or_one_that_guards_nothing_leaves_the_text_alone() -> None:
    assert Redactor(None).redacted("EMPTY words") == "EMPTY words"
    assert Redactor(SecretStr("EMPTY")).redacted("EMPTY words") == "EMPTY words"


def test_what_the_http_libraries_log_is_redacted_while_a_client_is_open(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    redactor = Redactor(SecretStr(KEY))
    before = [list(logging.getLogger(name).filters) for name in HTTP_LOGGERS]
    redactor.attach()
    for name in HTTP_LOGGERS:
        logging.getLogger(name).debug("headers=%s", KEY)
    redactor.detach()
    redactor.detach()
    assert KEY not in caplog.text
    assert caplog.text.count("headers=[key]") == len(HTTP_LOGGERS)
    assert [logging.getLogger(name).filters for name in HTTP_LOGGERS] == before
