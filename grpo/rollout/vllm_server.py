# pyright: basic, reportReturnType=false, reportArgumentType=false
"""One or more vLLM servers over HTTP: token ids in, token ids out, weights handed over as a file that both sides see.

Start as many as there are devices, each with its own port, and name them all in the recipe:

    CUDA_VISIBLE_DEVICES=1 python -m grpo.rollout.vllm_serve MODEL --port 8001 --enable-lora --max-lora-rank 16
    CUDA_VISIBLE_DEVICES=2 python -m grpo.rollout.vllm_serve MODEL --port 8002 --enable-lora --max-lora-rank 16

    rollout: {engine: {type: vllm_server, urls: [http://127.0.0.1:8001, http://127.0.0.1:8002]}}

They outlive the run, and serve one run at a time: a server that another run has synced, or that was started anew, is
found by the version of its weights. Servers on other machines need `transfer_dir`, a folder that they see too.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import os
import queue
import secrets
import tempfile
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import torch
from packaging.version import InvalidVersion, Version
from safetensors import SafetensorError
from safetensors.torch import save_file

from grpo.config import VllmServerConfig
from grpo.errors import ConfigError, EngineError
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import SamplingParams
from grpo.rollout.vllm_facts import ServerFacts, check_facts, check_shape, is_loopback, server_url
from grpo.rollout.vllm_law import check_law, extra_arguments, native_arguments
from grpo.rollout.vllm_sync import (
    Checksum,
    Deadline,
    Sync,
    SyncReport,
    adapter_of,
    check_report,
    choose_sync,
    whole_weights,
)
from grpo.runtime.distributed import Ranks
from grpo.runtime.policy import Policy
from grpo.runtime.seeding import derived_seed
from grpo.types import Completion, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")

MINIMUM_VERSION = "0.18"
MAX_REPLY_BYTES = 1 << 26
"""Of one answer: about 300 bytes a token, so 200,000 tokens."""
CONNECT_TIMEOUT_S = 10.0
CONTROL_TIMEOUT_S = 60.0
"""For a question about the server itself."""
ADAPTER_NAME = "grpo-policy"
"""Under which the servers know the adapter."""


class _NoConnection(EngineError):
    """The server could not be reached, or broke the connection: another one may answer."""


class _Refused(EngineError):
    """The server answered with an error."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class VllmServerEngine:
    """Samples through vLLM servers: K requests a prompt, each with its own seed, all to one server's prefix cache.

    Owns a thread with an event loop and the connections; the servers are not its own, and `close` leaves them running.
    Under several ranks every rank samples, and the main one alone syncs.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        config: VllmServerConfig,
        *,
        params: SamplingParams,
        ranks: Ranks,
    ) -> None:
        """Check the servers, and give them the policy's weights.

        Args:
            params: the law of training; each server is asked for a token by it.
        Raises:
            ConfigError: a server is not there, serves another model, or cannot do what the recipe asks.
            EngineError: the weights did not arrive.
        """
        check_law(params)
        self._tokenizer, self._config, self._ranks = tokenizer, config, ranks
        self._folder = _transfer_folder(config)
        self._version: int | None = None
        """Of the servers' weights; None while a sync is under way and after one that failed."""
        # a server outlives a run: two runs' versions must not be the same
        self._next_version = secrets.randbelow(1 << 40)
        self._loop = _LoopThread()
        try:
            self._fleet = self._loop.run(_open_fleet(config))
            facts = self._loop.run(self._fleet.ask_facts())
            self._sync = self._check(facts, policy, params)
            self._max_model_len = min(fact.max_model_len for fact in facts)
            self._check_room(1, params)
            self._dtype = getattr(torch, facts[0].dtype)
            self._has_adapter = False
            self.load_weights(policy)
            self._loop.run(self._fleet.probe(self._body((params.end_token_ids[0],), params, seed=0)))
        except BaseException:
            self.close()
            raise

    @property
    def sync(self) -> Sync:
        """What a sync carries."""
        return self._sync

    def sample(
        self, prompts: Sequence[EncodedPrompt], num_samples: int, *, params: SamplingParams, seed: int
    ) -> Iterator[RolloutGroup]:
        """See `RolloutEngine.sample`. Closing the iterator ends what the servers are still doing for it.

        Raises:
            ConfigError: a prompt and params.max_new_tokens exceed the servers' context.
            EngineError: the last sync failed, a server holds other weights, or one did not answer a request.
        """
        if self._version is None:
            raise EngineError("the servers' weights are not the policy's: the last weight sync failed.")
        check_law(params)
        self._check_room(max((len(prompt.token_ids) for prompt in prompts), default=0), params)
        self._loop.run(self._fleet.check_version(self._version))
        arrived: queue.SimpleQueue[RolloutGroup | BaseException | None] = queue.SimpleQueue()
        sampling = self._sample(prompts, num_samples, params, seed, arrived.put)
        task = self._loop.run(_started(sampling, arrived.put))
        try:
            while (item := arrived.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._loop.run(_ended(task))
        self._loop.run(self._fleet.check_version(self._version))  # one started anew meanwhile has the base model's

    def load_weights(self, policy: Policy) -> None:
        """Every server takes the policy's weights, shows that it has them, and drops what it computed with the old.

        Raises:
            EngineError: they did not arrive everywhere, or not in time.
        """
        self._version = None
        self._ranks.gather([None])  # nobody samples any more
        self._version = self._ranks.on_main(lambda: self._send(policy))

    def close(self) -> None:
        """Close the connections; the servers go on. May be called twice."""
        self._version = None
        if self._loop.is_running:
            fleet = getattr(self, "_fleet", None)
            if fleet is not None:
                self._loop.run(fleet.http.aclose())
            self._loop.close()

    def _check(self, facts: Sequence[ServerFacts], policy: Policy, params: SamplingParams) -> Sync:
        dtype = str(policy.compute_dtype).removeprefix("torch.")
        for server, fact in zip(self._fleet.servers, facts, strict=True):
            check_facts(fact, url=server.url, max_new_tokens=params.max_new_tokens)
            check_shape(fact, policy.causal_lm.config, dtype=dtype, url=server.url)
        if policy.trains_all_weights:
            return choose_sync(self._config.sync, policy, is_cpu=False)
        rank = adapter_of(policy).rank
        short = [
            server.url
            for server, fact in zip(self._fleet.servers, facts, strict=True)
            if (fact.max_lora_rank or 0) < rank or not fact.has_base_weights
        ]
        on_cpu = any(fact.device == "cpu" for fact in facts)
        sync = choose_sync(self._config.sync, policy, is_cpu=on_cpu or bool(short))
        if sync == "adapter" and short:
            raise ConfigError(
                f"rollout.engine.sync is adapter, but {short[0]} has no room for one of rank {rank}, or no longer "
                "holds the base model's weights. Start it anew with --enable-lora and --max-lora-rank of at least "
                f"{rank}, or set sync to merged."
            )
        return sync

    def _check_room(self, prompt_tokens: int, params: SamplingParams) -> None:
        if prompt_tokens + params.max_new_tokens > self._max_model_len:
            raise ConfigError(
                f"a prompt of {prompt_tokens} tokens and rollout.max_new_tokens = {params.max_new_tokens} exceed the "
                f"{self._max_model_len} tokens that the servers have room for. Set rollout.max_new_tokens lower, or "
                "start them with a higher --max-model-len (at most the model's context)."
            )

    def _body(self, token_ids: Sequence[int], params: SamplingParams, *, seed: int) -> dict[str, Any]:
        extra = extra_arguments(params)
        return {
            "prompt": list(token_ids),
            **native_arguments(params, seed=seed),
            "return_token_ids": True,
            **({"vllm_xargs": extra} if extra else {}),
            **({"model": ADAPTER_NAME} if self._sync == "adapter" else {}),
        }

    def _send(self, policy: Policy) -> int:
        version = self._next_version = self._next_version + 1
        deadline = Deadline(self._config.sync_timeout_s)
        try:
            with tempfile.TemporaryDirectory(prefix="grpo-weights-", dir=self._folder) as folder:
                with deadline.phase(f"the trainer to write its weights to {self._folder}"):
                    transfer = _written(policy, Path(folder), self._sync, self._dtype, version, deadline)
                self._loop.run(
                    self._fleet.take(transfer, deadline, registers=self._sync == "adapter" and not self._has_adapter)
                )
        except (OSError, SafetensorError) as exc:
            raise EngineError(
                f"the weights could not be written to {self._folder}: {exc}. Make room there, or name another folder "
                "that the servers see too in rollout.engine.transfer_dir."
            ) from exc
        self._has_adapter = self._sync == "adapter"
        return version

    async def _sample(
        self,
        prompts: Sequence[EncodedPrompt],
        num_samples: int,
        params: SamplingParams,
        seed: int,
        put: Callable[[RolloutGroup], None],
    ) -> None:
        async with asyncio.TaskGroup() as tasks:
            for prompt in prompts:
                server = await self._fleet.reserve(num_samples)
                tasks.create_task(self._sample_group(server, prompt, num_samples, params, seed, put))

    async def _sample_group(
        self,
        server: _Server,
        prompt: EncodedPrompt,
        num_samples: int,
        params: SamplingParams,
        seed: int,
        put: Callable[[RolloutGroup], None],
    ) -> None:
        async with asyncio.TaskGroup() as tasks:
            rows = [
                tasks.create_task(self._fleet.row(server, self._body(prompt.token_ids, params, seed=row_seed)))
                for row_seed in (derived_seed(seed, prompt.prompt.id, index) for index in range(num_samples))
            ]
        completions = tuple(self._completion(*row.result(), prompt, params) for row in rows)
        put(RolloutGroup(prompt=prompt.prompt, prompt_token_ids=prompt.token_ids, completions=completions))

    def _completion(self, url: str, reply: Any, prompt: EncodedPrompt, params: SamplingParams) -> Completion:
        try:
            (choice,) = reply["choices"]
            token_ids = tuple(int(token) for token in choice["token_ids"])
            logprobs = tuple(float(logprob) for logprob in choice["logprobs"]["token_logprobs"])
            asked, reason = tuple(choice["prompt_token_ids"]), choice["finish_reason"]
        except (KeyError, TypeError, ValueError) as exc:
            raise EngineError(f"{url} answered without token ids and log-probabilities ({exc!r}): no vLLM?") from exc
        if asked != prompt.token_ids:
            raise EngineError(f"{url} sampled after another prompt than {prompt.prompt.id!r}'s token ids.")
        if len(logprobs) != len(token_ids) or not all(-9999.0 < logprob <= 1e-3 for logprob in logprobs):
            # -9999 is what vLLM writes for minus infinity
            raise EngineError(f"{url} answered log-probabilities of {prompt.prompt.id!r} that are none.")
        has_ended = bool(token_ids) and token_ids[-1] in params.end_token_ids
        if reason != ("stop" if has_ended else "length") or (not has_ended and len(token_ids) != params.max_new_tokens):
            raise EngineError(f"{url} gave up a completion after {len(token_ids)} tokens: {reason}.")
        return Completion(
            token_ids=token_ids,
            text=str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True)),
            sampler_logprobs=logprobs,
            finish_reason="stop" if has_ended else "length",
        )


def check_servers(config: VllmServerConfig, *, max_new_tokens: int) -> None:
    """What can be known before the model's weights are read: every server is there, and was started for this.

    Raises:
        ConfigError: one is not.
    """
    _transfer_folder(config)
    loop = _LoopThread()
    try:
        fleet = loop.run(_open_fleet(config))
        try:
            for server, facts in zip(fleet.servers, loop.run(fleet.ask_facts()), strict=True):
                check_facts(facts, url=server.url, max_new_tokens=max_new_tokens)
        finally:
            loop.run(fleet.http.aclose())
    finally:
        loop.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Transfer:
    """A written sync."""

    folder: Path
    method: str
    arguments: Mapping[str, Any]
    version: int
    checksum: str


def _written(
    policy: Policy, folder: Path, sync: Sync, dtype: torch.dtype, version: int, deadline: Deadline
) -> _Transfer:
    checksum = Checksum()
    arguments: dict[str, Any] = {"version": version}
    if sync == "adapter":
        adapter = adapter_of(policy)
        path = folder / "adapter_model.safetensors"  # peft's names: vLLM reads the first one as a folder of peft's
        tensors = {name: tensor.cpu().contiguous() for name, tensor in checksum.counted(adapter.tensors.items())}
        arguments |= {"rank": adapter.rank, "alpha": adapter.alpha}
        (peft_config,) = policy.model.peft_config.values()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        peft_config.save_pretrained(str(folder))
    else:
        path = folder / "weights.safetensors"
        weights = checksum.counted(deadline.watched(whole_weights(policy, dtype)))
        tensors = {name: tensor.cpu().contiguous() for name, tensor in weights}
    save_file(tensors, path)
    return _Transfer(
        folder=folder,
        method="grpo_load_adapter_file" if sync == "adapter" else "grpo_load_weights_file",
        arguments={**arguments, "path": str(path)},
        version=version,
        checksum=checksum.value(),
    )


class _Server:
    """One server's address, and how many rows this engine has given it."""

    def __init__(self, url: str, http: httpx.AsyncClient, *, key: str | None, max_connections: int) -> None:
        self.url, self._http, self._key = url, http, key
        self.outstanding = 0
        self.slots = asyncio.Semaphore(max_connections)

    async def exchange(self, method: str, path: str, body: Any = None, *, limit_s: float = CONTROL_TIMEOUT_S) -> Any:
        """One request, one JSON answer.

        Raises:
            EngineError: none came; with the server and the cause.
        """
        try:
            async with (
                asyncio.timeout(limit_s),
                self._http.stream(method, self.url + path, json=body) as response,
            ):
                content = await self._capped(response, path)
        except TimeoutError as exc:
            raise EngineError(f"{self.url}{path} did not answer within {limit_s:g} s.") from exc
        except httpx.TransportError as exc:
            raise _NoConnection(f"{self.url}{path}: {type(exc).__name__} {exc}") from exc
        if response.status_code != 200:
            said = content[:600].decode(errors="replace")
            said = said.replace(self._key, "[key]") if self._key else said
            raise _Refused(f"{self.url}{path} answered {response.status_code}: {said}", status=response.status_code)
        try:
            return json.loads(content)
        except ValueError as exc:
            raise EngineError(f"{self.url}{path} answered no JSON: {exc}.") from exc

    async def rpc(self, method: str, arguments: Mapping[str, Any] | None = None, *, limit_s: float) -> list[Any]:
        """The answers of the server's workers."""
        body = {"method": method, "kwargs": dict(arguments or {})}
        reply = await self.exchange("POST", "/collective_rpc", body, limit_s=limit_s)
        results = reply.get("results") if isinstance(reply, dict) else None
        if not isinstance(results, list) or not results:
            raise EngineError(f"{self.url}/collective_rpc answered {reply!r}, and no results of its workers.")
        return results

    async def _capped(self, response: httpx.Response, path: str) -> bytes:
        content = bytearray()
        async for part in response.aiter_raw():
            content += part
            if len(content) > MAX_REPLY_BYTES:
                raise EngineError(f"{self.url}{path} answered more than {MAX_REPLY_BYTES} bytes.")
        return bytes(content)


class _Fleet:
    """The servers of a run. Lives in the event loop."""

    def __init__(self, config: VllmServerConfig) -> None:
        key = _api_key(config)
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.http = httpx.AsyncClient(
            headers=headers,
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        self._config = config
        self._freed = asyncio.Event()
        self.servers = [
            _Server(server_url(url), self.http, key=key, max_connections=config.max_connections) for url in config.urls
        ]

    async def ask_facts(self) -> list[ServerFacts]:
        """Of each server. Raises ConfigError for one that is not there or was started for something else."""
        return [await _facts_of(server) for server in self.servers]

    async def probe(self, body: Mapping[str, Any]) -> None:
        """A token of each. Raises ConfigError where a server does not take the law."""
        for server in self.servers:
            try:
                await server.exchange("POST", "/v1/completions", {**body, "max_tokens": 1}, limit_s=CONTROL_TIMEOUT_S)
            except _Refused as exc:
                raise ConfigError(
                    f"the server cannot sample as the recipe asks: {exc}. A processor of your own must be named when "
                    "it is started (python -m grpo.rollout.vllm_serve MODEL --processor PACKAGE.MODULE:NAME)."
                ) from exc

    async def reserve(self, num_rows: int) -> _Server:
        """The server with the fewest rows outstanding, once it has a free connection."""
        while min(server.outstanding for server in self.servers) >= self._config.max_connections:
            self._freed.clear()
            await self._freed.wait()
        server = min(self.servers, key=lambda server: server.outstanding)
        server.outstanding += num_rows
        return server

    async def row(self, server: _Server, body: Mapping[str, Any]) -> tuple[str, Any]:
        """(who answered, the answer); a broken connection is tried once more, on another server where there is one.

        The seed makes the second answer the first one's equal.
        """
        try:
            try:
                return await self._ask(server, body)
            except _NoConnection as first:
                others = [other for other in self.servers if other is not server] or [server]
                second = min(others, key=lambda other: other.outstanding)
                try:
                    return await self._ask(second, body)
                except _NoConnection as exc:
                    raise EngineError(f"no server answered: {first}; then {exc}.") from exc
        finally:
            server.outstanding -= 1
            self._freed.set()

    async def _ask(self, server: _Server, body: Mapping[str, Any]) -> tuple[str, Any]:
        async with server.slots:
            limit_s = self._config.request_timeout_s
            return server.url, await server.exchange("POST", "/v1/completions", body, limit_s=limit_s)

    async def check_version(self, version: int) -> None:
        """Raises EngineError where a server holds other weights than the last sync's."""
        for server in self.servers:
            _check_version(server, await server.rpc("grpo_weight_version", limit_s=CONTROL_TIMEOUT_S), version)

    async def take(self, transfer: _Transfer, deadline: Deadline, *, registers: bool) -> None:
        """Every server takes the weights, side by side. Raises EngineError where one did not; the others have them."""
        outcomes = await asyncio.gather(
            *(_take(server, transfer, copy.copy(deadline), registers=registers) for server in self.servers),
            return_exceptions=True,
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome


async def _take(server: _Server, transfer: _Transfer, deadline: Deadline, *, registers: bool) -> None:
    """Pause, take, verify, forget, resume."""

    async def phase(what: str, ask: Callable[[float], Awaitable[Item]]) -> Item:
        with deadline.phase(f"{server.url} to {what}"):
            try:
                async with asyncio.timeout(deadline.left_s + 0.01):  # past the end, so that check() agrees
                    return await ask(math.inf)
            except TimeoutError:
                deadline.check()
                raise

    def post(path: str, body: Any = None) -> Callable[[float], Awaitable[Any]]:
        return lambda limit_s: server.exchange("POST", path, body, limit_s=limit_s)

    def call(method: str, arguments: Mapping[str, Any] | None = None) -> Callable[[float], Awaitable[list[Any]]]:
        return lambda limit_s: server.rpc(method, arguments, limit_s=limit_s)

    await phase("pause", post("/pause?mode=wait&clear_cache=false"))
    try:
        if registers:
            await phase("make room for the adapter", lambda _: _register_adapter(server, transfer.folder))
        for report in await phase("take the weights", call(transfer.method, transfer.arguments)):
            check_report(_report(report, server), version=transfer.version, checksum=transfer.checksum)
        if registers:
            held = await phase("list its adapters", call("list_loras"))
            if any(each != "{1}" for each in held):
                raise EngineError(f"{server.url} holds other adapters than the run's ({held}). Start it anew.")
        # a prompt's keys and values of the old weights are as wrong as the old weights
        if (await phase("drop its prefix cache", post("/reset_prefix_cache"))) != {"success": True}:
            raise EngineError(f"{server.url} kept its prefix cache of the old weights: requests are still running.")
        versions = await phase("tell its version", call("grpo_weight_version"))
        _check_version(server, versions, transfer.version)
    except BaseException as exc:
        try:  # others may use the server, and the next sync pauses it itself
            await server.exchange("POST", "/resume", limit_s=5.0)
        except EngineError as second:
            exc.add_note(f"The server is still paused: {second}")
        raise
    await phase("resume", post("/resume"))


async def _register_adapter(server: _Server, folder: Path) -> None:
    """Make the adapter's name known, so that requests can ask for it."""
    try:
        body = {"lora_name": ADAPTER_NAME, "lora_path": str(folder), "load_inplace": False}
        await server.exchange("POST", "/v1/load_lora_adapter", body, limit_s=math.inf)
    except _Refused as exc:
        if exc.status != 400 or "already" not in str(exc):  # by an earlier run
            raise
    except EngineError as exc:
        if "no JSON" not in str(exc):  # it answers in plain words
            raise


async def _facts_of(server: _Server) -> ServerFacts:
    start = "Start one: python -m grpo.rollout.vllm_serve MODEL --port PORT"
    try:
        version = await server.exchange("GET", "/version")
        models = await server.exchange("GET", "/v1/models")
        found, _ = Version(str(version["version"])), models["data"]
    except _NoConnection as exc:
        raise ConfigError(f"no vLLM server answers at {server.url} ({exc}). {start}") from exc
    except _Refused as exc:
        if exc.status in (401, 403):
            raise ConfigError(
                f"{server.url} does not take our key ({exc}). Name the key in rollout.engine.api_key."
            ) from exc
        raise ConfigError(f"{server.url} is no vLLM server ({exc}). {start}") from exc
    except (EngineError, InvalidVersion, KeyError, TypeError) as exc:
        raise ConfigError(f"{server.url} is no vLLM server ({exc}). {start}") from exc
    if found < Version(MINIMUM_VERSION):
        raise ConfigError(f"{server.url} runs vLLM {found}, but {MINIMUM_VERSION} or newer is needed. Upgrade it.")
    try:
        facts = await server.rpc("grpo_facts", limit_s=CONTROL_TIMEOUT_S)
        return ServerFacts(**facts[0])
    except (EngineError, TypeError) as exc:
        raise ConfigError(
            f"{server.url} cannot take weights ({exc}): it was not started by this version's "
            f"grpo.rollout.vllm_serve. {start}"
        ) from exc


def _report(answer: Any, server: _Server) -> SyncReport:
    try:
        return SyncReport(**answer)
    except TypeError as exc:
        raise EngineError(f"{server.url} answered the weight sync with {answer!r}.") from exc


def _check_version(server: _Server, versions: Sequence[Any], version: int) -> None:
    if any(str(each) != str(version) for each in versions):  # numbers come as text
        raise EngineError(
            f"{server.url} holds weights of version {versions}, not {version}: another run has synced its own, or the "
            "server was started anew. One run has its servers to itself; go on with --resume."
        )


def _api_key(config: VllmServerConfig) -> str | None:
    if config.api_key is None:
        return None
    name = config.api_key.removeprefix("env:")
    if not os.environ.get(name):
        raise ConfigError(f"rollout.engine.api_key names the environment variable {name}, which is not set.")
    for url in config.urls:
        if url.startswith("http://") and not is_loopback(url):
            raise ConfigError(f"rollout.engine.api_key would go to {url} in the clear. Use https, or no key.")
    return os.environ[name]


def _transfer_folder(config: VllmServerConfig) -> Path:
    if config.transfer_dir is None:
        far = [url for url in config.urls if not is_loopback(url)]
        if far:
            raise ConfigError(
                f"{far[0]} is another machine: name a folder that it sees too in rollout.engine.transfer_dir (for "
                "one on this machine under another name, /dev/shm)."
            )
        shared_memory = Path("/dev/shm")
        return shared_memory if shared_memory.is_dir() else Path(tempfile.gettempdir())
    folder = config.transfer_dir.expanduser().resolve()
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"rollout.engine.transfer_dir {folder} is no folder that can be written to.")
    return folder


async def _open_fleet(config: VllmServerConfig) -> _Fleet:
    return _Fleet(config)


async def _started(work: Coroutine[Any, Any, None], put: Callable[[BaseException | None], None]) -> asyncio.Task[None]:
    """`put` is told of the end: None, or what went wrong."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda ended: put(None if ended.cancelled() else _cause(ended.exception())))
    return task


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def _cause(error: BaseException | None) -> BaseException | None:
    """The first error of a group of tasks."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class _LoopThread:
    """An event loop in a thread of its own, for callers that have none."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-server-engine", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, Item]) -> Item:
        """What it returns; an interrupted caller ends it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the thread; nothing may be running in it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
