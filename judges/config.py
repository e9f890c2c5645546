"""A judge's settings, checked. Secrets are named here (`env:NAME`), never held: they are read when they are needed."""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from judges.errors import JudgeConfigError

ENV_REFERENCE = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")
HEADER_SAFE = re.compile(r"[\x21-\x7e]+")


class StrictModel(BaseModel):
    """Unknown keys are errors, values are not converted, and a rejected value is not shown: it may be a secret."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True, allow_inf_nan=False)


class PriceConfig(StrictModel):
    """What an endpoint charges, in money per million tokens. Any currency, the same in a whole recipe."""

    input: float = Field(ge=0)
    """For the tokens read."""
    output: float = Field(ge=0)
    """For the tokens written."""

    def cost(self, *, prompt_tokens: int, completion_tokens: int) -> float:
        """Money for so many tokens."""
        return (self.input * prompt_tokens + self.output * completion_tokens) / 1e6


class EndpointConfig(StrictModel):
    """Where a judge lives, what it is called there, what it takes and what it costs."""

    url: str
    """Base URL up to /v1, or env:NAME. Off this machine it must be https."""
    model: str = Field(min_length=1)
    """The model's name, as the server knows it."""
    name: str | None = Field(default=None, min_length=1)
    """What metrics and the audit call it; None takes the model's name."""
    dialect: str = Field(default="openai_chat", min_length=1)
    """"openai_chat", "anthropic_messages", an entry point of group `grpo.judges`, or `package.module:name`."""
    api_key: str | None = None
    """env:NAME, and nothing else; None sends no key."""
    private_network: bool = False
    """The name may lead into a private network (10.x, 192.168.x, ...). Link-local and metadata addresses never."""
    ca_file: str | None = None
    """A PEM file with the authority that has signed the endpoint's certificate; None trusts the public authorities."""
    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the "openai_chat" dialect calls the reply's limit here; OpenAI's reasoning models take the second only."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """What the endpoint allows; None knows no limit but the 429s."""
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """What the endpoint allows, prompt and reply together."""
    max_concurrency: int | None = Field(default=None, ge=1, le=1024)
    """Most calls in flight here, whatever `concurrency` says."""
    price: PriceConfig | None = None
    """None knows no price: costs are then unknown, and a budget is refused."""
    structured: Literal["text", "json_schema", "auto"] = "text"
    """"json_schema" asks the server to hold the reply to a schema; "text" asks in words alone; "auto" asks for the
    schema until the server refuses one (400, 422) and answers without. All replies are checked alike."""
    temperature: float | None = Field(default=None, ge=0)
    """None is not sent; some models take none."""
    seed: int | None = None
    """None is not sent."""

    @property
    def label(self) -> str:
        """The endpoint's name, or its model's."""
        return self.name or self.model

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


class AdaptiveConcurrency(StrictModel):
    """Calls in flight, found out: doubles until the first 429, then x0.8 a spell of them and +5% a clean round."""

    start: int = Field(default=8, ge=1, le=1024)
    """Calls in flight at first."""
    minimum: int = Field(default=1, ge=1, le=1024)
    """Never fewer."""
    maximum: int = Field(default=64, ge=1, le=1024)
    """Never more."""
    cooldown_s: float = Field(default=15.0, ge=0)
    """After a cut, seconds in which further 429s belong to the same spell and successes count for nothing."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.minimum <= self.start <= self.maximum:
            raise ValueError(f"start is {self.start}; expected {self.minimum} (minimum) to {self.maximum} (maximum)")
        return self


class RetryBudgetConfig(StrictModel):
    """How many tries beyond the first an endpoint gets, so that an outage is not answered with a storm."""

    share: float = Field(default=0.2, ge=0, le=1)
    """Extra tries per first try, within the window: an outage adds at most so much load. Where a share f of all tries
    fails, f / (1 - f) are needed, which 0.2 covers up to f = 0.166 (0.1 would only up to 0.09). Beyond it, extra tries
    wait for the window."""
    floor: int = Field(default=10, ge=0)
    """Extra tries that the window always allows."""
    window_s: float = Field(default=60.0, gt=0)
    """Seconds looked back upon."""


class BreakerConfig(StrictModel):
    """When an endpoint is left alone for a while. 429s do not count: it is healthy, but busy."""

    failure_share: float = Field(default=0.5, gt=0, le=1)
    """Opens at this share of failures,"""
    min_calls: int = Field(default=10, ge=1)
    """among at least so many calls,"""
    window_s: float = Field(default=30.0, gt=0)
    """within so many seconds."""
    open_s: float = Field(default=5.0, gt=0)
    """Seconds until one call may probe it; doubles with each failed probe, up to eightfold."""


class HedgeConfig(StrictModel):
    """A twin for a call that is slower than most: the first answer counts, the other is cancelled."""

    quantile: float = Field(default=0.95, gt=0, lt=1)
    """The twin starts when the call has taken longer than this share of the endpoint's last 200."""
    min_calls: int = Field(default=20, ge=1)
    """Answered calls before the quantile is trusted."""


class EnsembleConfig(StrictModel):
    """Every endpoint is a judge of its own, and all are asked; without this, the endpoints stand in for each other."""

    quorum: int = Field(ge=1)
    """Judges that must give a verdict; with fewer, it is missing."""
    reduce: Literal["mean", "median", "min", "majority"] = "mean"
    """How the verdicts become one. "majority": what more than half of those who answered gave, else missing."""
    max_disagreement: float | None = Field(default=None, ge=0)
    """Largest standard deviation among the judges; above it the verdict is missing."""


class BudgetConfig(StrictModel):
    """Caps on money. At a cap nothing more is asked, and what is not judged has no verdict."""

    per_run: float | None = Field(default=None, gt=0)
    """For the whole run, resumed parts included."""
    per_step: float | None = Field(default=None, gt=0)
    """For one training step."""


class PointwiseMode(StrictModel):
    """One completion a call. For what can be judged by itself, against a reference above all."""

    type: Literal["pointwise"] = "pointwise"


class GroupwiseMode(StrictModel):
    """All completions of a prompt in one call, scored side by side. For open-ended answers."""

    type: Literal["groupwise"] = "groupwise"
    permutations: Literal[1, 2] = 2
    """Orders asked for; the second is the first reversed, and the scores are averaged."""
    completions_per_call: int = Field(default=16, ge=2)
    """A larger group is split over several calls; the first of its (shuffled) completions stands in all of them."""
    seed: int = 0
    """Shuffles the completions, together with their texts: the same group comes in the same order."""


class PairwiseMode(StrictModel):
    """Two completions a call, in both orders. A judge that contradicts itself has said "a tie"."""

    type: Literal["pairwise"] = "pairwise"
    opponents: int | None = Field(default=None, ge=1)
    """Completions that each is compared with, around a shuffled ring on each side; None compares all with all."""
    seed: int = 0
    """Shuffles the ring."""


ModeConfig = Annotated[PointwiseMode | GroupwiseMode | PairwiseMode, Field(discriminator="type")]


class Penalise(StrictModel):
    """A completion that makes a healthy judge fail gets this score. The recipe's decision, not the judge's verdict."""

    penalise: float
    """The score it gets, such as the scale's worst."""


class JudgeConfig(StrictModel):
    """One judge: whom to ask, what to ask, and how long to try."""

    endpoints: tuple[EndpointConfig, ...] = Field(min_length=1, strict=False)  # a list in YAML
    """Where the judge lives, in order of preference. A recipe with one may write `endpoint:` and leave the list out."""
    rubric: str = Field(min_length=1)
    """A built-in rubric's name ("fairness", "grounding"), or a path to a template (has a "/" or ends in .txt)."""
    mode: ModeConfig = PointwiseMode()
    """How many completions a call sees: pointwise, groupwise or pairwise; a bare name takes the mode's defaults."""
    concurrency: int | AdaptiveConcurrency = AdaptiveConcurrency()
    """Calls in flight at a time and endpoint: a number fixes them, `{start, minimum, maximum}` lets them adapt."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Seconds for one try, from connecting to the last byte."""
    deadline_s: float = Field(default=120.0, gt=0)
    """Seconds for one batch, waiting and retries included; what is not judged by then is Failed("deadline")."""
    attempts: int = Field(default=4, ge=1, le=20)
    """Tries while the judge is unreachable or overloaded. An invalid verdict has one more try of its own."""
    backoff_s: float = Field(default=0.5, gt=0, le=20)
    """Longest wait before the second try; doubles with each. The wait is drawn between 0 and that (full jitter)."""
    retry_budget: RetryBudgetConfig = RetryBudgetConfig()
    """Extra tries each endpoint gets, over all requests."""
    breaker: BreakerConfig = BreakerConfig()
    """When an endpoint is left alone."""
    hedge: HedgeConfig | None = None
    """None never sends a twin."""
    ensemble: EnsembleConfig | None = None
    """None asks one judge, and the next endpoint where the first cannot be had."""
    max_tokens: int = Field(default=512, ge=1)
    """Most tokens of a reply about one completion; calls about several have as many times that."""
    max_input_chars: int = Field(default=8000, ge=200)
    """A question, reference or completion longer than this loses its middle, with a mark where it was cut."""
    scale: ScaleConfig = ScaleConfig()
    """The numbers a verdict may have."""
    on_completion_fault: Literal["mask"] | Penalise | None = None
    """What a completion gets that makes a healthy judge fail (too long, refused), or that is blank, so that no judge is
    asked: `mask` leaves it without a verdict, `{penalise: -1}` gives it that score. Where the recipe does not choose,
    it has no verdict, and that is reported."""
    cache: str | None = Field(default=None, min_length=1)
    """File that keeps verdicts between runs; None keeps none."""
    budget: BudgetConfig | None = None
    """Caps on money; needs every endpoint's price."""

    @model_validator(mode="before")
    @classmethod
    def _expand_short_forms(cls, raw: Any) -> Any:
        """`endpoint: X` is `endpoints: [X]`, and `mode: groupwise` is `mode: {type: groupwise}`."""
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        if "endpoint" in raw and "endpoints" in raw:
            raise ValueError("endpoint and endpoints are both given; expected one of them")
        if "endpoint" in raw:
            raw["endpoints"] = [raw.pop("endpoint")]
        if isinstance(raw.get("mode"), str):
            raw["mode"] = {"type": raw["mode"]}
        return raw

    @field_validator("concurrency")
    @classmethod
    def _check_concurrency(cls, concurrency: int | AdaptiveConcurrency) -> int | AdaptiveConcurrency:
        if isinstance(concurrency, int) and not 1 <= concurrency <= 1024:
            raise ValueError(f"concurrency is {concurrency}; expected 1 to 1024")
        return concurrency

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        labels = [endpoint.label for endpoint in self.endpoints]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two endpoints are called the same among {labels}; give each a name")
        if self.ensemble and self.ensemble.quorum > len(self.endpoints):
            raise ValueError(
                f"ensemble.quorum is {self.ensemble.quorum}, but there are only {len(self.endpoints)} endpoints to ask"
            )
        unpriced = [endpoint.label for endpoint in self.endpoints if endpoint.price is None]
        if self.budget and unpriced:
            raise ValueError(f"budget needs a price for every endpoint, and {unpriced} have none; give price")
        return self


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
