"""Terms of a recipe -> bytes of its reference pass and of its update. Imports no torch.

What autograd keeps of a block was read off its saved tensors; a term's comment names what it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo.config import LoraTrainable
from grpo.runtime.memory_terms import FULL, MIB, Terms

CHUNK_TOKENS = 192
"""Positions whose logits exist at one time: grpo.update.logprobs.CHUNK_TOKENS."""
PLAIN_ATTENTION_SCORES = 32 * MIB
"""Below so many, a CPU's attention holds its scores: grpo.update.shared_prefix.PLAIN_ATTENTION_SCORES."""


@dataclass(frozen=True, slots=True)
class UpdateTerms:
    """The passes over the largest micro-batch, in bytes."""

    terms: Terms

    def passes(self) -> list[tuple[int, int, int]]:
        """(rows, tokens of each, tokens that each attends to) of the passes of one micro-batch."""
        rows = self.terms.rows
        whole = rows.prompt_tokens + rows.completion_tokens
        if not self.terms.shape.shares_prompts:
            return [(rows.rows, whole, whole)]
        found = [(rows.prompts, rows.prompt_tokens, rows.prompt_tokens)]
        if rows.completion_tokens > 1:  # the last token predicts nothing
            found.append((rows.rows, rows.completion_tokens - 1, whole - 1))
        return found

    def is_plain_attention(self) -> bool:
        """Scores are held: asked for, or short rows on a CPU."""
        if self.terms.config.attention == "eager":
            return True
        rows = self.terms.rows
        scores = (
            rows.rows * self.terms.shape.heads * rows.completion_tokens * (rows.prompt_tokens + rows.completion_tokens)
        )
        return self.terms.is_cpu and scores <= PLAIN_ATTENTION_SCORES

    def saved_per_token(self) -> int:
        """What a block keeps of a token for its gradients, but for attention over other tokens."""
        shape, width = self.terms.shape, self.terms.width
        trainable = self.terms.config.trainable
        parts = self.terms.learning_parts
        adapted = shape.adapted(trainable) if isinstance(trainable, LoraTrainable) else shape.linears
        adapted = parts.linears if parts else adapted
        norms_learn = parts.has_norms if parts else self.terms.is_full
        sizes = {linear.reads: linear.inputs for linear in adapted}
        inputs = sum(sizes.values()) * width
        if self.terms.is_full and width < FULL:  # what a norm in float32 gives, each layer rounds for itself
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
        shape = self.terms.shape
        kv_heads = shape.heads
        if self.is_plain_attention():
            scores = rows * shape.heads * tokens * attended
            # in float32 from the softmax on, and rounded; GPT-2 takes the softmax in the dtype it has
            is_narrow = self.terms.width == FULL or (shape.has_layer_norm and not self.terms.is_full)
            widths = self.terms.width if is_narrow else FULL + self.terms.width
            kept = scores * widths
        else:
            kept = rows * shape.heads * tokens * FULL  # the sum of each row's exponentials
            if is_prompt:
                kv_heads = shape.kv_heads
            else:
                kept += rows * tokens * attended * self.terms.width  # the mask, as numbers
        return kept + 2 * rows * attended * kv_heads * shape.head_size * self.terms.width

    def saved_of_pass(self, rows: int, tokens: int, attended: int, *, is_prompt: bool) -> int:
        """What all blocks keep of one pass."""
        block = rows * tokens * self.saved_per_token()
        block += self.saved_attention(rows, tokens, attended, is_prompt=is_prompt)
        parts = self.terms.learning_parts
        return (parts.layers if parts else self.terms.shape.layers) * block

    @property
    def recomputed_layers(self) -> int:
        """Blocks that keep their input alone: grpo.update.activations.checkpointed_blocks."""
        return {"none": 0, "selective": self.terms.shape.layers // 2, "full": self.terms.shape.layers}[
            self.terms.config.update.checkpointing
        ]

    def _saved_per_pass(self) -> list[int]:
        passes = self.passes()
        return [
            self.saved_of_pass(*each, is_prompt=number == 0 and len(passes) > 1) for number, each in enumerate(passes)
        ]

    def weight_copies(self) -> int:
        """In the products' dtype, of all blocks."""
        if self.terms.width == FULL:
            return 0
        head = (
            self.terms.shape.head_parameters if self.terms.trains_head else 0
        )  # multiplied in float32, chunk by chunk
        return self.terms.width * (
            self.terms.shape.linear_parameters if self.terms.is_full else self.terms.learning - head
        )

    def saved(self) -> int:
        """All that the backward pass of a micro-batch needs, the weights' copies in the products' dtype included; of a
        block that is computed again, its input."""
        whole = sum(self._saved_per_pass()) + self.weight_copies()
        tokens = sum(rows * tokens for rows, tokens, _ in self.passes())
        inputs = tokens * self.terms.shape.hidden * (FULL if self.terms.is_full else self.terms.width)
        kept = self.terms.shape.layers - self.recomputed_layers
        return whole * kept // self.terms.shape.layers + inputs * self.recomputed_layers + self.last_norm()

    def last_norm(self) -> int:
        """What the norm behind the last block keeps: its input, and the normed values where its scale learns."""
        tokens = sum(rows * tokens for rows, tokens, _ in self.passes())
        return (
            tokens
            * self.terms.shape.hidden
            * FULL
            * (2 if self.terms.is_full and not self.terms.shape.has_layer_norm else 1)
        )

    def recomputed_block(self) -> int:
        """What one block keeps while its gradient is computed, where that was not kept."""
        if not self.recomputed_layers:
            return 0
        return (max(self._saved_per_pass()) + self.weight_copies()) // self.terms.shape.layers

    def saved_on_device(self) -> int:
        """Where the rest waits in the host's memory: about two blocks', one on its way and one in use. Not measured."""
        if self.terms.config.update.offload == "none":
            return self.saved()
        return min(self.saved(), 2 * self.saved() // self.terms.shape.layers)

    def cached_prompts(self) -> int:
        """Keys and values of a micro-batch's prompts, of all layers. Where all weights learn, positions turn the keys
        in float32."""
        if not self.terms.shape.shares_prompts:
            return 0
        tokens = self.terms.rows.prompts * self.terms.rows.prompt_tokens
        return tokens * self.terms.shape.kv_size * self._key_and_value_width * self.terms.shape.layers

    def expanded_prompts(self) -> int:
        """One layer's keys and values while completions are computed: prompts once per completion, alone and joined
        with the completions' own."""
        if not self.terms.shape.shares_prompts:
            return 0
        rows = self.terms.rows
        tokens = rows.rows * (2 * rows.prompt_tokens + rows.completion_tokens - 1)
        return tokens * self.terms.shape.kv_size * self._key_and_value_width

    @property
    def _key_and_value_width(self) -> int:
        return self.terms.width + (FULL if self.terms.is_full else self.terms.width)

    def _written_out(self) -> int:
        """The largest packed weight, for its product."""
        return self.terms.width * self.terms.largest_linear() if self.terms.packed else 0

    def states(self) -> int:
        """The last hidden states that predict, gathered for the head."""
        return 2 * self.terms.rows.loss_tokens * self.terms.shape.hidden * FULL

    def logits(self, *, has_filters: bool) -> int:
        """A chunk of them: raw and normalised; a filter sorts them and keeps sums and places."""
        chunk = min(CHUNK_TOKENS, self.terms.rows.loss_tokens) * self.terms.shape.vocabulary
        return chunk * (2 * FULL + (28 if has_filters else 0))

    def reference_pass(self) -> int:
        """One micro-batch through the reference: one block at a time, then the head."""
        rows, tokens, attended = self.passes()[-1]
        block = self.terms.block_forward(rows * tokens)
        scores = rows * self.terms.shape.heads * tokens * attended * (2 * FULL) if self.is_plain_attention() else 0
        scores += 2 * rows * attended * self.terms.shape.query_size * self.terms.width
        # queries before and after they are turned, keys and values, the residual and what is normed
        scores += (
            rows
            * tokens
            * 2
            * (self.terms.shape.query_size + self.terms.shape.kv_size + self.terms.shape.hidden)
            * self.terms.width
        )
        prompts = self.cached_prompts() + self.expanded_prompts()
        return max(prompts + max(block, scores), self.states() + self.logits(has_filters=False))

    def update_pass(self) -> int:
        """One micro-batch from its forward pass to its gradient: the largest of the moments that can be the peak."""
        shape, rollout = self.terms.shape, self.terms.config.rollout
        states = self.states()
        # blocks that are computed again read the prompts' cache a second time
        saved = self.saved_on_device() + (self.cached_prompts() if self.recomputed_layers else 0)
        has_filters = rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0
        head_gradient = FULL * shape.head_parameters if self.terms.trains_head else 0
        # a frozen head's slopes; of one that learns, its input, the gradient by it, and that by the states
        head_slopes = self.terms.rows.loss_tokens * shape.hidden * FULL * (3 if self.terms.trains_head else 1)
        rows, tokens, _ = self.passes()[-1]
        backward = rows * tokens * (2 * shape.intermediate * self.terms.width + 2 * shape.hidden * FULL)
        backward += self.recomputed_block() + self._written_out()
        freed = self.last_norm() if self.recomputed_layers else 0  # before the last block is computed again
        own_gradient = FULL * self.terms.learning
        of_forward = self.weight_copies() * self.recomputed_layers // self.terms.shape.layers
        moments = (
            saved + of_forward + self.cached_prompts() + states // 2,  # the forward pass ends
            saved + states + head_slopes + head_gradient + self.logits(has_filters=has_filters),  # the head
            saved + head_gradient + backward - freed,  # the backward pass begins
            own_gradient + 3 * head_gradient,  # it ends: embeddings used in each pass
        )
        if self.terms.width < FULL and not self.terms.is_full:
            moments = (*moments, saved + backward - freed)
        if self.recomputed_layers == shape.layers:  # the first block's turn: inputs are gone, gradients have come
            gone = (
                rows * tokens * shape.hidden * (FULL if self.terms.is_full else self.terms.width) * (shape.layers - 1)
            )
            come = max(own_gradient - (FULL * shape.head_parameters if self.terms.trains_head else 0), 0)
            moments = (*moments, saved + head_gradient + backward - freed - gone + come)
        apart = 0
        if self.terms.config.update.gradients.method != "sum" or self.terms.config.update.gradients.cosine_every:
            apart = len(self.terms.config.objectives) * FULL * self.terms.learning
        return max(moments) + apart
