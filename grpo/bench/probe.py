"""One memory configuration, run for its peaks: `python -m grpo.bench.probe SPEC.json` prints one JSON object.

A process of its own, because what one configuration leaves in the allocators would be counted for the next. A model
with random weights goes through the stages of a run, by the run's own code, on random tokens of full length; after each
stage its peak is read, less what the process held before the model came.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from grpo.bench.stages import Stages, make_model_folder
from grpo.config import RunConfig
from grpo.errors import ConfigError
from grpo.recipe_loader import parse_recipe
from grpo.runtime.devices import choose_device

WARM_UP_MODEL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Goes through all stages first, so that what libraries take for themselves is in the process before the figures."""


class PeakMeter:
    """Peak bytes of a stage, above what was there at the meter's making: on the device, and of the process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peaks: dict[str, dict[str, int]] = {}
        self.seconds: dict[str, list[float]] = {}
        """Stage -> of each time that it was taken."""
        gc.collect()
        self._host, self._on_device = _resident("VmRSS"), self._allocated()

    def __call__(self, stage: str, do: Callable[[], Any]) -> Any:
        """What `do` returns; a stage that is taken again replaces its peaks."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to what is resident now
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        before = self._held()
        start = time.perf_counter()
        result = do()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds.setdefault(stage, []).append(time.perf_counter() - start)
        host = _resident("VmHWM") - self._host
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _resident("VmHWM")
        held = self._on_device if self._device.type == "cuda" else self._host
        self.peaks[stage] = {"host_bytes": host, "device_bytes": peak - held, "before_bytes": before}
        return result

    def _held(self) -> int:
        """What is there now, above what was there at the making."""
        return self._allocated() - self._on_device if self._device.type == "cuda" else _resident("VmRSS") - self._host

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0


def _resident(what: str) -> int:
    """Bytes, from the kernel's count of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise ConfigError(f"/proc/self/status has no {what}: peaks of host memory are read on Linux only")


def run_stages(config: RunConfig, *, prompt_tokens: int, meter: PeakMeter, steps: int = 2) -> int:
    """Every stage of a run, steps twice: from the second on the optimizer's moments are there.

    Returns how often a micro-batch was halved for want of memory.
    """
    stages = Stages(config, prompt_tokens=prompt_tokens)
    meter("load", stages.load)
    meter("engine", stages.make_engine)
    stages.prepare()
    halvings = 0
    for _ in range(steps):
        meter("sampling", stages.sample)
        meter("reference", stages.reference)
        halvings += meter("update", stages.update).num_halvings
        meter("sync", stages.sync)
    with tempfile.TemporaryDirectory() as folder:
        meter("checkpoint", lambda: stages.save(Path(folder)))
    return halvings


def run_probe(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Peaks and times of one configuration.

    Args:
        spec: `recipe` (a recipe's keys and values, its `model` a folder), `prompt_tokens`, `steps`, and
            `device_limit_bytes`, what torch may take of the card (all of it where None).
    """
    folder = Path(spec["recipe"]["model"])
    config = parse_recipe(spec["recipe"], base_dir=folder.parent, source="the memory configuration")
    device = choose_device(config.device)
    if (limit := spec["device_limit_bytes"]) is not None and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(device).total_memory)
    with tempfile.TemporaryDirectory() as place:
        small = Path(place) / "small"
        make_model_folder(small, WARM_UP_MODEL, "float32")
        tiny = {
            "model": str(small),
            "prompts": {**spec["recipe"]["prompts"], "per_step": 2},
            "rollout": {**spec["recipe"]["rollout"], "group_size": 2, "max_new_tokens": 8},
        }
        warm = parse_recipe({**spec["recipe"], **tiny}, base_dir=folder.parent, source="the warm-up")
        run_stages(warm, prompt_tokens=8, meter=PeakMeter(device))
    meter = PeakMeter(device)
    halvings = run_stages(config, prompt_tokens=int(spec["prompt_tokens"]), meter=meter, steps=int(spec["steps"]))
    completion_tokens = config.prompts.per_step * config.rollout.group_size * config.rollout.max_new_tokens
    return {
        "stages": meter.peaks,
        "seconds": meter.seconds,
        "halvings": halvings,
        "tokens_per_s": {stage: completion_tokens / meter.seconds[stage][-1] for stage in ("sampling", "update")},
    }


def main() -> None:
    """Entry point of the child process: the last line of its output is the result."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    if sys.argv[1] == "make":
        make_model_folder(Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4])
        return
    print(json.dumps(run_probe(json.loads(Path(sys.argv[1]).read_text()))))


if __name__ == "__main__":
    main()
