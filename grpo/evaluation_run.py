"""`grpo eval`: a run's newest checkpoint, or a plain model -> held-out scores. Writes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo.checkpoint import latest_checkpoint, load_checkpoint
from grpo.evaluate import bias_of, evaluate, summarise
from grpo.preflight import open_run
from grpo.recipe_loader import load_recipe


def evaluate_target(target: str, *, recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Evaluate a run directory under its own config, or a model under a recipe's prompts and rewards.

    Returns:
        The shape of eval.json with one side: {"after": ...} for a run, {"before": ...} for a model as it is; and
        "bbq", accuracy and bias, where the prompts are BBQ's.
    Raises:
        InputError: neither a run nor a model, a run without a checkpoint, the recipe is wrong, or it names no held-out
            prompts.
    """
    run_dir = Path(target).expanduser()
    checkpoint = None
    if (run_dir / "config.yaml").is_file():
        config = load_recipe(str(run_dir / "config.yaml"), overrides)
        checkpoint = latest_checkpoint(run_dir)  # before the model: a run without one need not wait for the weights
    else:
        model = str(run_dir.absolute()) if run_dir.is_dir() else target
        # an override's value is read as YAML, to which a name may mean something else
        config = load_recipe(recipe, [*overrides, f"model={json.dumps(model, ensure_ascii=False)}"])
    parts = open_run(config, purpose="evaluate")
    try:
        if checkpoint is not None:
            load_checkpoint(checkpoint, parts.updater)
            parts.engine.load_weights(parts.policy)
        prompts = parts.encode(parts.prompts.held_out(config.eval.num_prompts))
        answers = evaluate(parts.engine, parts.eval_scorer, prompts, params=parts.params, ranks=parts.ranks)
    finally:
        parts.close()
    when = "before" if checkpoint is None else "after"
    bias = bias_of(answers)
    return {when: summarise(answers), **({"bbq": {when: bias}} if bias else {})}
