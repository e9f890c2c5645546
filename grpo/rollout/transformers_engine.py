"""Sampling with transformers in the trainer's process, decoding through `generate`'s `custom_generate` seam.

Temperature, top-p, top-k and min-p are `generate`'s native arguments; the loop and the drawing are ours (`decoding`,
`drawing`): a prompt is computed and read once for its K samples, ended rows make room for waiting prompts, every
completion draws from its own seed, and a group leaves as soon as it is complete.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from grpo.errors import ModelError, OutOfMemory
from grpo.prompt_images import PromptImages
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import SamplingParams
from grpo.rollout.decoding import Row, Work, decode_plain, decode_shared
from grpo.rollout.model_copy import engine_model, take_weights
from grpo.rollout.shared_prompts import UnsupportedAttention, use_shared_prompts
from grpo.runtime.out_of_memory import cause_of, is_out_of_memory
from grpo.runtime.policy import Policy
from grpo.runtime.seeding import derived_seed
from grpo.types import Completion, RolloutGroup

logger = logging.getLogger(__name__)

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Mean difference of log-probabilities in the probe, in nats. A wrong mask, position or score gives several tenths."""
ROUNDED_TOLERANCE = 0.2
"""The same in dtypes of fewer digits; bfloat16 alone gives some 0.05."""


class TransformersEngine:
    """Samples in process from a model of its own that holds the policy's weights, adapters merged.

    Merged weights cost no adapter products per token, and sampling never touches the policy's own modules. A model
    whose cache or attention is not the plain one is decoded with its own, more slowly; one line of log says so.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rows: int = 64,
        max_batch_tokens: int | None = None,
        image_prompt: EncodedPrompt | None = None,
    ) -> None:
        """Build the model, and try out how it can be decoded.

        Args:
            max_rows: rows decoded side by side, at least one group.
            max_batch_tokens: most tokens that those rows may come to, each with its prompt and max_new_tokens; at
                least one group. None: no limit.
            image_prompt: for a model whose prompts may show images, any such prompt, to try it out with.
        Raises:
            ModelError: prompts may show images, and with them the model does not say what it says by itself.
        """
        self._tokenizer = tokenizer
        self._max_rows, self._max_batch_tokens = max_rows, max_batch_tokens
        self._model = engine_model(policy)
        given = self._model.config._attn_implementation
        obstacle = use_shared_prompts(self._model)
        obstacle = obstacle or self._probe(self._probe_prompts())
        if obstacle is None and image_prompt is not None:
            obstacle = self._probe([image_prompt.token_ids] * 2, image_prompt.images)
        self.shares_prompts = obstacle is None
        """Whether a prompt is computed once for its samples."""
        if obstacle is not None:
            if image_prompt is not None:
                raise ModelError(
                    f"{type(self._model).__name__} cannot be sampled from with images: {obstacle}. Name a "
                    "vision-language model that keeps plain keys and values in every layer."
                )
            if given is not None and self._model.config._attn_implementation != given:
                self._model.set_attn_implementation(given)
            logger.info(
                "%s is sampled from with its own cache, a prompt computed once per sample: %s",
                type(self._model).__name__,
                obstacle,
            )

    def load_weights(self, policy: Policy) -> None:
        """Copy the policy's current weights, adapters merged in float32 and then rounded to the engine's dtype."""
        take_weights(self._model, policy)

    def close(self) -> None:
        """Free the copies."""
        del self._model

    def sample(
        self, prompts: Sequence[EncodedPrompt], num_samples: int, *, params: SamplingParams, seed: int
    ) -> Iterator[RolloutGroup]:
        """See `RolloutEngine.sample`. Where memory runs out, what is left goes on in half as many rows side by side; a
        completion does not depend on that.

        Raises:
            OutOfMemory: a single group does not fit.
        """
        left = list(prompts)
        while left:
            shortage: str | None = None
            done: set[int] = set()
            try:
                for number, group in self._groups(left, num_samples, params=params, seed=seed):
                    done.add(number)
                    yield group
            except (RuntimeError, MemoryError) as exc:
                if not is_out_of_memory(exc):
                    raise
                shortage = cause_of(exc)
            left = [prompt for number, prompt in enumerate(left) if number not in done]
            if shortage is not None:  # behind the handler: the error holds the tensors of what failed
                self._halve_rows(shortage, min(self._max_rows, len(left) * num_samples), num_samples)

    def _halve_rows(self, cause: str, num_rows: int, num_samples: int) -> None:
        if num_rows <= num_samples:
            raise OutOfMemory(
                f"sampling ran out of memory ({cause}) on {num_samples} completions of a single prompt. `grpo plan "
                "RECIPE` shows what takes it and what fits: a smaller rollout.max_new_tokens or rollout.group_size, "
                "shorter prompts, or dtype=bfloat16."
            )
        self._max_rows = max(num_rows // 2, num_samples)
        logger.warning(
            "sampling ran out of memory (%s) with %d rows side by side; it goes on with %d, which changes no "
            "completion; set rollout.max_rows=%d to begin with that",
            cause,
            num_rows,
            self._max_rows,
            self._max_rows,
        )

    def _groups(
        self, prompts: Sequence[EncodedPrompt], num_samples: int, *, params: SamplingParams, seed: int
    ) -> Iterator[tuple[int, RolloutGroup]]:
        """Each with its prompt's number."""
        work = Work(
            prompts=[prompt.token_ids for prompt in prompts],
            num_samples=num_samples,
            params=params,
            draws=_draws(prompts, num_samples, params=params, seed=seed),
            max_rows=self._max_rows,
            max_tokens=self._max_batch_tokens,
            images=[prompt.images for prompt in prompts] if any(prompt.images for prompt in prompts) else None,
        )
        assert self.shares_prompts or work.images is None, "such a model is refused where prompts may show images"
        complete: dict[int, list[Row]] = {}
        for row in self._rows(work):
            number = row.index // num_samples
            group = complete.setdefault(number, [])
            group.append(row)
            if len(group) == num_samples:
                yield number, self._group(prompts[number], group)

    def _rows(self, work: Work) -> Iterator[Row]:
        # `generate` checks and completes the arguments, hands over to the loop, and returns what the loop returns
        generate: Any = self._model.generate  # its annotations know neither the seam nor its extra arguments
        first = torch.tensor([work.prompts[0]], device=next(self._model.parameters()).device)
        return generate(
            first,
            attention_mask=torch.ones_like(first),
            generation_config=generation_config(work.params),
            custom_generate=_decode_shared if self.shares_prompts else _decode_plain,
            work=work,
        )

    def _probe_prompts(self) -> list[list[int]]:
        vocabulary = min(self._model.config.get_text_config().vocab_size, 1000)
        return [[1 + (7 * place) % (vocabulary - 1) for place in range(length)] for length in (5, 3)]

    def _probe(self, prompts: Sequence[Sequence[int]], images: PromptImages | None = None) -> str | None:
        """Why shared prompts do not give this model's own log-probabilities; None: they do.

        Args:
            images: those of every one of the prompts.
        """
        params = SamplingParams(max_new_tokens=4, end_token_ids=(-1,))
        draws = torch.from_numpy(np.random.default_rng(0).random((2 * len(prompts), 4)))
        shown = None if images is None else [images] * len(prompts)
        work = Work(
            prompts=prompts, num_samples=2, params=params, draws=draws, max_rows=4, max_tokens=None, images=shown
        )
        of_images = set() if images is None else set(itertools.compress(prompts[0], images.token_types))
        try:
            rows = list(decode_shared(self._model, work))
            differences = [
                (own_logprobs(self._model, prompts[row.index // 2], row.token_ids, images) - torch.tensor(row.logprobs))
                for row in rows
                if of_images.isdisjoint(row.token_ids)  # its own pass would look for another image there
            ]
        except (UnsupportedAttention, TypeError, AttributeError, RuntimeError, ValueError, IndexError) as exc:
            return f"its attention does not take shared prompts ({type(exc).__name__}: {exc})"
        difference = float(torch.cat(differences).abs().mean())
        if difference > PROBE_TOLERANCE.get(self._model.dtype, ROUNDED_TOLERANCE):
            return f"with shared prompts its log-probabilities differ by {difference:.2g} nats"
        return None

    def _group(self, prompt: EncodedPrompt, rows: Sequence[Row]) -> RolloutGroup:
        completions = tuple(self._completion(row) for row in sorted(rows, key=lambda row: row.index))
        return RolloutGroup(
            prompt=prompt.prompt,
            prompt_token_ids=prompt.token_ids,
            completions=completions,
            image_digest=prompt.images.digest if prompt.images else None,
        )

    def _completion(self, row: Row) -> Completion:
        return Completion(
            token_ids=tuple(row.token_ids),
            text=str(self._tokenizer.decode(row.token_ids, skip_special_tokens=True)),
            sampler_logprobs=tuple(row.logprobs),
            finish_reason="stop" if row.has_ended else "length",
        )


@torch.no_grad()
def own_logprobs(
    model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int], images: PromptImages | None
) -> Tensor:
    """[T] what a pass of the model over prompt and completion says by itself, its positions and masks included."""
    device = next(model.parameters()).device
    text = torch.tensor([[*prompt, *completion]], device=device)
    arguments: dict[str, Tensor] = {}
    if images is not None:
        arguments = {name: tensor.to(device) for name, tensor in images.tensors.items()}
        if "image_grid_thw" in arguments:  # from which it computes positions
            token_types = [*images.token_types, *(0 for _ in completion)]
            arguments["mm_token_type_ids"] = torch.tensor([token_types], device=device)
    logits = model(text, use_cache=False, **arguments).logits[0]  # [T_prompt + T, V]
    law = logits[len(prompt) - 1 : -1].float().log_softmax(dim=-1)
    return law.gather(1, text[0, len(prompt) :, None])[:, 0].cpu()


def generation_config(params: SamplingParams) -> GenerationConfig:
    """The law as `generate`'s native arguments; sampling arguments are left out of greedy decoding."""
    common: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
        "eos_token_id": list(params.end_token_ids),
        "pad_token_id": params.end_token_ids[0],
        "use_cache": True,
    }
    if params.temperature == 0:
        return GenerationConfig(do_sample=False, **common)
    return GenerationConfig(
        do_sample=True,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p or None,
        **common,
    )


def _decode_shared(model: PreTrainedModel, *_: object, work: Work, **__: object) -> Iterator[Row]:
    return decode_shared(model, work)


def _decode_plain(model: PreTrainedModel, *_: object, work: Work, **__: object) -> Iterator[Row]:
    return decode_plain(model, work)


def _draws(prompts: Sequence[EncodedPrompt], num_samples: int, *, params: SamplingParams, seed: int) -> Tensor:
    rows = [
        np.random.default_rng(derived_seed(seed, prompt.prompt.id, index)).random(params.max_new_tokens)
        for prompt in prompts
        for index in range(num_samples)
    ]
    return torch.from_numpy(np.stack(rows))  # [B, max_new_tokens]
