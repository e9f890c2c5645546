"""Endpoint -> client: the built-in dialects, and judges of one's own by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from judges.clients.base import JudgeClient
from judges.config import EndpointConfig
from judges.dialects import build_client
from judges.errors import JudgeConfigError

OWN = """
class Mine:
    def __init__(self, endpoint=None, *, timeout_s=1.0):
        self.endpoint = endpoint
    async def complete(self, request): ...
    async def aclose(self): ...

def simple():
    return Mine()

ready = Mine()
number = 3
def broken(endpoint, *, timeout_s):
    raise ValueError("no weights")
def nothing():
    return object()
"""


def make_endpoint(dialect: str) -> EndpointConfig:
    return EndpointConfig(url="http://127.0.0.1:9/v1", model="m", dialect=dialect)


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_judge.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_judge"


@pytest.mark.parametrize("dialect", ["openai_chat", "anthropic_messages"])
def test_the_built_in_dialects_need_no_network_to_be_built(dialect: str) -> None:
    assert isinstance(build_client(make_endpoint(dialect), timeout_s=5.0), JudgeClient)


@pytest.mark.parametrize("name", ["Mine", "simple", "ready"])
def test_a_class_a_function_and_a_ready_client_are_taken(name: str, own_module: str) -> None:
    assert isinstance(build_client(make_endpoint(f"{own_module}:{name}"), timeout_s=5.0), JudgeClient)


@pytest.mark.parametrize(
    ("dialect", "problem"),
    [
        ("own_judge:number", "is a int"),
        ("own_judge:broken", "no weights"),
        ("own_judge:nothing", "no complete"),
        ("own_judge:absent", "cannot be imported"),
        ("no_such_module:x", "cannot be imported"),
        ("klingon", "there is no dialect"),
    ],
)
def test_a_name_that_leads_nowhere_is_named(dialect: str, problem: str, own_module: str) -> None:
    with pytest.raises(JudgeConfigError, match=problem):
        build_client(make_endpoint(dialect), timeout_s=5.0)
