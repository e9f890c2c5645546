"""Recipe -> how long its longest prompt is, in tokens, where its prompts and the model's tokenizer are at hand.

For the memory planner, which would otherwise assume one. Reads no weights, fetches no data set, and imports no torch
but for a packaged model that has not been converted yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grpo.config import HubPrompts, RunConfig
from grpo.errors import InputError, ModelError
from grpo.runtime.memory import DEFAULT_PROMPT_TOKENS
from grpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_READ = 2048
"""Prompts that are turned into tokens; of more, those with the most characters."""
_PACKAGE = "package:"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLength:
    """A length to plan with."""

    tokens: int
    """Of the longest prompt, the chat template included."""
    source: str
    """Where it comes from, in words."""
    is_assumed: bool = False
    """Nothing was read; `source` says why."""


def longest_prompt(config: RunConfig) -> PromptLength:
    """The longest prompt that the run will read, else `DEFAULT_PROMPT_TOKENS`, with the reason. Raises nothing."""
    try:
        return _read(config)
    except InputError as exc:
        return PromptLength(tokens=DEFAULT_PROMPT_TOKENS, source=f"assumed: {str(exc).rstrip('.')}", is_assumed=True)


def _read(config: RunConfig) -> PromptLength:
    if isinstance(config.prompts, HubPrompts):
        raise ModelError(f"the data set {config.prompts.name} is not fetched for a plan")
    if getattr(config.prompts, "images_column", None) is not None:
        raise ModelError("the tokens of images are not counted here")
    tokenizer = _tokenizer(config.model, config.base_dir)
    from grpo.prompts import check_prompt, open_prompts

    source = open_prompts(config.prompts, seed=config.seed, objectives=list(config.objectives))
    prompts = source.to_check() + (source.held_out(config.eval.num_prompts) if config.eval.is_on else [])
    longest = _longest_texts(prompts)
    among = f" of {len(prompts)}" if len(longest) < len(prompts) else ""
    return PromptLength(
        tokens=max(check_prompt(prompt, tokenizer, max_tokens=None) for prompt in longest),
        source=f"the longest of {len(longest)}{among} that were read",
    )


def _longest_texts(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    if len(prompts) <= MOST_READ:
        return prompts
    return sorted(prompts, key=lambda prompt: -sum(len(message.content) for message in prompt.messages))[:MOST_READ]


def _tokenizer(name: str, base_dir: Path) -> PreTrainedTokenizerBase:
    """By its files alone. Raises ModelError where they are not at hand."""
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    from grpo.runtime.packaged_model import find_packaged_model, quiet_transformers, read_tokenizer

    target: Path | str = name
    if name.startswith(_PACKAGE):
        packaged = find_packaged_model(name.removeprefix(_PACKAGE))
        if not packaged.folder.is_dir():
            return read_tokenizer(packaged.gguf_path)
        target = packaged.folder
    elif name.startswith(("./", "../", "/", "~", ".")) or (base_dir / name).is_dir():
        target = (base_dir / Path(name).expanduser()).resolve()
    if isinstance(target, Path) and not (target / "tokenizer.json").is_file():
        raise ModelError(f"there is no tokenizer.json in {target}")
    try:
        with quiet_transformers():
            return PreTrainedTokenizerFast.from_pretrained(target)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as exc:
        raise ModelError(f"the tokenizer of {name} cannot be had: {str(exc).splitlines()[0]}") from exc
