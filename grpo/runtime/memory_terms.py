"""Shape, recipe and hardware -> bytes of each phase. The terms are those of the code, stage by stage.

What autograd keeps of a block was read off its saved tensors; a term's comment names what it is. Nothing is fitted here
but two allowances for what libraries take for themselves on a CPU, `MKL_BYTES_PER_THREAD` and `ONEDNN_BYTES`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo.config import FullTrainable, LoraTrainable, PartsTrainable, RunConfig
from grpo.runtime.memory_model import ModelShape
from grpo.runtime.memory_parts import LearningParts, learning_parts

MIB = 2**20
MKL_BYTES_PER_THREAD = 13 * MIB
"""Of the buffers that MKL's float32 products keep on a CPU. Calibrated on one case, on two threads."""
ONEDNN_BYTES = 62 * MIB
"""Of what oneDNN keeps of bfloat16 products, code it compiles included. Calibrated on one case, on two threads."""
CHUNK_TOKENS = 192
"""Positions whose logits exist at one time: grpo.update.logprobs.CHUNK_TOKENS."""
PLAIN_ATTENTION_SCORES = 32 * MIB
"""Below so many, a CPU's attention holds its scores: grpo.update.shared_prefix.PLAIN_ATTENTION_SCORES."""
CACHE_GROWTH = 32
"""Own tokens of a decoded row at first, then doubled: grpo.rollout.shared_prompts.GROWTH."""
PREFILL_TOKENS = 8192
"""Prompt tokens that go through the engine's model at once: grpo.rollout.decoding.PREFILL_TOKENS."""
FULL = 4
"""Bytes of a number in full precision."""
PACKED_BLOCK = 64
"""grpo.runtime.quantization.BLOCK."""
PACKED_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a number in NF4 (grpo.runtime.quantization): itself, its block's scale in 8 bits, the scale of 256 such scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The largest micro-batch: G prompts, B completions of them, all of full length."""

    prompts: int
    rows: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def loss_tokens(self) -> int:
        return self.rows * self.completion_tokens

    @property
    def padded_tokens(self) -> int:
        """As the budget counts."""
        return self.prompts * self.prompt_tokens + self.loss_tokens


def largest_micro_batch(config: RunConfig, prompt_tokens: int) -> Rows:
    """What `build_batch` puts together at most: rows of a group side by side, until the budget is used up."""
    budget, k, length = config.update.micro_batch_tokens, config.rollout.group_size, config.rollout.max_new_tokens
    per_group = prompt_tokens + k * length
    groups, left = divmod(budget, per_group)
    groups = min(groups, config.prompts.per_step)
    rest = 0
    if groups < config.prompts.per_step:
        rest = min(max((left - prompt_tokens) // length, 0), k)
    rows = groups * k + rest
    if rows == 0:
        return Rows(prompts=1, rows=1, prompt_tokens=prompt_tokens, completion_tokens=length)
    return Rows(prompts=groups + (rest > 0), rows=rows, prompt_tokens=prompt_tokens, completion_tokens=length)


def count_micro_batches(config: RunConfig, prompt_tokens: int) -> int:
    """Micro-batches of a step whose rows are all of full length, as `build_batch` packs them one by one."""
    budget, k, length = config.update.micro_batch_tokens, config.rollout.group_size, config.rollout.max_new_tokens
    count = rows = groups = 0
    for number in range(config.prompts.per_step * k):
        begins = number % k == 0
        if rows and (groups + begins) * prompt_tokens + (rows + 1) * length <= budget:
            rows, groups = rows + 1, groups + begins
        else:
            count, rows, groups = count + 1, 1, 1
    return count


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
        """The engine's own weights, merged; a server's are not in this process."""
        return 0 if self.config.rollout.engine.type == "vllm_server" else self.width * self.shape.parameters

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
        logits = 5 * rows * shape.vocabulary * FULL  # raw, scaled, sorted, and the sums of probabilities
        if not shape.shares_prompts:
            tokens = rows * (self.rows.prompt_tokens + rollout.max_new_tokens)
            prefill = rows * self.rows.prompt_tokens
            return (
                tokens * per_token * shape.layers * self.width // width + self._forward(prefill, rows, prefill) + logits
            )
        room = CACHE_GROWTH * 2 ** max(math.ceil(math.log2(rollout.max_new_tokens / CACHE_GROWTH)), 0)
        own = rows * room * per_token * shape.layers
        cached = prompts * self.rows.prompt_tokens * per_token * shape.layers
        growing = rows * room * per_token // 4
        at_once = min(max(PREFILL_TOKENS // self.rows.prompt_tokens, 1), prompts) * self.rows.prompt_tokens
        prefill = at_once * 2 * shape.kv_size * self.width * shape.layers + self._forward(at_once, prompts, 0)
        return max(own + cached + growing + logits, prefill + cached)

    def _forward(self, tokens: int, rows: int, scores: int) -> int:
        """One block without gradient: the residual, what is normed, and the feed-forward values that exist at once."""
        inner = (3 if self.shape.is_gated else 6) * self.shape.intermediate
        return tokens * (inner * self.width + 2 * self.shape.hidden * FULL)

    # the reference pass and the update

    def passes(self) -> list[tuple[int, int, int]]:
        """(rows, tokens of each, tokens that each attends to) of the passes of one micro-batch."""
        rows = self.rows
        whole = rows.prompt_tokens + rows.completion_tokens
        if not self.shape.shares_prompts:
            return [(rows.rows, whole, whole)]
        found = [(rows.prompts, rows.prompt_tokens, rows.prompt_tokens)]
        if rows.completion_tokens > 1:  # the last token predicts nothing
            found.append((rows.rows, rows.completion_tokens - 1, whole - 1))
        return found

    def is_plain_attention(self) -> bool:
        """Scores are held: asked for, or short rows on a CPU."""
        if self.config.attention == "eager":
            return True
        rows = self.rows
        scores = rows.rows * self.shape.heads * rows.completion_tokens * (rows.prompt_tokens + rows.completion_tokens)
        return self.is_cpu and scores <= PLAIN_ATTENTION_SCORES

    def saved_per_token(self) -> int:
        """What a block keeps of a token for its gradients, but for attention over other tokens."""
        shape, width = self.shape, self.width
        trainable = self.config.trainable
        parts = self.learning_parts
        adapted = shape.adapted(trainable) if isinstance(trainable, LoraTrainable) else shape.linears
        adapted = parts.linears if parts else adapted
        norms_learn = parts.has_norms if parts else self.is_full
        sizes = {linear.reads: linear.inputs for linear in adapted}
        inputs = sum(sizes.values()) * width
        if self.is_full and width < FULL:  # what a norm in float32 gives, each layer rounds for itself
            again = sum(linear.inputs for linear in adapted if linear.reads in ("attention", "feed"))
            inputs += (again - sizes["attention"] - sizes["feed"]) * width
        if "mixed" not in sizes and not self.is_plain_attention():
            inputs += shape.query_size * width  # the fused kernel keeps its own result
        if shape.has_layer_norm:
            norms = shape.norms * shape.hidden * (FULL if norms_learn else width)
        else:  # in float32: the input and, where the scale learns, the normed value
            norms = shape.norms * shape.hidden * FULL * (2 if norms_learn else 1)
        if shape.has_qk_norm:
            norms += (shape.query_size + shape.kv_size) * (FULL + (width if norms_learn else 0))
        if shape.is_gated:
            inner = 3 * shape.intermediate  # the gate, its activation, the other half
            inner += 0 if shape.activation in ("silu", "gelu_pytorch_tanh", "gelu", "relu") else 3 * shape.intermediate
        else:
            inner = (
                4 if shape.activation == "gelu_new" else 1
            ) * shape.intermediate  # gelu_new is a chain of operators
        ranks = sum(trainable.rank for _ in adapted) * width if isinstance(trainable, LoraTrainable) else 0
        ranks += parts.rank * width if parts else 0
        return inputs + norms + inner * width + shape.query_size * width + ranks

    def saved_attention(self, rows: int, tokens: int, attended: int, *, is_prompt: bool) -> int:
        """What a block keeps of the attention of one pass."""
        shape = self.shape
        kv_heads = shape.heads
        if self.is_plain_attention():
            scores = rows * shape.heads * tokens * attended
            # in float32 from the softmax on, and rounded; GPT-2 takes the softmax in the dtype it has
            is_narrow = self.width == FULL or (shape.has_layer_norm and not self.is_full)
            widths = self.width if is_narrow else FULL + self.width
            kept = scores * widths
        else:
            kept = rows * shape.heads * tokens * FULL  # the sum of each row's exponentials
            if is_prompt:
                kv_heads = shape.kv_heads
            else:
                kept += rows * tokens * attended * self.width  # the mask, as numbers
        return kept + 2 * rows * attended * kv_heads * shape.head_size * self.width

    def saved_of_pass(self, rows: int, tokens: int, attended: int, *, is_prompt: bool) -> int:
        """What all blocks keep of one pass."""
        block = rows * tokens * self.saved_per_token()
        block += self.saved_attention(rows, tokens, attended, is_prompt=is_prompt)
        parts = self.learning_parts
        return (parts.layers if parts else self.shape.layers) * block

    @property
    def recomputed_layers(self) -> int:
        """Blocks that keep their input alone: grpo.update.activations.checkpointed_blocks."""
        return {"none": 0, "selective": self.shape.layers // 2, "full": self.shape.layers}[
            self.config.update.checkpointing
        ]

    def _saved_per_pass(self) -> list[int]:
        passes = self.passes()
        return [
            self.saved_of_pass(*each, is_prompt=number == 0 and len(passes) > 1) for number, each in enumerate(passes)
        ]

    def weight_copies(self) -> int:
        """In the products' dtype, of all blocks."""
        if self.width == FULL:
            return 0
        head = self.shape.head_parameters if self.trains_head else 0  # multiplied in float32, chunk by chunk
        return self.width * (self.shape.linear_parameters if self.is_full else self.learning - head)

    def saved(self) -> int:
        """All that the backward pass of a micro-batch needs, the weights' copies in the products' dtype included; of a
        block that is computed again, its input."""
        whole = sum(self._saved_per_pass()) + self.weight_copies()
        tokens = sum(rows * tokens for rows, tokens, _ in self.passes())
        inputs = tokens * self.shape.hidden * (FULL if self.is_full else self.width)
        kept = self.shape.layers - self.recomputed_layers
        return whole * kept // self.shape.layers + inputs * self.recomputed_layers + self.last_norm()

    def last_norm(self) -> int:
        """What the norm behind the last block keeps: its input, and the normed values where its scale learns."""
        tokens = sum(rows * tokens for rows, tokens, _ in self.passes())
        return tokens * self.shape.hidden * FULL * (2 if self.is_full and not self.shape.has_layer_norm else 1)

    def recomputed_block(self) -> int:
        """What one block keeps while its gradient is computed, where that was not kept."""
        if not self.recomputed_layers:
            return 0
        return (max(self._saved_per_pass()) + self.weight_copies()) // self.shape.layers

    def saved_on_device(self) -> int:
        """Where the rest waits in the host's memory: about two blocks', one on its way and one in use. Not measured."""
        if self.config.update.offload == "none":
            return self.saved()
        return min(self.saved(), 2 * self.saved() // self.shape.layers)

    def cached_prompts(self) -> int:
        """Keys and values of a micro-batch's prompts, of all layers. Where all weights learn, positions turn the keys
        in float32."""
        if not self.shape.shares_prompts:
            return 0
        tokens = self.rows.prompts * self.rows.prompt_tokens
        return tokens * self.shape.kv_size * self._key_and_value_width * self.shape.layers

    def expanded_prompts(self) -> int:
        """One layer's keys and values while completions are computed: prompts once per completion, alone and joined
        with the completions' own."""
        if not self.shape.shares_prompts:
            return 0
        rows = self.rows
        tokens = rows.rows * (2 * rows.prompt_tokens + rows.completion_tokens - 1)
        return tokens * self.shape.kv_size * self._key_and_value_width

    @property
    def _key_and_value_width(self) -> int:
        return self.width + (FULL if self.is_full else self.width)

    def _written_out(self) -> int:
        """The largest packed weight, for its product."""
        return self.width * self.largest_linear() if self.packed else 0

    def states(self) -> int:
        """The last hidden states that predict, gathered for the head."""
        return 2 * self.rows.loss_tokens * self.shape.hidden * FULL

    def logits(self, *, has_filters: bool) -> int:
        """A chunk of them: raw and normalised; a filter sorts them and keeps sums and places."""
        chunk = min(CHUNK_TOKENS, self.rows.loss_tokens) * self.shape.vocabulary
        return chunk * (2 * FULL + (28 if has_filters else 0))

    def reference_pass(self) -> int:
        """One micro-batch through the reference: one block at a time, then the head."""
        rows, tokens, attended = self.passes()[-1]
        block = self._forward(rows * tokens, rows, 0)
        scores = rows * self.shape.heads * tokens * attended * (2 * FULL) if self.is_plain_attention() else 0
        scores += 2 * rows * attended * self.shape.query_size * self.width
        # queries before and after they are turned, keys and values, the residual and what is normed
        scores += rows * tokens * 2 * (self.shape.query_size + self.shape.kv_size + self.shape.hidden) * self.width
        prompts = self.cached_prompts() + self.expanded_prompts()
        return max(prompts + max(block, scores), self.states() + self.logits(has_filters=False))

    def update_pass(self) -> int:
        """One micro-batch from its forward pass to its gradient: the largest of the moments that can be the peak."""
        shape, rollout = self.shape, self.config.rollout
        states = self.states()
        # blocks that are computed again read the prompts' cache a second time
        saved = self.saved_on_device() + (self.cached_prompts() if self.recomputed_layers else 0)
        has_filters = rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0
        head_gradient = FULL * shape.head_parameters if self.trains_head else 0
        # a frozen head's slopes; of one that learns, its input, the gradient by it, and that by the states
        head_slopes = self.rows.loss_tokens * shape.hidden * FULL * (3 if self.trains_head else 1)
        rows, tokens, _ = self.passes()[-1]
        backward = rows * tokens * (2 * shape.intermediate * self.width + 2 * shape.hidden * FULL)
        backward += self.recomputed_block() + self._written_out()
        freed = self.last_norm() if self.recomputed_layers else 0  # before the last block is computed again
        own_gradient = FULL * self.learning
        of_forward = self.weight_copies() * self.recomputed_layers // self.shape.layers
        moments = (
            saved + of_forward + self.cached_prompts() + states // 2,  # the forward pass ends
            saved + states + head_slopes + head_gradient + self.logits(has_filters=has_filters),  # the head
            saved + head_gradient + backward - freed,  # the backward pass begins
            own_gradient + 3 * head_gradient,  # it ends: embeddings used in each pass
        )
        if self.width < FULL and not self.is_full:
            moments = (*moments, saved + backward - freed)
        if self.recomputed_layers == shape.layers:  # the first block's turn: inputs are gone, gradients have come
            gone = rows * tokens * shape.hidden * (FULL if self.is_full else self.width) * (shape.layers - 1)
            come = max(own_gradient - (FULL * shape.head_parameters if self.trains_head else 0), 0)
            moments = (*moments, saved + head_gradient + backward - freed - gone + come)
        apart = 0
        if self.config.update.gradients.method != "sum" or self.config.update.gradients.cosine_every:
            apart = len(self.config.objectives) * FULL * self.learning
        return max(moments) + apart
