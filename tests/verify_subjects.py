"""The tiny model as a subject of `grpo verify`'s checks: a run before its first step, with a scored batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from builders import make_group, make_prompt

from grpo.config import RunConfig
from grpo.diagnostics.checks.subject import Subject, make_subject
from grpo.preflight import open_run
from grpo.recipe_loader import parse_recipe
from grpo.run_parts import RunParts
from grpo.types import ScoredGroup


def make_config(model_dir: Path, folder: Path, **changes: Any) -> RunConfig:
    """Two objectives with rewards that need no reference, on the generated tasks' prompts."""
    reward = {"name": "length", "params": {"target_tokens": 4, "limit_tokens": 8}}
    objective = {"rewards": [reward], "beta": {"type": "fixed", "value": 0.05}}
    values: Mapping[str, Any] = {
        "model": str(model_dir),
        "steps": 2,
        "output_dir": "run",
        "device": "cpu",
        "dtype": "float32",
        "prompts": {"type": "tasks", "names": ["fairness", "grounding"], "per_step": 2},
        "objectives": {"fairness": objective, "grounding": objective},
        "rollout": {"group_size": 4, "max_new_tokens": 8},
        "optim": {"learning_rate": 1e-2},
        "trainable": {"type": "lora", "rank": 2},
        "eval": {"before": False, "after": False},
        **changes,
    }
    return parse_recipe(values, base_dir=folder, source="recipe.yaml")


def scored_groups(names: Sequence[str] = ("fairness", "grounding"), *, is_flat: bool = False) -> list[ScoredGroup]:
    """A group for each objective: four completions of 3 to 9 random tokens."""
    values = [0.5] * 4 if is_flat else [1.0, 0.0, 0.25, 0.75]
    return [
        make_group(
            [{name: value} for value in values],
            prompt=make_prompt(name, objectives=(name,)),
            lengths=[3, 9, 5, 4],
            seed=seed,
        )
        for seed, name in enumerate(names)
    ]


@contextmanager
def open_subject(
    model_dir: Path, folder: Path, *, groups: Sequence[ScoredGroup] | None = None, **changes: Any
) -> Iterator[Subject]:
    """Args: groups: what was sampled and scored, made up where None; changes: of the recipe."""
    config = make_config(model_dir, folder, **changes)
    with closing(open_run(config)) as parts:
        yield make_subject(config, parts, groups or scored_groups())


def state_of(parts: RunParts) -> dict[str, Any]:
    """All that a step changes."""
    updater = parts.updater
    return {
        "weights": {name: value.clone() for name, value in parts.policy.model.state_dict().items()},
        "optimizer": dict(updater.optimizer.state),
        "betas": {name: controller.state_dict() for name, controller in updater.controllers.items()},
        "gradients": [parameter.grad for parameter in parts.policy.trainable_parameters().values()],
    }
