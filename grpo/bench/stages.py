"""A recipe -> the stages of a run one by one, by the run's own code, on a model of random weights and random tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from grpo.batching import build_batch
from grpo.checkpoint import save_checkpoint
from grpo.config import RunConfig
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import SamplingParams
from grpo.rollout.transformers_engine import TransformersEngine
from grpo.runtime.devices import choose_attention, choose_device, choose_dtype
from grpo.runtime.models import has_flash_attention, load_model, load_tokenizer
from grpo.runtime.policy import Policy
from grpo.runtime.quantization import quantize
from grpo.types import Completion, Message, Prompt, RolloutGroup, ScoredGroup, Verdict
from grpo.update.beta import FixedBeta
from grpo.update.forward import reference_logprobs
from grpo.update.step import Updater, UpdateStats


class Stages:
    """Owns the policy, the engine and the updater of one configuration. Call `load`, then `make_engine`, then the rest
    in any order and as often as wanted; prompts and completions have their full length."""

    def __init__(self, config: RunConfig, *, prompt_tokens: int) -> None:
        self._config, self._prompt_tokens = config, prompt_tokens
        self.device = choose_device(config.device)

    def load(self) -> None:
        """The policy, onto the device."""
        config = self._config
        dtype = choose_dtype(config.dtype, self.device)
        flash = has_flash_attention(config.model, base_dir=config.base_dir)
        attention = choose_attention(config.attention, self.device, dtype, model_has_flash=flash)
        model = load_model(config.model, dtype=dtype, base_dir=config.base_dir, attention=attention)
        if config.quantization != "none":
            model = quantize(model, device=self.device, compute_dtype=dtype)
        model = model.to(self.device)  # pyright: ignore[reportArgumentType]
        self._vocabulary = model.config.get_text_config().vocab_size
        self.policy = Policy(model, config.trainable, seed=config.seed)

    def make_engine(self) -> None:
        """The engine with its copy of the weights."""
        rollout = self._config.rollout
        tokenizer = load_tokenizer(self._config.model, base_dir=self._config.base_dir)
        self._engine = TransformersEngine(
            self.policy, tokenizer, max_rows=rollout.max_rows, max_batch_tokens=rollout.max_batch_tokens
        )

    def prepare(self) -> None:
        """A step's prompts and its batch, and the updater."""
        config, rollout = self._config, self._config.rollout
        self._params = SamplingParams(
            end_token_ids=(2,),
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
        )
        self._updater = Updater(
            self.policy,
            {name: FixedBeta(value=0.02) for name in config.objectives},
            observed=dict.fromkeys(config.objectives, "k3"),
            params=self._params,
            update=config.update,
            optim=config.optim,
        )
        groups = random_groups(config, prompt_tokens=self._prompt_tokens, vocabulary=self._vocabulary)
        self._batch = build_batch(
            groups,
            {name: objective.weight for name, objective in config.objectives.items()},
            combine="decoupled",
            scale="group",
            micro_batch_tokens=config.update.micro_batch_tokens,
            max_new_tokens=rollout.max_new_tokens,
        )
        self._prompts = [EncodedPrompt(prompt=g.rollout.prompt, token_ids=g.rollout.prompt_token_ids) for g in groups]

    def sample(self) -> None:
        """A step's completions, each of the greatest length, which is what has to fit."""
        rollout = self._config.rollout
        params = SamplingParams(
            end_token_ids=(2,),
            max_new_tokens=rollout.max_new_tokens,
            min_new_tokens=rollout.max_new_tokens - 1,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
        )
        list(self._engine.sample(self._prompts, rollout.group_size, params=params, seed=self._config.seed))

    def reference(self) -> None:
        """The reference's log-probabilities of the largest micro-batch."""
        reference_logprobs(self.policy, self._batch.micro_batches[0].to(self.policy.device), self._params).sum()

    def update(self) -> UpdateStats:
        """An optimizer step."""
        return self._updater.step(self._batch)

    def sync(self) -> None:
        """The policy's weights into the engine."""
        self._engine.load_weights(self.policy)

    def save(self, folder: Path) -> None:
        """A checkpoint."""
        save_checkpoint(folder, self._updater, step=1, keep=1)


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
