"""What a generated task is: an index -> a Prompt, the same one every time. Knows no model, no tokenizer, no reward.

Access is random and without end, so a cursor into a task is one integer, and resuming needs nothing else.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from grpo.errors import ConfigError
from grpo.types import Message, Prompt

Split: TypeAlias = Literal["train", "held_out"]

SPLITS: tuple[Split, ...] = ("train", "held_out")


class Task(Protocol):
    """A generator of prompts with known answers. Train and held-out share no vocabulary and no template."""

    name: str
    """The name a recipe uses."""
    objective: str
    """The objective that scores its prompts."""
    kinds: tuple[str, ...]
    """Values of `meta["kind"]`; each makes up the same share of any aligned block of prompts."""

    def prompt(self, split: Split, seed: int, index: int) -> Prompt:
        """The prompt at `index` (from 0, without end). Equal arguments give equal prompts, in any order of calls.

        Raises:
            ConfigError: there is no such split, or the index is negative.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One question with its answer, before it becomes a Prompt."""

    objective: str
    """The objective that scores it."""
    kind: str
    """What sort of question this is, such as "ambiguous"."""
    instruction: str
    """The system message; short, as it stands in front of every prompt."""
    text: str
    """The user's message: the scene and the question."""
    reference: str
    """The right answer, one of the choices."""
    choices: tuple[str, ...]
    """All answers that could be given, the abstaining one included."""

    def to_prompt(self, prompt_id: str) -> Prompt:
        """The scene as the record that the other stages know."""
        return Prompt(
            id=prompt_id,
            messages=(Message(role="system", content=self.instruction), Message(role="user", content=self.text)),
            objectives=(self.objective,),
            reference=self.reference,
            meta={"kind": self.kind, "choices": list(self.choices)},
        )


def prompt_id(task: str, split: Split, seed: int, index: int) -> str:
    """Names the prompt uniquely over tasks, splits and seeds.

    Raises:
        ConfigError: there is no such split, or the index is negative.
    """
    if split not in SPLITS:
        raise ConfigError(f"task {task!r} has no split {split!r}; it has {' and '.join(SPLITS)}.")
    if index < 0:
        raise ConfigError(f"task {task!r} was asked for prompt {index}; prompts are counted from 0.")
    return f"{task}/{split}/{seed}/{index}"


def drawn(identity: str) -> random.Random:
    """Random numbers that depend on the text alone; the same in every process and on every machine."""
    return random.Random(identity)


def balanced_slot(identity: str, index: int, num_slots: int) -> int:
    """A number in [0, num_slots) that takes each value once in each block of `num_slots` indices, in drawn order.

    The order is drawn so that a reader who takes every second prompt does not get only one kind.
    """
    block, position = divmod(index, num_slots)
    order = list(range(num_slots))
    drawn(f"{identity}/block/{block}").shuffle(order)
    return order[position]
