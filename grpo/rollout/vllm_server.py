"""One or more vLLM servers over HTTP: token ids in, token ids out, weights handed over as a file that both sides see.

Start as many as there are devices, each with its own port, and name them all in the recipe:

    CUDA_VISIBLE_DEVICES=1 python -m grpo.rollout.vllm_serve MODEL --port 8001 --enable-lora --max-lora-rank 16
    CUDA_VISIBLE_DEVICES=2 python -m grpo.rollout.vllm_serve MODEL --port 8002 --enable-lora --max-lora-rank 16

    rollout: {engine: {type: vllm_server, urls: [http://127.0.0.1:8001, http://127.0.0.1:8002]}}

They outlive the run, and serve one run at a time: a server that another run has synced, or that was started anew, is
found by the version of its weights. Servers on other machines need `transfer_dir`, a folder that they see too.
"""

from __future__ import annotations

import queue
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from grpo.config import VllmServerConfig
from grpo.errors import ConfigError, EngineError
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import SamplingParams
from grpo.rollout.vllm_facts import ServerFacts, check_facts, check_shape
from grpo.rollout.vllm_fleet import Fleet, Reply
from grpo.rollout.vllm_law import check_law, extra_arguments, native_arguments
from grpo.rollout.vllm_loop import LoopThread
from grpo.rollout.vllm_sync import Deadline, Sync, adapter_of, choose_sync
from grpo.rollout.vllm_take import ADAPTER_NAME, OtherBaseModel
from grpo.rollout.vllm_transfer import transfer_folder, write_transfer
from grpo.runtime.distributed import Ranks
from grpo.runtime.policy import Policy
from grpo.runtime.seeding import derived_seed
from grpo.types import Completion, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOWEST_LOGPROB = -9999.0
"""What vLLM writes for minus infinity."""
ROUNDING = 1e-3
"""By which a log-probability may exceed 0."""


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
        longest_prompt: int = 1,
    ) -> None:
        """Check the servers, and give them the policy's weights.

        Args:
            params: the law of training; each server is asked for a token by it.
            longest_prompt: tokens that must fit the servers' context beside a completion.
        Raises:
            ConfigError: a server is not there, serves another model, or cannot do what the recipe asks.
            EngineError: the weights did not arrive.
        """
        self._tokenizer, self._config, self._ranks = tokenizer, config, ranks
        self._version: int | None = None
        """Of the servers' weights; None while a sync is under way and after one that failed."""
        # a server outlives a run: two runs' versions must not be the same
        self._next_version = secrets.randbelow(1 << 40)
        self._loop = LoopThread()
        try:
            ranks.together(lambda: self._open(policy, params, longest_prompt))
            self._send_first(policy)
            ranks.together(lambda: self._probe(params))
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
            EngineError: the last sync failed, a server holds other weights or did not answer in time, or none is left.
        """
        if self._version is None:
            raise EngineError("the servers' weights are not the policy's: the last weight sync failed.")
        check_law(params)
        self._check_room(max((len(prompt.token_ids) for prompt in prompts), default=0), params)
        self._loop.run(self._fleet.check_version(self._version))
        fields = self._fields(params)
        bodies = (
            [
                {**fields, "prompt": list(prompt.token_ids), "seed": derived_seed(seed, prompt.prompt.id, index)}
                for index in range(num_samples)
            ]
            for prompt in prompts
        )
        arrived: queue.SimpleQueue[tuple[int, list[Reply]] | BaseException | None] = queue.SimpleQueue()
        sampling = self._loop.start(self._fleet.sample(bodies, arrived.put), arrived.put)
        try:
            while (item := arrived.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                place, replies = item
                yield self._group(prompts[place], replies, params)
        finally:
            self._loop.end(sampling)
        self._loop.run(self._fleet.check_version(self._version))  # one started anew meanwhile has the base model's

    def load_weights(self, policy: Policy) -> None:
        """Every server takes the policy's weights, shows that it has them, and drops what it computed with the old.

        Raises:
            EngineError: they did not arrive, or not in time.
        """
        self._version = None
        self._ranks.gather([None])  # nobody samples any more
        self._version, urls = self._ranks.on_main(lambda: self._send(policy))
        self._fleet.keep(urls)

    def close(self) -> None:
        """Close the connections; the servers go on. May be called twice."""
        self._version = None
        fleet: Fleet | None = getattr(self, "_fleet", None)  # there is none where a URL or the key was refused
        if fleet is not None and self._loop.is_running:
            self._loop.run(fleet.aclose())
        self._loop.close()

    def _open(self, policy: Policy, params: SamplingParams, longest_prompt: int) -> None:
        check_law(params)
        self._fleet = Fleet(self._config)
        self._folder = transfer_folder(self._config)
        facts = self._loop.run(self._fleet.ask_facts())
        dtype = str(policy.compute_dtype).removeprefix("torch.")
        for server, fact in zip(self._fleet.servers, facts, strict=True):
            check_facts(fact, url=server.url, max_new_tokens=params.max_new_tokens)
            check_shape(fact, policy.causal_lm.config, dtype=dtype, url=server.url)
        self._sync: Sync = self._chosen_sync(policy, facts)
        self._dtype: torch.dtype = policy.compute_dtype
        self._max_model_len = min(fact.max_model_len for fact in facts)
        self._check_room(longest_prompt, params)

    def _send_first(self, policy: Policy) -> None:
        """Raises ConfigError where an adapter finds another model than the recipe's; else as `load_weights`."""
        try:
            self.load_weights(policy)
        except OtherBaseModel as exc:
            raise ConfigError(f"{exc} Start it with the recipe's model, or set rollout.engine.sync to merged.") from exc

    def _chosen_sync(self, policy: Policy, facts: Sequence[ServerFacts]) -> Sync:
        if not policy.learns_one_adapter:
            return choose_sync(self._config.sync, policy, is_cpu=False)
        rank = adapter_of(policy).rank
        told = zip(self._fleet.servers, facts, strict=True)
        unfit = [server.url for server, fact in told if not fact.takes_adapters(rank)]
        on_cpu = any(fact.device == "cpu" for fact in facts)
        sync = choose_sync(self._config.sync, policy, is_cpu=on_cpu or bool(unfit))
        if sync == "adapter" and unfit:
            raise ConfigError(
                f"rollout.engine.sync is adapter, but {unfit[0]} has no room for one of rank {rank}, is split over "
                "several devices, or no longer holds the base model's weights. Start it anew with --enable-lora and "
                f"--max-lora-rank of at least {rank}, or set sync to merged."
            )
        return sync

    def _probe(self, params: SamplingParams) -> None:
        """A token of each server. Raises ConfigError where one does not take the law, or answers otherwise."""
        one = replace(params, max_new_tokens=1, min_new_tokens=0)
        prompt = list(params.end_token_ids[:1])
        for reply in self._loop.run(self._fleet.probe({**self._fields(one), "prompt": prompt, "seed": 0})):
            try:
                self._completion(reply, prompt, one)
            except EngineError as exc:
                raise ConfigError(f"{exc} Start it with python -m grpo.rollout.vllm_serve.") from exc

    def _check_room(self, prompt_tokens: int, params: SamplingParams) -> None:
        if prompt_tokens + params.max_new_tokens > self._max_model_len:
            raise ConfigError(
                f"a prompt of {prompt_tokens} tokens and rollout.max_new_tokens = {params.max_new_tokens} exceed the "
                f"{self._max_model_len} tokens that the servers have room for. Set rollout.max_new_tokens lower, or "
                "start them with a higher --max-model-len (at most the model's context)."
            )

    def _fields(self, params: SamplingParams) -> dict[str, Any]:
        """What all requests of a law share."""
        extra = extra_arguments(params)
        return {
            **native_arguments(params, seed=0),
            "return_token_ids": True,
            **({"vllm_xargs": extra} if extra else {}),
            **({"model": ADAPTER_NAME} if self._sync == "adapter" else {}),
        }

    def _send(self, policy: Policy) -> tuple[int, list[str]]:
        """The new version, and the URLs of those that have it."""
        version = self._next_version = self._next_version + 1
        deadline = Deadline(self._config.sync_timeout_s)
        try:
            with tempfile.TemporaryDirectory(prefix="grpo-weights-", dir=self._folder) as folder:
                with deadline.phase(f"the trainer to write its weights to {self._folder}"):
                    transfer = write_transfer(
                        policy, Path(folder), sync=self._sync, dtype=self._dtype, version=version, deadline=deadline
                    )
                return version, self._loop.run(self._fleet.take(transfer, deadline))
        except (OSError, SafetensorError) as exc:
            raise EngineError(
                f"the weights could not be written to {self._folder}: {exc}. Make room there, or name another folder "
                "that the servers see too in rollout.engine.transfer_dir."
            ) from exc

    def _group(self, prompt: EncodedPrompt, replies: Sequence[Reply], params: SamplingParams) -> RolloutGroup:
        return RolloutGroup(
            prompt=prompt.prompt,
            prompt_token_ids=prompt.token_ids,
            completions=tuple(self._completion(reply, prompt.token_ids, params) for reply in replies),
        )

    def _completion(self, reply: Reply, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Raises EngineError where the answer is not a whole completion of this prompt."""
        url, quoted = reply.server.url, reply.server.quoted
        try:
            (choice,) = reply.body["choices"]
            token_ids = tuple(int(token) for token in choice["token_ids"])
            logprobs = tuple(float(logprob) for logprob in choice["logprobs"]["token_logprobs"])
            asked, reason = tuple(choice["prompt_token_ids"]), choice["finish_reason"]
        except (KeyError, TypeError, ValueError):  # their texts quote the answer
            raise EngineError(
                f"{url} answered without token ids and log-probabilities: {quoted(reply.body)}."
            ) from None
        if asked != tuple(prompt_ids):
            raise EngineError(f"{url} sampled after another prompt than the one that it was sent.")
        if len(logprobs) != len(token_ids) or not all(LOWEST_LOGPROB < each <= ROUNDING for each in logprobs):
            raise EngineError(f"{url} answered with what are no log-probabilities: {quoted(logprobs)}.")
        has_ended = bool(token_ids) and token_ids[-1] in params.end_token_ids
        if reason != ("stop" if has_ended else "length") or (not has_ended and len(token_ids) != params.max_new_tokens):
            raise EngineError(f"{url} gave up a completion after {len(token_ids)} tokens: {quoted(reason)}.")
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
    fleet = Fleet(config)
    loop = LoopThread()
    try:
        transfer_folder(config)
        for server, facts in zip(fleet.servers, loop.run(fleet.ask_facts()), strict=True):
            check_facts(facts, url=server.url, max_new_tokens=max_new_tokens)
    finally:
        loop.run(fleet.aclose())
        loop.close()
