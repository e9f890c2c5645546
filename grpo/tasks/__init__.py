"""Generated scenes whose right answers are known."""

from grpo.tasks.base import SPLITS, Scene, Split, Task
from grpo.tasks.registry import TASKS, get_task

__all__ = ["SPLITS", "TASKS", "Scene", "Split", "Task", "get_task"]
