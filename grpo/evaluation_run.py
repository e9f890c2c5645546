"""`grpo eval`: a run's newest checkpoint, or a plain model -> held-out scores. Writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo.checkpoint import latest_checkpoint, load_checkpoint
from grpo.evaluate import evaluate, summarise
from grpo.preflight import open_run
from grpo.recipe_loader import load_recipe


def evaluate_target(target: str, *, recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Evaluate a run directory under its own config, or a model under a recipe's prompts and rewards.

    Returns:
        The shape of eval.json with one side: {"after": ...} for a run, {"before": ...} for a model as it is.
    Raises:
        InputError: neither a run nor a model, or the recipe is wrong.
    """
    run_dir = Path(target).expanduser()
    is_run = (run_dir / "config.yaml").is_file()
    if is_run:
        config = load_recipe(str(run_dir / "config.yaml"), overrides)
    else:
        model = str(run_dir.absolute()) if run_dir.is_dir() else target
        config = load_recipe(recipe, [*overrides, f"model={model}"])
    parts = open_run(config)
    try:
        if is_run:
            load_checkpoint(latest_checkpoint(run_dir), parts.updater)
            parts.engine.load_weights(parts.policy)
        prompts = parts.encode(parts.prompts.held_out(config.eval.num_prompts))
        answers = evaluate(parts.engine, parts.eval_scorer, prompts, params=parts.params)
    finally:
        parts.close()
    return {"after" if is_run else "before": summarise(answers)}
