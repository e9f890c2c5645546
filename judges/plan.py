"""What judging will take before anything is asked: calls, tokens, money and minutes. No network, no secrets.

Every call is counted once: retries and twins come on top of it; cached verdicts and equal completions go off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from judges.config import EndpointConfig, JudgeConfig
from judges.modes import build_mode
from judges.modes.base import Question
from judges.prompts import Rubric, render_comparison, render_prompt
from judges.types import JudgeRequest

CHARS_PER_TOKEN = 3.0
"""Of a prompt: fewer than most texts have, so that tokens are rather estimated too high."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one or more batches ask of one endpoint."""

    endpoint: EndpointConfig
    """Who is asked."""
    calls: float
    """Made."""
    prompt_tokens: float
    """Estimated."""
    reply_tokens: float
    """Assumed."""
    cost: float | None
    """Money by these estimates; None without a price."""
    cost_at_most: float | None
    """Money if every byte of a prompt is a token and every reply as long as it may be: what a budget sets aside."""
    seconds: float
    """At the endpoint's rates, the pool's concurrency and the assumed latency, whichever is slowest."""
    busy_seconds: float
    """The same without rounding calls up to whole rounds: what several judges at one endpoint add up to."""
    bound_by: str
    """Which of them that is: "requests_per_minute", "tokens_per_minute" or "concurrency"."""


def plan_batches(
    config: JudgeConfig,
    rubric: Rubric,
    batches: Sequence[Sequence[JudgeRequest]],
    *,
    latency_s: float,
    reply_tokens: int,
) -> list[Load]:
    """What these batches ask of each endpoint that is asked: all of an ensemble's, else the first.

    Args:
        config: the judge's.
        rubric: the judge's.
        batches: each what the pool is given at once: the completions of one prompt.
        latency_s: assumed for one call.
        reply_tokens: assumed for what is said of one completion; never more than the config allows.
    """
    mode = build_mode(config.mode, config.scale)
    questions = [question for batch in batches for question in dict.fromkeys(mode.questions(batch))]
    prompts = [_prompt_text(config, rubric, question) for question in questions]
    num_texts = sum(len(question.completions) for question in questions)
    prompt_tokens = sum(math.ceil(len(prompt) / CHARS_PER_TOKEN) for prompt in prompts)
    asked = config.endpoints if config.ensemble else config.endpoints[:1]
    loads: list[Load] = []
    for endpoint in asked:
        assumed = num_texts * min(reply_tokens, config.max_tokens)
        cost = cost_at_most = None
        if endpoint.price is not None:
            cost = endpoint.price.cost(prompt_tokens=prompt_tokens, completion_tokens=assumed)
            cost_at_most = endpoint.price.cost(
                prompt_tokens=sum(len(prompt.encode("utf-8", "replace")) + 64 for prompt in prompts),
                completion_tokens=num_texts * config.max_tokens,
            )
        times = _times(config, endpoint, len(questions), prompt_tokens + assumed, latency_s)
        bound_by = max(times, key=lambda name: times[name][0])
        loads.append(
            Load(
                endpoint=endpoint,
                calls=len(questions),
                prompt_tokens=prompt_tokens,
                reply_tokens=assumed,
                cost=cost,
                cost_at_most=cost_at_most,
                seconds=times[bound_by][0],
                busy_seconds=max(busy for _, busy in times.values()),
                bound_by=bound_by,
            )
        )
    return loads


def most_in_flight(config: JudgeConfig, endpoint: EndpointConfig) -> int:
    """Calls in flight at an endpoint, once adaptive concurrency has found its way up."""
    bound = config.concurrency if isinstance(config.concurrency, int) else config.concurrency.maximum
    return min(bound, endpoint.max_concurrency or bound)


def _times(
    config: JudgeConfig, endpoint: EndpointConfig, calls: int, tokens: float, latency_s: float
) -> dict[str, tuple[float, float]]:
    """By what bounds it: seconds, and seconds that the endpoint is busy."""
    rounds = calls / most_in_flight(config, endpoint)
    times = {"concurrency": (math.ceil(rounds) * latency_s, rounds * latency_s)}
    if endpoint.requests_per_minute:
        seconds = calls / endpoint.requests_per_minute * 60
        times["requests_per_minute"] = (seconds, seconds)
    if endpoint.tokens_per_minute:
        seconds = tokens / endpoint.tokens_per_minute * 60
        times["tokens_per_minute"] = (seconds, seconds)
    return times


def _prompt_text(config: JudgeConfig, rubric: Rubric, question: Question) -> str:
    requests = question.as_requests()
    low, high, most = config.scale.low, config.scale.high, config.max_input_chars
    if question.mode == "pointwise":
        return render_prompt(rubric, requests[0], low=low, high=high, max_input_chars=most).text
    return render_comparison(rubric, requests, mode=question.mode, low=low, high=high, max_input_chars=most).text
