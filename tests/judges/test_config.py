"""A judge's settings: what is refused, and where secrets may stand."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from judges.config import EndpointConfig, JudgeConfig, ScaleConfig
from judges.errors import JudgeConfigError

SECRET = "sk-planted-secret-0001"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000/v1",
        "http://localhost:1/v1",
        "http://[::1]:8000/v1",
        "https://judge.example/v1",
        "env:JUDGE_URL",
    ],
)
def test_https_anywhere_and_http_on_this_machine_are_taken(url: str) -> None:
    assert EndpointConfig(url=url, model="m").url == url


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://judge.example/v1", "expected https"),
        ("http://127.0.0.1.evil.example/v1", "expected https"),
        ("http://10.0.0.7:8000/v1", "expected https"),
        ("ftp://127.0.0.1/v1", "must look like"),
        ("judge.example", "must look like"),
        ("https://user:pw@judge.example/v1", "must not hold credentials"),
        ("https://judge.example/v1?key=1", "must not hold credentials"),
        ("https://judge.example:port/v1", "not a URL"),
        ("env:not a name", "env:NAME"),
    ],
)
def test_a_url_that_may_not_be_called_is_refused(url: str, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        EndpointConfig(url=url, model="m")


def test_a_literal_key_is_refused_and_not_shown() -> None:
    raw = {"endpoint": {"url": "https://judge.example/v1", "model": "m", "api_key": SECRET}, "rubric": "fairness"}
    with pytest.raises(ValidationError, match="env:NAME") as caught:
        JudgeConfig.model_validate(raw)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)


def test_the_key_is_read_late_and_shows_in_no_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = EndpointConfig(url="https://judge.example/v1", model="m", api_key="env:TEST_JUDGE_KEY")
    monkeypatch.setenv("TEST_JUDGE_KEY", SECRET)
    key = endpoint.resolve_api_key()
    assert key is not None
    assert key.get_secret_value() == SECRET
    assert SECRET not in repr(key) + str(key) + repr(endpoint) + endpoint.model_dump_json()


def test_a_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_JUDGE_NONE", raising=False)
    endpoint = EndpointConfig(url="env:TEST_JUDGE_NONE", model="m", api_key="env:TEST_JUDGE_NONE")
    with pytest.raises(JudgeConfigError, match="TEST_JUDGE_NONE is not set"):
        endpoint.resolve_url()
    with pytest.raises(JudgeConfigError, match="TEST_JUDGE_NONE is not set"):
        endpoint.resolve_api_key()


def test_a_key_that_fits_no_header_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", f"{SECRET}\nX-Evil: 1")
    endpoint = EndpointConfig(url="https://judge.example/v1", model="m", api_key="env:TEST_JUDGE_KEY")
    with pytest.raises(JudgeConfigError, match="TEST_JUDGE_KEY") as caught:
        endpoint.resolve_api_key()
    assert SECRET not in str(caught.value)


def test_a_url_from_the_environment_is_checked_like_one_in_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = EndpointConfig(url="env:TEST_JUDGE_URL", model="m")
    monkeypatch.setenv("TEST_JUDGE_URL", "http://127.0.0.1:9/v1/")
    assert endpoint.resolve_url() == "http://127.0.0.1:9/v1"
    monkeypatch.setenv("TEST_JUDGE_URL", "http://judge.example/v1")
    with pytest.raises(JudgeConfigError, match="expected https"):
        endpoint.resolve_url()


@pytest.mark.parametrize(
    "extra",
    [{"retries": 3}, {"attempts": 0}, {"timeout_s": "30"}, {"deadline_s": float("inf")}, {"concurrency": True}],
)
def test_unknown_keys_wrong_kinds_and_values_out_of_bounds_are_refused(extra: dict[str, object]) -> None:
    raw = {"endpoint": {"url": "https://judge.example/v1", "model": "m"}, "rubric": "fairness", **extra}
    with pytest.raises(ValidationError):
        JudgeConfig.model_validate(raw)


def test_a_scale_must_rise() -> None:
    with pytest.raises(ValidationError, match="expected low < high"):
        ScaleConfig(low=1.0, high=1.0)


def test_importing_judges_imports_neither_httpx_nor_torch_nor_the_layers_above() -> None:
    code = "import sys, judges, judges.demo_server; print({'httpx', 'torch', 'rewards', 'grpo'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


def make_raw(**extra: object) -> dict[str, object]:
    return {"endpoint": {"url": "https://judge.example/v1", "model": "m"}, "rubric": "fairness", **extra}


def test_one_endpoint_and_a_bare_mode_are_short_for_the_long_forms() -> None:
    short = JudgeConfig.model_validate(make_raw(mode="groupwise"))
    long = JudgeConfig.model_validate(
        {
            "endpoints": [{"url": "https://judge.example/v1", "model": "m"}],
            "rubric": "fairness",
            "mode": {"type": "groupwise", "permutations": 2},
        }
    )
    assert short == long


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"endpoints": []}, "both given"),
        ({"mode": "duel"}, "pointwise"),
        ({"concurrency": 0}, "expected 1 to 1024"),
        ({"concurrency": {"start": 100}}, "expected 1 .minimum. to 64"),
        ({"ensemble": {"quorum": 2}}, "only 1 endpoints"),
        ({"budget": {"per_run": 1.0}}, "give price"),
        ({"on_completion_fault": "penalise"}, "mask"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(extra: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        JudgeConfig.model_validate(make_raw(**extra))


def test_what_a_completions_fault_costs_has_no_default() -> None:
    assert JudgeConfig.model_validate(make_raw()).on_completion_fault is None


def test_two_endpoints_of_one_model_need_names() -> None:
    endpoint = {"url": "https://judge.example/v1", "model": "m"}
    with pytest.raises(ValidationError, match="give each a name"):
        JudgeConfig.model_validate({"endpoints": [endpoint, endpoint], "rubric": "fairness"})
    named = [endpoint | {"name": name} for name in "ab"]
    assert len(JudgeConfig.model_validate({"endpoints": named, "rubric": "fairness"}).endpoints) == 2
