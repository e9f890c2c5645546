"""What makes two judgements the same: the hash under which the audit keeps a judgement and replay finds it again.

It says what is judged and by what kind of judge, not where the judge lives: a server that has moved is the same judge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from judges.config import JudgeConfig
from judges.modes.base import distinct_groups, group_key
from judges.prompts import Rubric
from judges.types import JudgeRequest


def judgement_hashes(requests: Sequence[JudgeRequest], *, config: JudgeConfig, rubric: Rubric) -> list[str]:
    """[B] one sha256 per request of a batch, in order; equal requests to equal judges have equal hashes.

    Where texts are compared, a judgement depends on all texts that answer its question in the batch: they enter too.
    The request's id does not.
    """
    judge = _judge(config, rubric)
    compared = {} if config.mode.type == "pointwise" else distinct_groups(requests)
    return [
        canonical_sha256(
            {
                "judge": judge,
                "question": one.question,
                "reference": one.reference,
                "criterion": one.criterion,
                "completion": one.completion,
                "sample_index": one.sample_index,
                "compared": compared.get(group_key(one)),
            }
        )
        for one in requests
    ]


def canonical_sha256(content: Mapping[str, Any]) -> str:
    """sha256 of JSON with sorted keys and no spaces, in ASCII (cf. RFC 8785).

    Raises:
        ValueError: a number is not finite.
    """
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def rubric_sha256(rubric: Rubric) -> str:
    """Of the template's text: a rubric's version."""
    return hashlib.sha256(rubric.template.encode()).hexdigest()


def _judge(config: JudgeConfig, rubric: Rubric) -> dict[str, Any]:
    """Of a judge's settings those that decide what it says; not its address, its limits or its patience."""
    return {
        "rubric": rubric_sha256(rubric),
        "mode": config.mode.model_dump(),
        "scale": config.scale.model_dump(),
        "max_tokens": config.max_tokens,
        "max_input_chars": config.max_input_chars,
        "ensemble": config.ensemble.model_dump() if config.ensemble else None,
        "endpoints": [
            endpoint.model_dump(include={"dialect", "model", "structured", "temperature", "seed"})
            for endpoint in config.endpoints
        ],
    }
