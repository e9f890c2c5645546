"""SamplingParams -> the processors it asks for, in their one stated order."""

from __future__ import annotations

from grpo.rollout.base import SamplingParams
from grpo.rollout.processors.bans import BannedSequences, MinNewTokens, NoRepeatNgram
from grpo.rollout.processors.base import Processor
from grpo.rollout.processors.custom import load_processor
from grpo.rollout.processors.penalties import OccurrencePenalties, RepetitionPenalty


def build_processors(params: SamplingParams) -> list[Processor]:
    """The processors that the sampling law asks for, in their one stated order.

    Bans (minimum of new tokens, banned sequences, n-grams), the repetition penalty, presence and frequency (the order
    of vLLM and, for the first two kinds, transformers), then one's own in the order of the recipe. After them come
    temperature, top-k, top-p and min-p, which are the engine's own.

    Raises:
        ConfigError: one's own cannot be loaded; see `load_processor`.
    """
    processors: list[Processor] = []
    if params.min_new_tokens > 0:
        processors.append(MinNewTokens(count=params.min_new_tokens, end_token_ids=params.end_token_ids))
    if params.banned:
        processors.append(BannedSequences(sequences=params.banned))
    if params.no_repeat_ngram > 0:
        processors.append(NoRepeatNgram(size=params.no_repeat_ngram))
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenalty(penalty=params.repetition_penalty, over=params.repetition_over))
    if params.presence_penalty or params.frequency_penalty:
        processors.append(
            OccurrencePenalties(
                presence=params.presence_penalty, frequency=params.frequency_penalty, over=params.penalties_over
            )
        )
    return [*processors, *(load_processor(path, parameters) for path, parameters in params.custom)]
