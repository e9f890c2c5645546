"""The KL penalty: what one unlikely token does to it, and whether a beta is there that would answer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import mean

import torch

from grpo.config import FixedBetaConfig, RunConfig
from grpo.diagnostics.checks.subject import Subject
from grpo.diagnostics.findings import Finding
from grpo.update.kl import Estimator, kl_penalty

CHECK = "KL penalty"
RARE = 1 / 1000
"""Of its reference's probability: what a policy leaves of a token that it has turned away from."""
MOST_PULL = 10.0
"""A slope above this, beside 1 of a token under `clamped`, lets single tokens decide the KL's gradient."""


def check_penalty(subject: Subject) -> Iterator[Finding]:
    """The recipe's estimator on one token that has become rare, of as many as a step has."""
    lengths = [len(one.token_ids) for group in subject.groups for one in group.rollout.completions]
    config = subject.config
    yield judge_penalty(config, num_tokens=round(config.prompts.per_step * config.rollout.group_size * mean(lengths)))


def judge_penalty(config: RunConfig, *, num_tokens: int) -> Finding:
    """Args: num_tokens: loss tokens of a step."""
    estimator = _estimator(config)
    betas = {name: objective.beta for name, objective in config.objectives.items()}
    fixed = {name: beta.value for name, beta in betas.items() if isinstance(beta, FixedBetaConfig)}
    if len(fixed) == len(betas) and not any(fixed.values()):
        return Finding(check=CHECK, status="ok", what="beta is 0: there is none", figures={"estimator": estimator})
    value, pull = _of_a_rare_token(config)
    what = f"{estimator}: one token of {num_tokens} at {RARE:.1%} of its reference's probability adds "
    what += f"{value / num_tokens:.3f} nats to the KL, and is pulled back with a slope of {pull:.0f}"
    figures = {"estimator": estimator, "nats": value, "pull": pull, "num_tokens": num_tokens, "fixed": list(fixed)}
    held = [f"{name} ({value:g})" for name, value in fixed.items() if value]
    if pull <= MOST_PULL or not held:
        return Finding(check=CHECK, status="ok", what=what, figures=figures)
    return Finding(
        check=CHECK,
        status="warning",
        what=f"{what}; beta is fixed for {', '.join(held)}",
        meaning="a few tokens can make the KL and its gradient explode, and a fixed beta answers to neither that nor a "
        "policy that drifts away",
        remedy="set update.kl.estimator=clamped (linear, the default) or k3+ (k3's value, k2's pull), and a beta that "
        "moves: beta: {type: band, low: 0.02, high: 0.06}",
        figures=figures,
    )


def _of_a_rare_token(config: RunConfig) -> tuple[float, float]:
    """(penalty in nats, magnitude of its slope) of a token at RARE of its reference's probability."""
    logprobs = torch.tensor([[math.log(RARE)]], requires_grad=True)  # [1, 1], the reference's is 0
    bound = config.update.kl.max_log_ratio
    penalty = kl_penalty(logprobs, torch.zeros(1, 1), estimator=_estimator(config), max_log_ratio=bound).sum()
    (slope,) = torch.autograd.grad(penalty, logprobs)
    return float(penalty.detach()), abs(float(slope))


def _estimator(config: RunConfig) -> Estimator:
    """In the reward it is the log-ratio itself."""
    return "k1" if config.update.kl.kl_in == "reward" else config.update.kl.estimator
