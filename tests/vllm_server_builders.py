"""What the tests of the vLLM server engine share: servers that fit the tiny model, and engines that are closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders import END, make_policy
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vllm_double import Exchange, VllmDouble, completion

from grpo.config import VllmServerConfig
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import SamplingParams
from grpo.rollout.vllm_facts import ServerFacts, shape_of
from grpo.rollout.vllm_law import PROCESSOR
from grpo.rollout.vllm_server import VllmServerEngine
from grpo.runtime.distributed import Ranks
from grpo.runtime.policy import Policy
from grpo.types import RolloutGroup

PARAMS = SamplingParams(end_token_ids=(END,), max_new_tokens=12)
Open = Callable[..., VllmServerEngine]
"""See `Bench.engines`."""
Answer = Callable[[Exchange], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The trainer's side, made once a file."""

    policy: Policy
    """The tiny model with an adapter of rank 4."""
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, model_dir: Path) -> Bench:
        return cls(policy=make_policy(model_dir), tokenizer=AutoTokenizer.from_pretrained(model_dir))

    @property
    def facts(self) -> ServerFacts:
        """Of a server on a GPU, with room for the policy's adapter."""
        return ServerFacts(
            shape=shape_of(self.policy.causal_lm.config),
            dtype="float32",
            device="cuda",
            max_model_len=256,
            logprobs_mode="processed_logprobs",
            logits_processors=[PROCESSOR],
            max_lora_rank=8,
            num_shards=1,
            has_base_weights=True,
        )

    @contextmanager
    def engines(self) -> Iterator[Open]:
        """`build(server, ..., of=policy, params=..., longest_prompt=..., **config)`; all are closed at the end."""
        engines: list[VllmServerEngine] = []

        def build(
            *servers: VllmDouble,
            of: Policy | None = None,
            params: SamplingParams = PARAMS,
            longest_prompt: int = 1,
            **options: Any,
        ) -> VllmServerEngine:
            engine = VllmServerEngine(
                of or self.policy,
                self.tokenizer,
                make_config(*servers, **{"sync": "merged", **options}),
                params=params,
                ranks=Ranks(use_cpu=True),
                longest_prompt=longest_prompt,
            )
            engines.append(engine)
            return engine

        try:
            yield build
        finally:
            for engine in engines:
                engine.close()


def make_config(*servers: VllmDouble, **options: Any) -> VllmServerConfig:
    return VllmServerConfig(**{"type": "vllm_server", "urls": tuple(server.url for server in servers), **options})


def sample(
    engine: VllmServerEngine, prompts: Sequence[EncodedPrompt], *, k: int = 4, params: SamplingParams = PARAMS
) -> list[RolloutGroup]:
    groups = {group.prompt.id: group for group in engine.sample(prompts, k, params=params, seed=7)}
    return [groups[prompt.prompt.id] for prompt in prompts]


def told(error: BaseException) -> str:
    """The error, its notes and everything that it came from, as a traceback would show it."""
    texts: list[str] = []
    link: BaseException | None = error
    while link is not None:
        texts += [str(link), *getattr(link, "__notes__", [])]
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "\n".join(texts)


def says(status: int, body: Any) -> Answer:
    return lambda exchange: exchange.reply(status, body)


def changed(**fields: Any) -> Answer:
    """A good answer but for these fields of its one choice; a function is given the good value."""

    def answer(exchange: Exchange) -> None:
        body = completion(exchange.asked.body)
        choice = body["choices"][0]
        for name, value in fields.items():
            choice[name] = value(choice[name]) if callable(value) else value
        exchange.reply(200, body)

    return answer
