"""Dataset (task, file or hub name) -> batches of Prompt, and Prompt -> token ids. `prompt_rows` reads the files.

Batches are a pure function of (config, seed, step): the cursor of a resumed run is its step. Knows no rewards.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from grpo.config import FilePrompts, PromptsConfig, TaskPrompts
from grpo.errors import DatasetError
from grpo.prompt_images import ImageTextEncoder, PromptImages
from grpo.prompt_rows import read_hub, read_rows, to_prompts
from grpo.tasks.base import Split, Task, drawn
from grpo.tasks.registry import get_task
from grpo.types import Prompt

CHECKED_PER_TASK = 64
"""Scenes of each task whose length is looked at before a run begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt as the model reads it."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    """[T_prompt] the rendered chat, up to where the assistant's answer begins."""
    images: PromptImages | None = None
    """None where the prompt shows none."""


class PromptSource(Protocol):
    """Where prompts come from."""

    def batch(self, step: int) -> list[Prompt]:
        """The P prompts of a step (counted from 1); the same step always gives the same prompts."""
        ...

    def spares(self, step: int, round_number: int, places: Sequence[int]) -> dict[int, Prompt]:
        """Other prompts for some places of a step's batch, scored for the same objectives; for fewer places where
        there are no more. The same arguments always give the same prompts, and no two rounds of a step share one."""
        ...

    def held_out(self, num_per_objective: int) -> list[Prompt]:
        """Prompts that training never sees, at most so many per objective; empty where there are none."""
        ...

    def objective_sets(self) -> list[tuple[str, ...]]:
        """Which sets of objectives the prompts ask for."""
        ...

    def epoch_prompts(self) -> int | None:
        """Prompts of an epoch; None where there is no end."""
        ...

    def to_check(self) -> list[Prompt]:
        """Prompts that must fit the model's context before a run begins: all, or a sample where there is no end."""
        ...


def open_prompts(config: PromptsConfig, *, seed: int, objectives: Sequence[str]) -> PromptSource:
    """Open the recipe's prompts.

    Raises:
        DatasetError: missing, empty or unreadable, or a column is missing.
        ConfigError: unknown task.
    """
    if isinstance(config, TaskPrompts):
        return TaskSource([get_task(name) for name in config.names], per_step=config.per_step, seed=seed)
    wanted = config.objectives or tuple(objectives)
    if isinstance(config, FilePrompts):
        prompts = to_prompts(read_rows(config.path), config, wanted, source=str(config.path), folder=config.path.parent)
        held_out = (
            to_prompts(
                read_rows(config.held_out_path),
                config,
                wanted,
                source=str(config.held_out_path),
                folder=config.held_out_path.parent,
            )
            if config.held_out_path
            else []
        )
    else:
        prompts = to_prompts(read_hub(config, config.split), config, wanted, source=config.name)
        held_out = (
            to_prompts(read_hub(config, config.held_out_split), config, wanted, source=config.name)
            if config.held_out_split
            else []
        )
    if config.per_step > len(prompts):
        raise DatasetError(
            f"prompts.per_step is {config.per_step}, but the dataset has {len(prompts)} prompts, and a step asks "
            f"each at most once. Set prompts.per_step={len(prompts)} or lower; more completions of each are "
            "rollout.group_size."
        )
    return ListSource(prompts, held_out, per_step=config.per_step, seed=seed)


class TaskSource:
    """Generated scenes, the tasks taking turns."""

    def __init__(self, tasks: Sequence[Task], *, per_step: int, seed: int) -> None:
        self._tasks, self._per_step, self._seed = list(tasks), per_step, seed

    def batch(self, step: int) -> list[Prompt]:
        """Prompts (step - 1) * P ... step * P - 1 of the endless train split."""
        numbers = range((step - 1) * self._per_step, step * self._per_step)
        return [self._prompt(n, "train") for n in numbers]

    def spares(self, step: int, round_number: int, places: Sequence[int]) -> dict[int, Prompt]:
        """Scenes of the same tasks from a stream of their own."""
        first = (step - 1) * self._per_step
        stream = drawn(f"{self._seed}/spares/{round_number}").getrandbits(62)
        return {place: self._prompt(first + place, "train", stream) for place in places}

    def held_out(self, num_per_objective: int) -> list[Prompt]:
        """The first scenes of the held-out split; the same for every seed, so that runs can be compared."""
        return [task.prompt("held_out", 0, n) for task in self._tasks for n in range(num_per_objective)]

    def epoch_prompts(self) -> int | None:
        """Scenes are made without end."""
        return None

    def to_check(self) -> list[Prompt]:
        """The first scenes of each task, by far more than it has wordings and kinds; the first step at least."""
        num_checked = max(CHECKED_PER_TASK * len(self._tasks), self._per_step)
        return [self._prompt(n, "train") for n in range(num_checked)]

    def objective_sets(self) -> list[tuple[str, ...]]:
        """One objective per task."""
        return [(task.objective,) for task in self._tasks]

    def _prompt(self, number: int, split: Split, seed: int | None = None) -> Prompt:
        task = self._tasks[number % len(self._tasks)]
        return task.prompt(split, self._seed if seed is None else seed, number // len(self._tasks))


class ListSource:
    """Prompts that are all known, at least P of them, shuffled anew in every epoch; no step holds one twice."""

    def __init__(self, prompts: Sequence[Prompt], held_out: Sequence[Prompt], *, per_step: int, seed: int) -> None:
        self._prompts, self._held_out = list(prompts), list(held_out)
        self._per_step, self._seed = per_step, seed
        assert per_step <= len(self._prompts), "open_prompts refuses it"
        self._last_order = (0, self._shuffled(0))

    def batch(self, step: int) -> list[Prompt]:
        """P prompts; an epoch's end and the next one's beginning may share a step."""
        numbers = range((step - 1) * self._per_step, step * self._per_step)
        orders = {n // len(self._prompts): self._order(n // len(self._prompts)) for n in numbers}
        return [self._prompts[orders[n // len(self._prompts)][n % len(self._prompts)]] for n in numbers]

    def spares(self, step: int, round_number: int, places: Sequence[int]) -> dict[int, Prompt]:
        """Prompts that the step does not hold, drawn from all of the dataset."""
        batch = self.batch(step)
        in_use = {prompt.id for prompt in batch}
        unused = [prompt for prompt in self._prompts if prompt.id not in in_use]
        random.Random(f"{self._seed}/spares/{step}").shuffle(unused)  # one order for all rounds: each takes a stretch
        chosen: dict[int, Prompt] = {}
        for place in places:
            wanted = batch[place].objectives
            fitting = [prompt for prompt in unused if prompt.objectives == wanted]
            alike = [other for other, prompt in enumerate(batch) if prompt.objectives == wanted]
            at = (round_number - 1) * len(alike) + alike.index(place)
            if at < len(fitting):
                chosen[place] = fitting[at]
        return chosen

    def held_out(self, num_per_objective: int) -> list[Prompt]:
        """The first rows of the held-out file."""
        count: dict[tuple[str, ...], int] = {}
        chosen: list[Prompt] = []
        for prompt in self._held_out:
            count[prompt.objectives] = count.get(prompt.objectives, 0) + 1
            if count[prompt.objectives] <= num_per_objective:
                chosen.append(prompt)
        return chosen

    def epoch_prompts(self) -> int | None:
        """All of them."""
        return len(self._prompts)

    def to_check(self) -> list[Prompt]:
        """All of them: the long one must be found now, not in step 400."""
        return list(self._prompts)

    def objective_sets(self) -> list[tuple[str, ...]]:
        """All sets that occur."""
        return sorted({prompt.objectives for prompt in [*self._prompts, *self._held_out]})

    def _order(self, epoch: int) -> list[int]:
        """The epoch's order. Each depends on the one before: what ends one epoch may not begin the next in one step."""
        at, order = self._last_order if self._last_order[0] <= epoch else (0, self._shuffled(0))
        for following in range(at + 1, epoch + 1):
            num_shared = following * len(order) % self._per_step  # prompts of the old epoch in the step they share
            taken = set(order[len(order) - num_shared :])
            shuffled = self._shuffled(following)
            head = [n for n in shuffled if n not in taken][: self._per_step - num_shared] if taken else []
            order = list(dict.fromkeys([*head, *shuffled]))
        self._last_order = (epoch, order)
        return order

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order


def encode_prompt(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None,
    image_encoder: ImageTextEncoder | None = None,
) -> EncodedPrompt:
    """Render the chat and tokenise it.

    Args:
        max_tokens: room in the model's context, completion already taken off; None where the context has no end.
        image_encoder: of a vision-language model; None for a model that reads text alone.
    Raises:
        DatasetError: the prompt does not fit, an image cannot be read, or the tokenizer has no chat template.
    """
    if image_encoder is not None:
        token_ids, images = image_encoder.encode(prompt)
    else:
        token_ids, images = _text_token_ids(prompt, tokenizer), None
    _check_fits(prompt, len(token_ids), max_tokens)
    return EncodedPrompt(prompt=prompt, token_ids=token_ids, images=images)


def made_up_prompt(image_encoder: ImageTextEncoder) -> EncodedPrompt:
    """A prompt with images of the encoder's own, to try a model out with."""
    prompt, token_ids, images = image_encoder.made_up()
    return EncodedPrompt(prompt=prompt, token_ids=token_ids, images=images)


def check_prompt(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None,
    image_encoder: ImageTextEncoder | None = None,
) -> int:
    """The tokens that `encode_prompt` will give; of its images, only the files' headers are read.

    Raises:
        DatasetError: as `encode_prompt`, but for images that are cut short.
    """
    num_tokens = image_encoder.num_tokens(prompt) if image_encoder else len(_text_token_ids(prompt, tokenizer))
    _check_fits(prompt, num_tokens, max_tokens)
    return num_tokens


def _text_token_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    if prompt.images:
        raise DatasetError(
            f"prompt {prompt.id!r} shows images, but the model reads text alone. Name a vision-language model, or "
            "leave prompts.images_column out."
        )
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    try:
        rendered: Any = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},  # its warning of a long prompt would say the error below, worse
        )
    except (ValueError, TemplateError) as exc:  # a template refuses what it cannot render, such as a system message
        raise DatasetError(f"prompt {prompt.id!r} cannot be rendered as a chat: {exc}") from exc
    return tuple(int(token) for token in rendered["input_ids"])


def _check_fits(prompt: Prompt, num_tokens: int, max_tokens: int | None) -> None:
    if max_tokens is not None and num_tokens > max_tokens:
        raise DatasetError(
            f"prompt {prompt.id!r} has {num_tokens} tokens, but the model's context leaves {max(max_tokens, 0)} "
            "for a prompt beside rollout.max_new_tokens. Shorten the prompt or lower rollout.max_new_tokens."
        )
