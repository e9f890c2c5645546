"""The facts that a run prints before its first step."""

from __future__ import annotations

from importlib.metadata import version

from grpo.config import RunConfig
from grpo.run_parts import RunParts

STRICT = "strict: deterministic kernels only; what that costs is seen in time/update_s and time/rollout_s"


def title_rows(config: RunConfig, parts: RunParts) -> list[tuple[str, str]]:
    """(what, fact), in the order in which they are shown."""
    learning = parts.policy.trainable_parameters()
    count, total = sum(p.numel() for p in learning.values()), parts.policy.num_parameters()
    batch = config.prompts.per_step * config.rollout.group_size
    return [
        ("version", f"grpo-toolkit {version('grpo-toolkit')}"),
        (
            "model",
            f"{config.model} on {parts.policy.device}, products in {parts.policy.compute_dtype}".replace("torch.", ""),
        ),
        ("trainable", f"{count:,} of {total:,} parameters ({count / total:.2%}) in {len(learning)} tensors, float32"),
        (
            "end tokens",
            ", ".join(f"{i} {parts.tokenizer.convert_ids_to_tokens(i)}" for i in parts.params.end_token_ids),
        ),
        (
            "effective batch",
            f"{config.prompts.per_step} prompts x {config.rollout.group_size} completions = {batch} rows",
        ),
        ("processes", str(parts.ranks.count)),
        *([("determinism", STRICT)] if config.determinism == "strict" else []),
        ("objectives", ", ".join(config.objectives)),
        ("run directory", str(config.output_dir)),
    ]
