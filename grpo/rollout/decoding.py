"""The decoding loops: prompts -> finished rows, as each row ends.

`decode_shared` computes a prompt once for its K rows, decodes the rows of many prompts side by side under a limit of
rows and tokens, and gives the room of rows that end to prompts that wait. `decode_plain` serves any other model with
its own cache. Both draw a row's tokens from the row's own random numbers, so that it does not matter what it is
batched with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from grpo.prompt_images import PromptImages
from grpo.rollout.base import SamplingParams
from grpo.rollout.drawing import draw_tokens
from grpo.rollout.processors import Prefix, Processor, build_processors, right_padded
from grpo.rollout.shared_prompts import SharedPrompts
from grpo.runtime.filling import filler
from grpo.runtime.image_inputs import prompt_inputs

COMPACT_FRACTION = 1 / 8
"""Ended rows whose room nobody waits for leave when they are at least this share: leaving copies the cache."""
PREFILL_TOKENS = 8192
"""Prompt tokens, padding included, that go through the model at once."""


@dataclass(slots=True, kw_only=True)
class Row:
    """One completion in the making."""

    index: int
    """prompt * num_samples + sample."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    has_ended: bool = False
    """By an end token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is to be sampled."""

    prompts: Sequence[Sequence[int]]
    """P prompts' token ids."""
    num_samples: int
    params: SamplingParams
    draws: Tensor
    """[P * K, max_new_tokens] float64 in [0, 1), a row's own random numbers."""
    max_rows: int
    """Rows side by side, at least one prompt's."""
    max_tokens: int | None
    """Rows side by side times prompt and max_new_tokens, at least one prompt's; None: no limit."""
    images: Sequence[PromptImages | None] | None = None
    """Of each prompt; None where none has any."""

    def images_of(self, prompts: Sequence[int]) -> list[PromptImages | None] | None:
        """Of some prompts."""
        return None if self.images is None else [self.images[prompt] for prompt in prompts]

    def tokens_of(self, prompt: int) -> int:
        """Most tokens that the K rows of a prompt may come to, each with its prompt."""
        return self.num_samples * (len(self.prompts[prompt]) + self.params.max_new_tokens)

    def fits(self, prompt: int, *, rows: int, tokens: int) -> bool:
        """Whether a prompt's rows may join so many others."""
        if rows == 0:
            return True
        in_rows = rows + self.num_samples <= self.max_rows
        return in_rows and (self.max_tokens is None or tokens + self.tokens_of(prompt) <= self.max_tokens)

    def longest_first(self) -> list[int]:
        """Prompts in the order in which they are sampled: neighbours are of like length, and what needs most memory
        comes before the rest."""
        return sorted(range(len(self.prompts)), key=lambda prompt: -len(self.prompts[prompt]))

    def turns(self, *, of_one_length: bool) -> Iterator[list[int]]:
        """Prompts that are sampled together where none can join later."""
        turn: list[int] = []
        for prompt in self.longest_first():
            tokens = sum(self.tokens_of(other) for other in turn)
            is_other_length = bool(turn) and len(self.prompts[turn[0]]) != len(self.prompts[prompt])
            fits = self.fits(prompt, rows=len(turn) * self.num_samples, tokens=tokens)
            if not fits or (of_one_length and is_other_length):
                yield turn
                turn = []
            turn.append(prompt)
        if turn:
            yield turn


class _Drawing:
    """Draws the rows' next tokens and writes them down."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self._work, self._device = work, device
        self._processors: Sequence[Processor] = build_processors(work.params)
        ids, lengths = right_padded(work.prompts)
        self._prompt_ids, self._prompt_lengths = ids.to(device), lengths.to(device)
        self._ends = frozenset(work.params.end_token_ids)

    def draw(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        """[N] tokens for N rows from their logits [N, V]; rows that have ended get one that nobody looks at."""
        if self._processors:
            logits, prefix = logits.float(), self._prefix(rows)
            for processor in self._processors:
                logits = processor(logits, prefix)
        last = self._work.params.max_new_tokens - 1
        draws = self._work.draws[[row.index for row in rows], [min(len(row.token_ids), last) for row in rows]]
        tokens, logprobs = draw_tokens(logits, draws.to(self._device), self._work.params)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if not self.is_done(row):
                row.token_ids.append(token)
                row.logprobs.append(logprob)
                row.has_ended = token in self._ends
        return tokens

    def is_done(self, row: Row) -> bool:
        """Ended by an end token, or at its full length."""
        return row.has_ended or len(row.token_ids) == self._work.params.max_new_tokens

    def _prefix(self, rows: Sequence[Row]) -> Prefix:
        prompts = torch.tensor([row.index // self._work.num_samples for row in rows], device=self._device)  # [N]
        ids, lengths = right_padded([row.token_ids for row in rows])
        return Prefix(
            prompt_ids=self._prompt_ids[prompts],
            prompt_lengths=self._prompt_lengths[prompts],
            token_ids=ids.to(self._device),
            lengths=lengths.to(self._device),
        )


def fills_up(model: PreTrainedModel) -> bool:
    """Whether rows and prompts come in few sizes (see `runtime.filling`): in half precision on a CPU."""
    return model.device.type == "cpu" and model.dtype.itemsize < torch.float32.itemsize


class _SharedLoop:
    """State of `decode_shared`: prompts in slots, K places to a slot, a row at one of its prompt's places."""

    def __init__(self, model: PreTrainedModel, work: Work) -> None:
        self._model, self._work = model, work
        self._device = next(model.parameters()).device
        self._drawing = _Drawing(work, self._device)
        self._waiting = work.longest_first()[::-1]  # taken from the end
        self._rows: list[Row] = []
        self._places: list[int] = []
        """Of each row: its slot * K + its sample."""
        self._spans: list[tuple[int, int, int] | None] = []
        """Of each slot: where in its cache the prompt begins and ends, the position of what follows; None: free."""
        self._cache = self._empty_cache()

    def _empty_cache(self) -> SharedPrompts:
        layers = len(DynamicCache(config=self._model.config).layers)
        # in float32 on a CPU: bfloat16 products of small matrices are slower there, and their scores have two digits
        dtype = torch.float32 if self._device.type == "cpu" else self._model.dtype
        return SharedPrompts(num_layers=layers, samples=self._work.num_samples, dtype=dtype)

    def run(self) -> Iterator[Row]:
        """Rows as they end."""
        while self._waiting or self._rows:
            live = self._live()
            if admitted := self._next_prompts(live):
                self._drop_ended(live, len(admitted) * self._work.num_samples)
                for prompts in self._prefill_turns(admitted):
                    yield from self._prefill(prompts)
                live = self._live()
            if len(self._rows) - len(live) >= COMPACT_FRACTION * len(self._rows):
                self._drop_ended(live)
            if self._rows:
                yield from self._step()

    def _live(self) -> list[int]:
        """Numbers of the rows that have not ended."""
        return [number for number, row in enumerate(self._rows) if not self._drawing.is_done(row)]

    def _next_prompts(self, live: Sequence[int]) -> list[int]:
        """Prompts whose rows fit beside the live ones, no longer waiting."""
        prompts = [self._rows[number].index // self._work.num_samples for number in live]
        rows, tokens = len(live), sum(self._work.tokens_of(p) for p in prompts) // self._work.num_samples
        admitted: list[int] = []
        while self._waiting and self._work.fits(self._waiting[-1], rows=rows, tokens=tokens):
            admitted.append(self._waiting.pop())
            rows, tokens = rows + self._work.num_samples, tokens + self._work.tokens_of(admitted[-1])
        return admitted

    def _prefill_turns(self, prompts: Sequence[int]) -> Iterator[Sequence[int]]:
        count = max(PREFILL_TOKENS // self._filled_width(prompts), 1)
        yield from (prompts[start : start + count] for start in range(0, len(prompts), count))

    def _drop_ended(self, live: Sequence[int], num_new: int = 0) -> None:
        """Live rows stay, and of the others a few for the sake of their number; prompts without any free their slots,
        and leave when half the slots are free. Args: num_new: rows about to come."""
        k = self._work.num_samples
        if not live:
            self._rows, self._places, self._spans, self._cache = [], [], [], self._empty_cache()
            return
        kept = sorted([*live, *self._fillers(live, num_new)])
        rows = None if len(kept) == len(self._rows) else torch.tensor(kept, device=self._device)
        self._rows, self._places = [self._rows[n] for n in kept], [self._places[n] for n in kept]
        used = sorted({place // k for place in self._places})
        self._spans = [span if slot in used else None for slot, span in enumerate(self._spans)]
        slots = None
        if 2 * len(used) <= len(self._spans):
            slots = torch.tensor(used, device=self._device)
            number = {slot: number for number, slot in enumerate(used)}
            self._spans = [self._spans[slot] for slot in used]
            self._places = [number[place // k] * k + place % k for place in self._places]
        self._cache.keep(rows, slots)

    def _fillers(self, live: Sequence[int], num_new: int) -> list[int]:
        """Numbers of ended rows that stay, if there is room for them (see `fills_up`): those whose prompt has live
        ones, and the shortest, for all rows read caches as wide as the widest."""
        if not fills_up(self._model) or (num_new and self._work.max_tokens is not None):
            return []
        k, count = self._work.num_samples, len(live) + num_new
        slots = {self._places[number] // k for number in live}
        ended = sorted(
            set(range(len(self._rows))).difference(live),
            key=lambda number: (self._places[number] // k not in slots, len(self._rows[number].token_ids)),
        )
        return ended[: max(min(filler(count), self._work.max_rows - count), 0)]

    def _filled_width(self, prompts: Sequence[int]) -> int:
        """Tokens of a prompt in a pass over several, padding included."""
        width = max(len(self._work.prompts[prompt]) for prompt in prompts)
        return width + (filler(width) if fills_up(self._model) else 0)

    def _prefill(self, prompts: Sequence[int]) -> Iterator[Row]:
        """Compute the prompts, give them slots, draw their rows' first tokens."""
        k = self._work.num_samples
        texts = [self._work.prompts[prompt] for prompt in prompts]
        ids, mask = (t.to(self._device) for t in left_padded(texts, width=self._filled_width(prompts)))
        given = prompt_inputs(self._model, ids, mask, self._work.images_of(prompts))
        computed = DynamicCache(config=self._model.config)
        logits = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=given.position_ids,
            **given.images,
            past_key_values=computed,
            use_cache=True,
            # as an index: the slice that the number 1 makes is not contiguous, and costs a copy of the head for each
            # prompt
            logits_to_keep=torch.tensor([ids.shape[1] - 1], device=self._device),
        ).logits[:, -1]  # [p, V]
        slots = [slot for slot, span in enumerate(self._spans) if span is None][: len(prompts)]
        slots += range(len(self._spans), len(self._spans) + len(prompts) - len(slots))
        self._spans += [None] * (max(slots) + 1 - len(self._spans))
        rows = [Row(index=prompt * k + sample) for prompt in prompts for sample in range(k)]
        for slot, prompt, position in zip(slots, prompts, given.next_position.tolist(), strict=True):
            self._spans[slot] = (ids.shape[1] - len(self._work.prompts[prompt]), ids.shape[1], position)
            self._places += range(slot * k, slot * k + k)
        self._rows += rows
        self._cache.admit(computed, slots, num_slots=len(self._spans), num_rows=len(self._rows))
        self._drawing.draw(logits.repeat_interleave(k, dim=0), rows)
        yield from (row for row in rows if self._drawing.is_done(row))

    def _step(self) -> Iterator[Row]:
        """One token for every row; ended ones that are still here get one that is thrown away."""
        live = self._live()
        spans = torch.tensor([span or (0, 1, 1) for span in self._spans], device=self._device)  # [G, 3]
        place = torch.tensor(self._places, device=self._device)  # [R]
        steps = torch.tensor([len(row.token_ids) - 1 for row in self._rows], device=self._device)  # [R]
        width = max(span[1] for span in self._spans if span is not None)
        self._cache.put_rows(place, steps, num_prompts=len(spans), prompt_width=width)
        span = spans[place // self._work.num_samples]  # [R, 3]
        columns = torch.arange(max(width, self._cache.where.width), device=self._device)
        of_prompt = (columns[:width] >= span[:, :1]) & (columns[:width] < span[:, 1:2])  # [R, T]
        of_own = columns[: self._cache.where.width] <= steps[:, None]  # [R, S]
        logits = self._model(
            input_ids=torch.tensor([row.token_ids[-1:] for row in self._rows], device=self._device),  # [R, 1]
            attention_mask=torch.cat([of_prompt, of_own], dim=1)[:, None, None],  # [R, 1, 1, T + S]
            position_ids=(span[:, 2] + steps)[:, None],
            past_key_values=self._cache,
            use_cache=True,
            shared_prompts=self._cache,
        ).logits[:, -1]  # [R, V]
        self._drawing.draw(logits, self._rows)
        yield from (self._rows[number] for number in live if self._drawing.is_done(self._rows[number]))


@torch.inference_mode()
def decode_shared(model: PreTrainedModel, work: Work) -> Iterator[Row]:
    """Every row of the work, as it ends, from a model that `use_shared_prompts` has prepared."""
    yield from _SharedLoop(model, work).run()


@torch.inference_mode()
def decode_plain(model: PreTrainedModel, work: Work) -> Iterator[Row]:
    """Every row of the work, as it ends, turn after turn, from any causal model and with the cache it makes itself.

    A prompt is computed for each of its K rows. Ended rows leave a cache that can be asked to drop them. Recurrent
    models get prompts of one length together: padding would go through their state.
    """
    for turn in work.turns(of_one_length=bool(getattr(model, "_is_stateful", False))):
        yield from _plain_turn(model, work, turn)


def _plain_turn(model: PreTrainedModel, work: Work, turn: Sequence[int]) -> Iterator[Row]:
    device = next(model.parameters()).device
    drawing = _Drawing(work, device)
    k = work.num_samples
    rows = [Row(index=prompt * k + sample) for prompt in turn for sample in range(k)]
    text, mask = left_padded([work.prompts[row.index // k] for row in rows])
    text = text.to(device)  # [B, T]
    arguments: dict[str, Any] = {"attention_mask": mask.to(device), "use_cache": True}
    own: Any = model  # how it feeds itself, under names that its annotations do not know
    next_length: int | None = None  # the prompt at first, then a token at a time
    while True:
        inputs = own.prepare_inputs_for_generation(
            text, next_sequence_length=next_length, is_first_iteration=next_length is None, **arguments
        )
        output = own(**inputs, return_dict=True)
        arguments = own._update_model_kwargs_for_generation(output, arguments)
        next_length = 1
        was_live = [row for row in rows if not drawing.is_done(row)]
        tokens = drawing.draw(output.logits[:, -1], rows)
        yield from (row for row in was_live if drawing.is_done(row))
        text = torch.cat([text, tokens[:, None]], dim=1)
        live = [number for number, row in enumerate(rows) if not drawing.is_done(row)]
        if not live:
            return
        caches = [value for value in arguments.values() if isinstance(value, Cache)]
        if caches and len(rows) - len(live) >= COMPACT_FRACTION * len(rows):
            kept = torch.tensor(live, device=device)
            for cache in caches:
                cache.reorder_cache(kept)  # pyright: ignore[reportArgumentType]  # any int64 indices
            arguments = {
                name: value[kept] if isinstance(value, Tensor) and len(value) == len(rows) else value
                for name, value in arguments.items()
            }
            text, rows = text[kept], [rows[number] for number in live]


def left_padded(sequences: Sequence[Sequence[int]], *, width: int | None = None) -> tuple[Tensor, Tensor]:
    """[P, T] token ids and mask; left, so that every row's next token comes at the same place. Args: width: T, where it
    is not the longest's."""
    width = width or max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return ids, mask
