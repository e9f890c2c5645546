"""Texts that no completion shall hold -> the token sequences that spell them. Knows a tokenizer, no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LINE_END = "\n"


def banned_sequences(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, end_token_ids: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """How the tokenizer writes each text: as it stands, after a space, and at the start of a line; each once.

    The last of these differs where a tokenizer puts a space before whatever it is given (SentencePiece). Special
    tokens are not added. A text that the model splits otherwise than the tokenizer does is not found.

    Raises:
        ConfigError: a text is empty, the tokenizer cannot write it, or it is an end token, without which no completion
            could end.
    """
    found: dict[tuple[int, ...], None] = {}  # in the order of the recipe
    for place, text in enumerate(texts):
        if not text:
            raise ConfigError(f"rollout.banned[{place}] is an empty text, which every completion holds. Take it out.")
        sequences = _spellings(text, tokenizer)
        if not sequences:
            raise ConfigError(
                f"rollout.banned[{place}] {text!r} cannot be written by this tokenizer: it has no tokens for it."
            )
        for sequence in sequences:
            if len(sequence) == 1 and sequence[0] in end_token_ids:
                raise ConfigError(
                    f"rollout.banned[{place}] {text!r} is the end token {sequence[0]}; without it no "
                    "completion could end. Take it out, or set rollout.min_new_tokens to put the end off."
                )
            found[sequence] = None
    return tuple(found)


def _spellings(text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    def encoded(whole: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(whole, add_special_tokens=False))

    before, line = encoded(_LINE_END), encoded(_LINE_END + text)
    candidates = [encoded(text), encoded(" " + text)]
    if line[: len(before)] == before:
        candidates.append(line[len(before) :])
    unknown = tokenizer.unk_token_id
    return [tokens for tokens in candidates if tokens and (unknown is None or unknown not in tokens)]
