"""The sampling law's penalties and bans as loops over lists: the slow twin of grpo.rollout.processors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from grpo.rollout.base import SamplingParams


def slow_logits(
    logits: Sequence[float], prompt: Sequence[int], completion: Sequence[int], params: SamplingParams
) -> list[float]:
    """[V] logits of the next token after a prompt and what was sampled so far, before the temperature."""
    result: list[float] = []
    for token, logit in enumerate(logits):
        seen = {"completion": [*completion], "prompt": [*prompt], "both": [*prompt, *completion]}
        value = logit
        if token in seen[params.repetition_over]:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        times = seen[params.penalties_over].count(token)
        value -= params.frequency_penalty * times + (params.presence_penalty if times else 0.0)
        result.append(-math.inf if is_ruled_out(token, completion, params) else value)
    return result


def is_ruled_out(token: int, completion: Sequence[int], params: SamplingParams) -> bool:
    """Whether the token may not follow the completion."""
    if token in params.end_token_ids and len(completion) < params.min_new_tokens:
        return True
    longer = [*completion, token]
    if any(longer[-len(sequence) :] == list(sequence) for sequence in params.banned):
        return True
    n = params.no_repeat_ngram
    ngrams = [longer[start : start + n] for start in range(len(longer) - n + 1)] if n else []
    return bool(ngrams) and ngrams[-1] in ngrams[:-1]
