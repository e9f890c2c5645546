"""A judge's settings, checked. Secrets are named here (`env:NAME`), never held: they are read when they are needed."""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from judges.errors import JudgeConfigError

ENV_REFERENCE = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")
HEADER_SAFE = re.compile(r"[\x21-\x7e]+")


class StrictModel(BaseModel):
    """Unknown keys are errors, values are not converted, and a rejected value is not shown: it may be a secret."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True, allow_inf_nan=False)


class EndpointConfig(StrictModel):
    """Where a judge lives: any server that speaks OpenAI's chat completions."""

    url: str
    """Base URL up to /v1, or env:NAME. Off this machine it must be https."""
    model: str = Field(min_length=1)
    """The model's name, as the server knows it."""
    api_key: str | None = None
    """env:NAME, and nothing else; None sends no key."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        if url.startswith("env:"):
            _env_name(url, key="endpoint.url")
            return url
        return checked_url(url)

    @field_validator("api_key")
    @classmethod
    def _check_api_key(cls, api_key: str | None) -> str | None:
        if api_key is not None:
            _env_name(api_key, key="endpoint.api_key")
        return api_key

    def resolve_url(self) -> str:
        """The URL to call, without a slash at its end.

        Raises:
            JudgeConfigError: env:NAME is not set, or names a URL that may not be called.
        """
        if not self.url.startswith("env:"):
            return self.url.rstrip("/")
        name = self.url.removeprefix("env:")
        try:
            return checked_url(_from_environment(name, key="endpoint.url")).rstrip("/")
        except ValueError as exc:
            raise JudgeConfigError(f"environment variable {name}: {exc}") from None

    def resolve_api_key(self) -> SecretStr | None:
        """The key, wrapped so that it shows nowhere.

        Raises:
            JudgeConfigError: env:NAME is not set, or cannot be sent in a header. The value is not shown.
        """
        if self.api_key is None:
            return None
        name = self.api_key.removeprefix("env:")
        value = _from_environment(name, key="endpoint.api_key").strip()
        if not HEADER_SAFE.fullmatch(value):
            raise JudgeConfigError(
                f"environment variable {name} (endpoint.api_key) cannot be sent in an HTTP header: "
                "expected printable ASCII without spaces. Set it anew."
            )
        return SecretStr(value)


class ScaleConfig(StrictModel):
    """The numbers a verdict may have; one outside is invalid, never clipped."""

    low: float = 0.0
    """The worst score."""
    high: float = 1.0
    """The best score."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"scale.low is {self.low} and scale.high {self.high}; expected low < high")
        return self


class JudgeConfig(StrictModel):
    """One judge: whom to ask, what to ask, and how long to try."""

    endpoint: EndpointConfig
    """Where the judge lives."""
    rubric: str = Field(min_length=1)
    """A built-in rubric's name ("fairness", "grounding"), or a path to a template (has a "/" or ends in .txt)."""
    concurrency: int = Field(8, ge=1, le=1024)
    """Calls in flight at a time."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds for one try, from connecting to the last byte."""
    deadline_s: float = Field(120.0, gt=0)
    """Seconds for one batch, waiting and retries included; what is not judged by then is Failed("deadline")."""
    attempts: int = Field(4, ge=1, le=20)
    """Tries while the judge is unreachable or overloaded. An invalid verdict has one more try of its own."""
    backoff_s: float = Field(0.5, gt=0, le=20)
    """Longest wait before the second try; doubles with each. The wait is drawn between 0 and that (full jitter)."""
    max_tokens: int = Field(512, ge=1)
    """Most tokens of a reply."""
    temperature: float | None = Field(None, ge=0)
    """None is not sent; some models take none."""
    seed: int | None = None
    """None is not sent."""
    max_input_chars: int = Field(8000, ge=200)
    """A question, reference or completion longer than this loses its middle, with a mark where it was cut."""
    scale: ScaleConfig = ScaleConfig()
    """The numbers a verdict may have."""


def checked_url(url: str) -> str:
    """The URL, if it may be called.

    Raises:
        ValueError: not http(s), http to another machine, or with credentials, query or fragment inside.
    """
    parts = urlsplit(url)
    try:
        host, _ = parts.hostname, parts.port  # .port raises on nonsense
    except ValueError as exc:
        raise ValueError(f"endpoint.url is not a URL: {exc}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("endpoint.url must look like https://host/v1 or http://127.0.0.1:8000/v1, or be env:NAME")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError("endpoint.url must not hold credentials, a query or a fragment; name the key in api_key")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError(f"endpoint.url is http to {host}, which is not this machine; expected https")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _env_name(value: str, *, key: str) -> str:
    match = ENV_REFERENCE.fullmatch(value)
    if not match:
        raise ValueError(f"{key} must be env:NAME, the name of an environment variable that holds it")
    return match[1]


def _from_environment(name: str, *, key: str) -> str:
    value = os.environ.get(name, "").strip()
    if not value:
        raise JudgeConfigError(f"{key} is env:{name}, but the environment variable {name} is not set. Set it.")
    return value
