"""Sampling with transformers' own `generate`, decoding through its `custom_generate` seam.

Temperature, top-p and top-k are `generate`'s native arguments and its processors apply them; only the loop is ours:
the prompt is computed once per group, finished rows leave the batch, every completion draws from its own seed, and a
group leaves as soon as it is complete.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo.errors import ModelError
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import SamplingParams
from grpo.rollout.processors import Prefix, Processor, build_processors, right_padded
from grpo.runtime.policy import Policy
from grpo.runtime.seeding import derived_seed
from grpo.types import Completion, RolloutGroup

COMPACT_FRACTION = 1 / 8
"""Finished rows leave the batch when they are at least this share of it: leaving copies the cache."""


class TransformersEngine:
    """Samples in process from a copy of the model that holds the policy's weights, adapters merged.

    Merged weights cost no adapter products per token, and sampling never touches the policy's own modules.
    """

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, *, max_rows: int = 64) -> None:
        """Args: max_rows: rows decoded side by side, at least one group."""
        self._tokenizer = tokenizer
        self._max_rows = max_rows
        self._model = _plain_copy(policy)
        self.load_weights(policy)

    def load_weights(self, policy: Policy) -> None:
        """Copy the policy's current weights, adapters merged in float32 and then rounded to the engine's dtype."""
        own = dict(self._model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, weight in policy.merged_weights():
                own[name].copy_(weight)

    def close(self) -> None:
        """Free the copy of the weights."""
        del self._model

    def sample(
        self, prompts: Sequence[EncodedPrompt], num_samples: int, *, params: SamplingParams, seed: int
    ) -> Iterator[RolloutGroup]:
        """See `RolloutEngine.sample`."""
        per_turn = max(self._max_rows // num_samples, 1)
        for start in range(0, len(prompts), per_turn):
            yield from self._sample_turn(prompts[start : start + per_turn], num_samples, params=params, seed=seed)

    def _sample_turn(
        self, prompts: Sequence[EncodedPrompt], num_samples: int, *, params: SamplingParams, seed: int
    ) -> Iterator[RolloutGroup]:
        input_ids, mask = _left_padded([prompt.token_ids for prompt in prompts], pad=params.end_token_ids[0])
        device = next(self._model.parameters()).device
        prompt_ids, prompt_lengths = right_padded([prompt.token_ids for prompt in prompts])
        decoding = _Decoding(
            params=params,
            processors=build_processors(params),
            mask=mask.to(device),
            prompt_ids=prompt_ids.to(device),
            prompt_lengths=prompt_lengths.to(device),
            draws=_draws(prompts, num_samples, params=params, seed=seed),
            num_samples=num_samples,
        )
        # `generate` hands over to the loop and returns what the loop returns
        generate: Any = self._model.generate  # its annotations know neither the seam nor its extra arguments
        finished: Iterator[_FinishedRow] = generate(
            input_ids.to(device),
            attention_mask=mask.to(device),
            generation_config=generation_config(params),
            custom_generate=_decode,
            decoding=decoding,
        )
        rows: dict[int, list[_FinishedRow]] = {}
        for row in finished:
            group = rows.setdefault(row.index // num_samples, [])
            group.append(row)
            if len(group) == num_samples:
                yield self._group(prompts[row.index // num_samples], group)

    def _group(self, prompt: EncodedPrompt, rows: Sequence[_FinishedRow]) -> RolloutGroup:
        completions = tuple(self._completion(row) for row in sorted(rows, key=lambda row: row.index))
        return RolloutGroup(prompt=prompt.prompt, prompt_token_ids=prompt.token_ids, completions=completions)

    def _completion(self, row: _FinishedRow) -> Completion:
        return Completion(
            token_ids=tuple(row.token_ids),
            text=str(self._tokenizer.decode(row.token_ids, skip_special_tokens=True)),
            sampler_logprobs=tuple(row.logprobs),
            finish_reason="stop" if row.has_ended else "length",
        )


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decoding:
    """What the loop needs beyond what `generate` passes on."""

    params: SamplingParams
    processors: Sequence[Processor]
    mask: Tensor
    """[P, T_prompt]; `generate` drops one that is all ones."""
    prompt_ids: Tensor
    """[P, T_prompt] right-padded, as processors see prompts."""
    prompt_lengths: Tensor
    """[P]"""
    draws: Tensor
    """[B, max_new_tokens] float64 in [0, 1), a row's own random numbers."""
    num_samples: int


@dataclass(slots=True, kw_only=True)
class _FinishedRow:
    """One completion of the batch."""

    index: int
    """Place in the batch: prompt * num_samples + sample."""
    token_ids: list[int]
    logprobs: list[float]
    has_ended: bool = False


def _plain_copy(policy: Policy) -> PreTrainedModel:
    """The language model without adapter layers, in the compute dtype, sharing no storage with the policy."""
    build: Any = type(policy.causal_lm)
    with torch.device("meta"):  # no weights yet: random ones would cost their time and twice the memory
        blank: Any = build(copy.deepcopy(policy.causal_lm.config))
    model: PreTrainedModel = blank.to(dtype=policy.compute_dtype).to_empty(device=policy.device)
    model.eval().requires_grad_(False)
    model.tie_weights()
    source = {name.replace(".base_layer.", "."): tensor for name, tensor in policy.causal_lm.state_dict().items()}
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(source[name])
        for name, buffer in policy.causal_lm.named_buffers():  # rotary frequencies are in no state dict
            module, _, last = name.replace(".base_layer.", ".").rpartition(".")
            setattr(model.get_submodule(module), last, buffer.clone())
    _check_all_real(model)
    return model


def _check_all_real(model: PreTrainedModel) -> None:
    """Raises ModelError for a tensor that is still on the meta device: it would be without values."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in model.named_modules():
        attributes = {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
        tensors |= {f"{name}.{key}".lstrip("."): value for key, value in attributes.items()}
    empty = sorted(name for name, tensor in tensors.items() if tensor.is_meta)
    if empty:
        raise ModelError(
            f"{type(model).__name__} keeps {empty[0]} neither as a parameter nor as a buffer, so that the engine's "
            "copy of the model would be without its values. Such an architecture cannot be sampled from."
        )


def _draws(prompts: Sequence[EncodedPrompt], num_samples: int, *, params: SamplingParams, seed: int) -> Tensor:
    rows = [
        np.random.default_rng(derived_seed(seed, prompt.prompt.id, index)).random(params.max_new_tokens)
        for prompt in prompts
        for index in range(num_samples)
    ]
    return torch.from_numpy(np.stack(rows))  # [B, max_new_tokens]


def _left_padded(sequences: Sequence[Sequence[int]], *, pad: int) -> tuple[Tensor, Tensor]:
    """[P, T] token ids and mask; left, so that every row's next token comes at the same place."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return ids, mask


def _processed(logits: Tensor, text: Tensor, rows: Sequence[_FinishedRow], decoding: _Decoding) -> Tensor:
    """[B, V] logits after our processors; text: [B, T] with the left-padded prompt in front."""
    completions = text[:, decoding.mask.shape[1] :]
    prompts = torch.tensor([row.index // decoding.num_samples for row in rows], device=text.device)  # [B]
    prefix = Prefix(
        prompt_ids=decoding.prompt_ids[prompts],
        prompt_lengths=decoding.prompt_lengths[prompts],
        token_ids=completions,
        lengths=torch.full_like(prompts, completions.shape[1]),
    )
    for processor in decoding.processors:
        logits = processor(logits, prefix)
    return logits


@torch.no_grad()
def _decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: object,
    generation_config: GenerationConfig,
    decoding: _Decoding,
    **_: object,
) -> Iterator[_FinishedRow]:
    """The decoding loop that `generate` hands over to; yields each row when it has ended.

    `logits_processor` holds the native temperature, top-k, top-p and min-p, which come after our processors.
    """
    k, params = decoding.num_samples, decoding.params
    cache = DynamicCache(config=model.config)
    positions = (decoding.mask.cumsum(dim=-1) - 1).clamp(min=0)  # [P, T]
    logits = model(
        input_ids=input_ids,
        attention_mask=decoding.mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        # as an index: the slice that the number 1 makes is not contiguous, and costs a copy of the head for each prompt
        logits_to_keep=torch.tensor([input_ids.shape[1] - 1], device=input_ids.device),
    ).logits[:, -1]  # [P, V]
    cache.batch_repeat_interleave(k)  # the prompt was computed once for its K samples
    text = input_ids.repeat_interleave(k, dim=0)  # [B, T]
    mask = decoding.mask.repeat_interleave(k, dim=0)  # [B, T]
    position = positions[:, -1].repeat_interleave(k)  # [B]
    logits = logits.repeat_interleave(k, dim=0)  # [B, V]
    ends = torch.tensor(params.end_token_ids, device=input_ids.device)
    rows = [_FinishedRow(index=index, token_ids=[], logprobs=[]) for index in range(text.shape[0])]
    has_left = torch.zeros(len(rows), dtype=torch.bool, device=text.device)  # [B]

    for step in range(params.max_new_tokens):
        logits = _processed(logits.float(), text, rows, decoding)
        scores = logits_processor(text, logits)  # pyright: ignore[reportArgumentType]  # [B, V]
        draws = decoding.draws[[row.index for row in rows], step].to(scores.device)
        tokens, logprobs = _pick(scores, draws, is_greedy=params.temperature == 0)
        has_ended = torch.isin(tokens, ends)
        is_last = step + 1 == params.max_new_tokens
        for row, token, logprob, ended, left in zip(
            rows, tokens.tolist(), logprobs.tolist(), has_ended.tolist(), has_left.tolist(), strict=True
        ):
            if left:
                continue
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.has_ended = ended
            if ended or is_last:
                yield row
        has_left = has_left | has_ended
        if is_last or bool(has_left.all()):
            return
        text = torch.cat([text, tokens[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        position = position + 1
        if has_left.float().mean() >= COMPACT_FRACTION:
            kept = (~has_left).nonzero()[:, 0]
            cache.batch_select_indices(kept)
            text, mask, position, tokens = text[kept], mask[kept], position[kept], tokens[kept]
            rows = [rows[index] for index in kept.tolist()]
            has_left = torch.zeros(len(rows), dtype=torch.bool, device=text.device)
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]


def _pick(scores: Tensor, draws: Tensor, *, is_greedy: bool) -> tuple[Tensor, Tensor]:
    """One token per row by the inverse distribution function at its own draw: tokens [B], log-probabilities [B]."""
    logprobs = torch.log_softmax(scores, dim=-1)  # [B, V]
    tokens = scores.argmax(dim=-1) if is_greedy else _inverse_distribution(logprobs.exp(), draws)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


DRAW_BLOCK = 256
"""Tokens that are added up first, so that the long sums in float64 are over V / 256 numbers."""


def _inverse_distribution(probabilities: Tensor, draws: Tensor) -> Tensor:
    """[B] the first token up to which the mass exceeds draws [B] of the whole [B, V]; never one of probability 0."""
    blocks = torch.nn.functional.pad(probabilities, (0, -probabilities.shape[1] % DRAW_BLOCK))
    blocks = blocks.unflatten(1, (-1, DRAW_BLOCK))  # [B, V / 256, 256]
    mass = blocks.sum(dim=-1, dtype=torch.float64)  # [B, V / 256]
    block, left = _first_above(mass, draws[:, None] * mass.sum(dim=-1, keepdim=True))
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, DRAW_BLOCK))[:, 0].double()  # [B, 256]
    return (block * DRAW_BLOCK + _first_above(inside, left)[0])[:, 0]


def _first_above(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1] the first place where cumulative mass [B, N] exceeds target [B, 1]; what of it the places before leave."""
    cumulative = mass.cumsum(dim=-1)
    place = torch.searchsorted(cumulative, target, right=True)  # [B, 1]
    # where rounding put the target at or above the sum: the last place that holds any mass
    last = mass.shape[1] - 1 - (mass.flip(1) > 0).int().argmax(dim=1, keepdim=True)
    place = torch.minimum(place, last)
    before = cumulative.gather(1, place) - mass.gather(1, place)
    return place, (target - before).clamp(min=0.0)
