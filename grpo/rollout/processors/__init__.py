"""Logits processors: pure, vectorised functions of the text before a position.

The same code shapes sampling (one position per row), replay (many positions of many rows at once) and vLLM (one row a
request), so that the trainer differentiates the law that was sampled from. Knows no engine and no model.
"""

from grpo.rollout.processors.bans import BannedSequences, MinNewTokens, NoRepeatNgram
from grpo.rollout.processors.base import Prefix, Processor, chosen, right_padded
from grpo.rollout.processors.custom import check_custom_processors, load_processor
from grpo.rollout.processors.law import build_processors
from grpo.rollout.processors.penalties import OccurrencePenalties, RepetitionPenalty

__all__ = [
    "BannedSequences",
    "MinNewTokens",
    "NoRepeatNgram",
    "OccurrencePenalties",
    "Prefix",
    "Processor",
    "RepetitionPenalty",
    "build_processors",
    "check_custom_processors",
    "chosen",
    "load_processor",
    "right_padded",
]
