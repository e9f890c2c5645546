"""Shape, recipe and hardware -> bytes of what stays, of loading and of sampling; memory_update has the passes.

The terms are those of the code, stage by stage. Nothing is fitted here but two allowances for what libraries take for
themselves on a CPU, `MKL_BYTES_PER_THREAD` and `ONEDNN_BYTES`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo.config import FullTrainable, LoraTrainable, PartsTrainable, RunConfig
from grpo.runtime.memory_model import ModelShape
from grpo.runtime.memory_parts import LearningParts, learning_parts
from grpo.runtime.memory_rows import Rows

MIB = 2**20
MKL_BYTES_PER_THREAD = 13 * MIB
"""Of the buffers that MKL's float32 products keep on a CPU. Calibrated on one case, on two threads."""
ONEDNN_BYTES = 62 * MIB
"""Of what oneDNN keeps of bfloat16 products, code it compiles included. Calibrated on one case, on two threads."""
CACHE_GROWTH = 32
"""Own tokens of a decoded row at first, then doubled: grpo.rollout.shared_prompts.GROWTH."""
PREFILL_TOKENS = 8192
"""Prompt tokens that go through the engine's model at once: grpo.rollout.decoding.PREFILL_TOKENS."""
DRAWN_ROWS = 16
"""Rows that a CPU draws for at a time: grpo.rollout.drawing.CACHED_ROWS."""
FULL = 4
"""Bytes of a number in full precision."""
PACKED_BLOCK = 64
"""grpo.runtime.quantization.BLOCK."""
PACKED_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a number in NF4 (grpo.runtime.quantization): itself, its block's scale in 8 bits, the scale of 256 such scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The sizes of one recipe on one kind of device, in bytes."""

    shape: ModelShape
    config: RunConfig
    rows: Rows
    width: int
    """Bytes of a number of the frozen weights and the products: 2 or 4."""
    is_cpu: bool
    threads: int = 2
    """Of the CPU's products."""

    @property
    def is_full(self) -> bool:
        """Every parameter learns."""
        return isinstance(self.config.trainable, FullTrainable)

    @property
    def learning_parts(self) -> LearningParts | None:
        """What learns under trainable.parts; None for the other kinds."""
        trainable = self.config.trainable
        return learning_parts(self.shape, trainable.parts) if isinstance(trainable, PartsTrainable) else None

    @property
    def in_full(self) -> int:
        """Numbers that learn in full beside frozen ones."""
        parts = self.learning_parts
        return parts.full if parts else 0

    @property
    def trains_head(self) -> bool:
        """The head learns, in full."""
        parts = self.learning_parts
        return parts.has_head if parts else self.is_full

    @property
    def learning(self) -> int:
        """Numbers that learn."""
        trainable, parts = self.config.trainable, self.learning_parts
        if parts:
            return parts.adapters + parts.full
        if not isinstance(trainable, LoraTrainable):
            return self.shape.parameters
        ends = sum(linear.inputs + linear.outputs for linear in self.shape.adapted(trainable))
        return self.shape.layers * ends * trainable.rank

    # what stays

    def weights(self) -> int:
        """The policy: frozen weights in the run's dtype and the adapter in float32, or all of it in float32."""
        if self.is_full:
            return FULL * self.shape.parameters
        frozen = self.shape.parameters - self.packed - self.in_full
        return self.width * frozen + self.packed_bytes() + FULL * self.learning

    @property
    def packed(self) -> int:
        """Numbers in 4 bits: the linear layers of the model's blocks that fill blocks of scales, biases not counted."""
        if self.config.quantization == "none":
            return 0
        fitting = [linear for linear in self.shape.linears if linear.inputs % PACKED_BLOCK == 0]
        return self.shape.layers * sum(linear.inputs * linear.outputs for linear in fitting)

    def packed_bytes(self) -> int:
        """Of what is in 4 bits."""
        return int(self.packed * PACKED_BITS / 8)

    def reference_copy(self) -> int:
        """A second model, where there is no adapter to switch off."""
        return FULL * self.shape.parameters if self.is_full else 0

    def anchor(self) -> int:
        """For the reference: parts that learn in full as they were loaded, and, after a warm-up, all that learns."""
        warmed = FULL * self.learning if self.config.warmup is not None and not self.is_full else 0
        return warmed + self.width * self.in_full

    def engine_copy(self) -> int:
        """The engine's own weights: vLLM's are all its own, ours those that training changes, and what the policy has
        packed; a server's are not in this process."""
        engine, shape, trainable = self.config.rollout.engine.type, self.shape, self.config.trainable
        if engine == "vllm_server":
            return 0
        if engine == "vllm" or self.is_full:
            return self.width * shape.parameters
        parts = self.learning_parts
        adapted = parts.linears if parts else shape.adapted(trainable) if isinstance(trainable, LoraTrainable) else ()
        merged = shape.layers * sum(linear.inputs * linear.outputs for linear in adapted)
        return self.width * min(max(merged, self.packed) + self.in_full, shape.parameters)

    @property
    def has_filters(self) -> bool:
        """Tokens are dropped before one is drawn."""
        rollout = self.config.rollout
        return rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0

    @property
    def has_processors(self) -> bool:
        """Logits are changed before that."""
        rollout = self.config.rollout
        penalties = rollout.presence_penalty, rollout.frequency_penalty, rollout.repetition_penalty - 1
        others = rollout.min_new_tokens, rollout.no_repeat_ngram, rollout.banned, rollout.processors
        return any(penalties) or any(others)

    def gradients(self) -> int:
        """Of the window."""
        return FULL * self.learning

    def moments(self) -> int:
        """The optimizer's two."""
        return (2 if self.config.optim.type == "adamw_8bit" else 2 * FULL) * self.learning

    def library(self) -> int:
        """What libraries keep for themselves."""
        if not self.is_cpu:
            return 0
        return MKL_BYTES_PER_THREAD * self.threads if self.width == FULL else ONEDNN_BYTES

    # loading

    def largest_linear(self) -> int:
        """Numbers."""
        return max(linear.inputs * linear.outputs for linear in self.shape.linears)

    def merging(self) -> int:
        """An adapter's product, twice, the weight, and their sum, in float32, one layer at a time."""
        return 0 if self.is_full else 4 * FULL * self.largest_linear()

    def load_host(self) -> int:
        """Weights are mapped from their files, and copied only where their dtype changes."""
        files = self.shape.stored_bytes * self.shape.parameters
        changed = self.width * self.shape.parameters if self.width != self.shape.stored_bytes else 0
        return files + changed

    # sampling

    def decoded_rows(self) -> int:
        """Rows side by side."""
        rollout, per_row = self.config.rollout, self.rows.prompt_tokens + self.config.rollout.max_new_tokens
        rows = min(rollout.max_rows, self.config.prompts.per_step * rollout.group_size)
        if rollout.max_batch_tokens is not None:
            rows = min(rows, rollout.max_batch_tokens // per_row)
        return max(rows // rollout.group_size, 1) * rollout.group_size

    def sampling(self) -> int:
        """Keys and values of prompts and rows, the logits of a step, and one layer's cache while it grows."""
        rollout, shape, rows = self.config.rollout, self.shape, self.decoded_rows()
        if rollout.engine.type == "vllm_server":
            return 0
        width = FULL if self.is_cpu else self.width
        per_token = 2 * shape.kv_size * width  # of one layer
        prompts = rows // rollout.group_size
        # raw, scaled, sorted, and the sums of probabilities: on a CPU of a few rows at a time
        drawn = min(rows, DRAWN_ROWS) if self.is_cpu else rows
        logits = (5 * drawn * FULL + rows * self.width) * shape.vocabulary
        logits += 2 * rows * shape.vocabulary * FULL if self.has_processors else 0
        if not shape.shares_prompts:
            tokens = rows * (self.rows.prompt_tokens + rollout.max_new_tokens)
            prefill = rows * self.rows.prompt_tokens
            return tokens * per_token * shape.layers * self.width // width + self.block_forward(prefill) + logits
        room = CACHE_GROWTH * 2 ** max(math.ceil(math.log2(rollout.max_new_tokens / CACHE_GROWTH)), 0)
        own = rows * room * per_token * shape.layers
        cached = prompts * self.rows.prompt_tokens * per_token * shape.layers
        growing = rows * room * per_token // 4
        at_once = min(max(PREFILL_TOKENS // self.rows.prompt_tokens, 1), prompts) * self.rows.prompt_tokens
        prefill = at_once * 2 * shape.kv_size * self.width * shape.layers + self.block_forward(at_once)
        return max(own + cached + growing + logits, prefill + cached)

    def block_forward(self, tokens: int) -> int:
        """One block without gradient: the residual, what is normed, and the feed-forward values that exist at once."""
        inner = (3 if self.shape.is_gated else 6) * self.shape.intermediate
        return tokens * (inner * self.width + 2 * self.shape.hidden * FULL)
