"""A batch whose loss or gradient was not finite -> files for study. Nothing reads them back in a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from grpo.batching import MicroBatch, TrainBatch
from grpo.update.step import NonFiniteStep


def dump_batch(run_dir: Path, step: int, batch: TrainBatch, skipped: NonFiniteStep, *, rank: int) -> Path:
    """Write non_finite/step-N-rank-R.safetensors and .json; returns the path of the tensors.

    The tensors are called "<micro-batch>/<field of grpo.batching.MicroBatch>", those of a prompt's images
    "<micro-batch>/images/<place of the prompt>/<argument of the model>".
    """
    folder = run_dir / "non_finite"
    folder.mkdir(parents=True, exist_ok=True)  # the run directory is the main rank's; this may be another machine
    path = folder / f"step-{step}-rank-{rank}.safetensors"
    tensors = {
        f"{place}/{name}": tensor.contiguous()
        for place, micro_batch in enumerate(batch.micro_batches)
        for name, tensor in [*micro_batch.tensors().items(), *_image_tensors(micro_batch)]
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


def _image_tensors(micro_batch: MicroBatch) -> Iterator[tuple[str, Tensor]]:
    for place, images in enumerate(micro_batch.images or ()):
        for name, tensor in images.tensors.items() if images else ():
            yield f"images/{place}/{name}", tensor
