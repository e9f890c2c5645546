"""The package vLLM as far as the engine in process sees it: no model, and it notes what is done to it.

`put_in_place` makes it the vLLM of this process for one test; `announce_version` only says which version is installed.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from grpo.rollout.vllm_sync import Checksum

VARIABLES = (
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_NO_USAGE_STATS",
    "VLLM_LOGGING_LEVEL",
    "VLLM_CPU_OMP_THREADS_BIND",
)
"""Of the environment, which a start of the engine sets."""
MODULES: Mapping[str, tuple[str, ...]] = {
    "vllm": ("SamplingParams", "TokensPrompt"),
    "vllm.config": ("VllmConfig",),
    "vllm.sampling_params": ("SamplingParams",),
    "vllm.v1": (),
    "vllm.v1.sample": (),
    "vllm.v1.sample.logits_processor": ("BatchUpdate", "LogitsProcessor", "process_dict_updates"),
}
"""What the engine and its processors import, but for LLM; each name is a class that keeps its arguments."""


class LlmDouble:
    """Is `vllm.LLM`, its engine and the engine's core at once.

    A step finishes the oldest request. Every use of the weights or the cache fails while it sleeps.
    """

    built: list[LlmDouble]
    """Of a class that `put_in_place` gave: all there are, oldest first."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.done: list[str] = []
        """sleep, wake, sync, add, step, abort, in order; repetitions of one once."""
        self.is_asleep = False
        self.at: dict[str, Callable[[], object]] = {}
        """What happens besides when one of these is done; what it gives back at wake is vLLM's answer."""
        self.llm_engine = self.engine_core = self
        self.model_config = SimpleNamespace(max_model_len=options["max_model_len"] or 64)
        self._requests: dict[str, Any] = {}
        self._version: int | None = None
        self.built.append(self)

    def sleep(self, *, level: int) -> None:
        assert level == 1, "deeper, an adapter's sync would not bring the weights back"
        assert not self._requests, "vLLM ends what runs when it is put to sleep"
        assert not self.is_asleep
        self._note("sleep")
        self.is_asleep = True

    def wake_up(self) -> object:
        assert self.is_asleep
        answer = self._note("wake")
        self.is_asleep = answer is False
        return answer

    def collective_rpc(self, method: str, *, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        if method == "grpo_weight_version":
            return [self._version]
        assert method == "grpo_load_weights"
        self._use("sync")
        self._version = None
        checksum = Checksum()
        num_checked = len(list(checksum.counted(args[0])))
        self._version = kwargs["version"]
        return [{"version": self._version, "checksum": checksum.value(), "num_checked": num_checked}]

    def reset_prefix_cache(self) -> bool:
        return not self._requests

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def add_request(self, request_id: str, prompt: Any, params: Any, *, lora_request: Any) -> None:
        self._use("add")
        self._requests[request_id] = params.given

    def step(self) -> list[Any]:
        self._use("step")
        request_id = next(iter(self._requests))
        given = self._requests.pop(request_id)
        tokens = [5] * given["max_tokens"]
        output = SimpleNamespace(
            token_ids=tokens, finish_reason="length", logprobs=[{5: SimpleNamespace(logprob=-1.0)} for _ in tokens]
        )
        return [SimpleNamespace(request_id=request_id, finished=True, outputs=[output])]

    def abort_request(self, request_ids: Iterable[str]) -> None:
        self._use("abort")
        for request_id in request_ids:
            del self._requests[request_id]

    def shutdown(self) -> None:
        pass

    def _use(self, what: str) -> None:
        assert not self.is_asleep, f"{what} while its weights and its cache are gone"
        self._note(what)

    def _note(self, what: str) -> object:
        if self.done[-1:] != [what]:
            self.done.append(what)
        return self.at.get(what, lambda: None)()


class _Given:
    """Any class of vLLM's that only carries arguments."""

    def __init__(self, **given: Any) -> None:
        self.given = given


class _RequestOutputKind:
    FINAL_ONLY = 2


def announce_version(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Write what pip leaves of an installed vLLM into a folder, and put that first on the import path."""
    facts = folder / f"vllm-{version}.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder)
    assert importlib.metadata.version("vllm") == version


def put_in_place(folder: Path, monkeypatch: pytest.MonkeyPatch, *, version: str = "0.32.0") -> type[LlmDouble]:
    """Have `import vllm` give this package until the end of the test; gives the class of its engines."""
    announce_version(folder, monkeypatch, version)
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")  # what it is set to later is put back too
    for name, members in MODULES.items():
        module = ModuleType(name)
        for member in members:
            setattr(module, member, type(member, (_Given,), {}))
        monkeypatch.setitem(sys.modules, name, module)
    ours = "grpo.rollout.vllm_processors"  # its classes have vLLM's as bases: imported anew, and forgotten
    monkeypatch.setitem(sys.modules, ours, ModuleType(ours))
    del sys.modules[ours]
    llm = type("LLM", (LlmDouble,), {"built": []})
    vars(sys.modules["vllm"])["LLM"] = llm
    vars(sys.modules["vllm.sampling_params"])["RequestOutputKind"] = _RequestOutputKind
    return llm
