"""A batch whose loss or gradient was not finite -> files for study. Nothing reads them back in a run."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from grpo.batching import MicroBatch, TrainBatch
from grpo.update.step import NonFiniteStep


def dump_batch(run_dir: Path, step: int, batch: TrainBatch, skipped: NonFiniteStep, *, rank: int) -> Path:
    """Write non_finite/step-N-rank-R.safetensors and .json; returns the path of the tensors.

    The tensors are called "<micro-batch>/<field of grpo.batching.MicroBatch>".
    """
    folder = run_dir / "non_finite"
    folder.mkdir(parents=True, exist_ok=True)  # the run directory is the main rank's; this may be another machine
    path = folder / f"step-{step}-rank-{rank}.safetensors"
    tensors = {
        f"{place}/{name}": getattr(micro_batch, name).contiguous()
        for place, micro_batch in enumerate(batch.micro_batches)
        for name in MicroBatch.__dataclass_fields__
    }
    save_file(tensors, path)
    told = {
        "step": step,
        "cause": skipped.cause,
        "micro_batch": skipped.micro_batch,
        "objectives": batch.objectives,
        "weights": batch.weights.tolist(),
    }
    path.with_suffix(".json").write_text(json.dumps(told, indent=1))
    return path
