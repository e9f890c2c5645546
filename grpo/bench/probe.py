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
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from grpo.batching import build_batch
from grpo.checkpoint import save_checkpoint
from grpo.config import RunConfig
from grpo.errors import ConfigError
from grpo.prompts import EncodedPrompt
from grpo.recipe_loader import parse_recipe
from grpo.rollout.base import SamplingParams
from grpo.rollout.transformers_engine import TransformersEngine
from grpo.runtime.devices import choose_attention, choose_device, choose_dtype
from grpo.runtime.models import has_flash_attention, load_model, load_tokenizer
from grpo.runtime.policy import Policy
from grpo.runtime.quantization import quantize
from grpo.types import Completion, Message, Prompt, RolloutGroup, ScoredGroup, Verdict
from grpo.update.beta import FixedBeta
from grpo.update.forward import reference_logprobs
from grpo.update.step import Updater

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
        self.seconds: dict[str, float] = {}
        gc.collect()
        self._host, self._on_device = _resident("VmRSS"), self._allocated()

    def __call__(self, stage: str, do: Callable[[], Any]) -> Any:
        """What `do` returns; a stage that is taken again replaces its figures."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to what is resident now
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        result = do()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[stage] = time.perf_counter() - start
        host = _resident("VmHWM") - self._host
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _resident("VmHWM")
        held = self._on_device if self._device.type == "cuda" else self._host
        gc.collect()
        after = self._allocated() - self._on_device if self._device.type == "cuda" else _resident("VmRSS") - self._host
        self.peaks[stage] = {"host_bytes": host, "device_bytes": peak - held, "held_bytes": after}
        return result

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0


def _resident(what: str) -> int:
    """Bytes, from the kernel's count of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise ConfigError(f"/proc/self/status has no {what}: peaks of host memory are read on Linux only")


def make_model_folder(folder: Path, values: Mapping[str, Any], dtype: str) -> None:
    """A model of random weights in `folder`, as `save_pretrained` leaves it. Args: values: of its config.json."""
    values = dict(values)
    config = AutoConfig.for_model(values.pop("model_type"), **values, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({str(token): token for token in range(256)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="1", eos_token="2", pad_token="0").save_pretrained(
        folder
    )


def run_stages(config: RunConfig, *, prompt_tokens: int, meter: PeakMeter) -> None:
    """Every stage of a run, the update twice: from the second step on the optimizer's moments are there."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    parts: dict[str, Any] = {}

    def load() -> None:
        flash = has_flash_attention(config.model, base_dir=config.base_dir)
        attention = choose_attention(config.attention, device, dtype, model_has_flash=flash)
        model = load_model(config.model, dtype=dtype, base_dir=config.base_dir, attention=attention)
        if config.quantization != "none":
            model = quantize(model, device=device, compute_dtype=dtype)
        model = model.to(device)  # pyright: ignore[reportArgumentType]
        parts["vocabulary"] = model.config.get_text_config().vocab_size
        parts["policy"] = Policy(model, config.trainable, seed=config.seed)

    meter("load", load)
    policy: Policy = parts["policy"]
    tokenizer = load_tokenizer(config.model, base_dir=config.base_dir)
    rollout = config.rollout
    params = SamplingParams(
        end_token_ids=(2,),
        max_new_tokens=rollout.max_new_tokens,
        min_new_tokens=rollout.max_new_tokens - 1,  # the longest there can be, which is what has to fit
        temperature=rollout.temperature,
        top_p=rollout.top_p,
    )
    engine: TransformersEngine = meter(
        "engine",
        lambda: TransformersEngine(
            policy, tokenizer, max_rows=rollout.max_rows, max_batch_tokens=rollout.max_batch_tokens
        ),
    )
    updater = Updater(
        policy,
        {name: FixedBeta(value=0.02) for name in config.objectives},
        observed=dict.fromkeys(config.objectives, "k3"),
        params=SamplingParams(end_token_ids=(2,), max_new_tokens=rollout.max_new_tokens),
        update=config.update,
        optim=config.optim,
    )
    groups = random_groups(config, prompt_tokens=prompt_tokens, vocabulary=parts["vocabulary"])
    batch = build_batch(
        groups,
        {name: objective.weight for name, objective in config.objectives.items()},
        combine="decoupled",
        scale="group",
        micro_batch_tokens=config.update.micro_batch_tokens,
        max_new_tokens=rollout.max_new_tokens,
    )
    prompts = [EncodedPrompt(prompt=g.rollout.prompt, token_ids=g.rollout.prompt_token_ids) for g in groups]
    for _ in range(2):
        meter(
            "sampling", lambda: list(engine.sample(prompts, config.rollout.group_size, params=params, seed=config.seed))
        )
        meter(
            "reference",
            lambda: reference_logprobs(policy, batch.micro_batches[0].to(policy.device), updater._params).sum(),
        )
        meter("update", lambda: updater.step(batch))
        meter("sync", lambda: engine.load_weights(policy))
    with tempfile.TemporaryDirectory() as folder:
        meter("checkpoint", lambda: save_checkpoint(Path(folder), updater, step=1, keep=1))


def random_groups(config: RunConfig, *, prompt_tokens: int, vocabulary: int) -> list[ScoredGroup]:
    """A step's groups: prompts and completions of random tokens and full length, random scores."""
    generator = torch.Generator().manual_seed(config.seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (count,), generator=generator).tolist())

    names, length = tuple(config.objectives), config.rollout.max_new_tokens
    groups: list[ScoredGroup] = []
    for number in range(config.prompts.per_step):
        completions = tuple(
            Completion(token_ids=tokens(length), text="", sampler_logprobs=(-1.0,) * length, finish_reason="length")
            for _ in range(config.rollout.group_size)
        )
        prompt = Prompt(id=str(number), messages=(Message(role="user", content=""),), objectives=names)
        scores = torch.rand(len(completions), len(names), generator=generator).tolist()
        groups.append(
            ScoredGroup(
                rollout=RolloutGroup(prompt=prompt, prompt_token_ids=tokens(prompt_tokens), completions=completions),
                verdicts=tuple(
                    {name: Verdict(value=score, parts={}) for name, score in zip(names, row, strict=True)}
                    for row in scores
                ),
            )
        )
    return groups


def run_probe(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Peaks and times of one configuration.

    Args:
        spec: `recipe` (a recipe's keys and values, its `model` a folder), `prompt_tokens`, and `model_config` for a
            folder that has to be made.
    """
    folder = Path(spec["recipe"]["model"])
    config = parse_recipe(spec["recipe"], base_dir=folder.parent, source="the memory configuration")
    device = choose_device(config.device)
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
    run_stages(config, prompt_tokens=int(spec["prompt_tokens"]), meter=meter)
    completion_tokens = config.prompts.per_step * config.rollout.group_size * config.rollout.max_new_tokens
    return {
        "stages": meter.peaks,
        "seconds": meter.seconds,
        "tokens_per_s": {stage: completion_tokens / meter.seconds[stage] for stage in ("sampling", "update")},
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
