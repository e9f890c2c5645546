"""A task's name -> the task."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from grpo.errors import ConfigError
from grpo.tasks.base import Task
from grpo.tasks.fairness import Fairness
from grpo.tasks.grounding import Grounding

_ALL: tuple[Task, ...] = (Fairness(), Grounding())

TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none; the message gives the nearest name and all of them.
    """
    if name in TASKS:
        return TASKS[name]
    matches = get_close_matches(name.lower(), TASKS, n=1, cutoff=0.5)
    hint = f" (did you mean {matches[0]!r}?)" if matches else ""
    raise ConfigError(f"there is no task {name!r}{hint}. Tasks: {', '.join(TASKS)}.")
