"""A batch whose loss or gradient was not finite -> files for study. Nothing reads them back in a run."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from grpo.batching import MicroBatch, TrainBatch
from grpo.durable_files import fsync_file, storage_errors, write_atomically
from grpo.update.step import NonFiniteStep


def dump_batch(run_dir: Path, step: int, batch: TrainBatch, skipped: NonFiniteStep, *, rank: int) -> Path:
    """Write non_finite/step-N-rank-R.safetensors and .json; returns the path of the tensors.

    The tensors are called "<micro-batch>/<field of grpo.batching.MicroBatch>", those of a prompt's images
    "<micro-batch>/images/<place of the prompt>/<argument of the model>".

    Raises:
        StorageError: the disk refuses one; neither is half there under its name.
    """
    folder = run_dir / "non_finite"
    path = folder / f"step-{step}-rank-{rank}.safetensors"
    tensors = {
        f"{place}/{name}": tensor.contiguous()
        for place, micro_batch in enumerate(batch.micro_batches)
        for name, tensor in [*micro_batch.tensors().items(), *_image_tensors(micro_batch)]
    }
    with storage_errors(path, needed_bytes=sum(tensor.nbytes for tensor in tensors.values())):
        folder.mkdir(parents=True, exist_ok=True)  # the run directory is the main rank's; this may be another machine
        temporary = path.with_name(f".{path.name}.new")
        try:
            save_file(tensors, temporary)
            fsync_file(temporary)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    told = {
        "step": step,
        "cause": skipped.cause,
        "micro_batch": skipped.micro_batch,
        "objectives": batch.objectives,
        "weights": batch.weights.tolist(),
    }
    write_atomically(path.with_suffix(".json"), json.dumps(told, indent=1).encode())
    return path


def _image_tensors(micro_batch: MicroBatch) -> Iterator[tuple[str, Tensor]]:
    for place, images in enumerate(micro_batch.images or ()):
        for name, tensor in images.tensors.items() if images else ():
            yield f"images/{place}/{name}", tensor
