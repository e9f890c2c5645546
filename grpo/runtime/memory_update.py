"""Terms of a recipe -> bytes of its reference pass and of its update. Imports no torch.

What autograd keeps of a block was read off its saved tensors; a term's comment names what it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo.config import LoraTrainable
from grpo.runtime.filling import filler
from grpo.runtime.memory_model import Linear
from grpo.runtime.memory_terms import FULL, MIB, Terms

CHUNK_TOKENS = 192
"""Positions whose logits exist at one time: grpo.update.logprobs.CHUNK_TOKENS."""
CACHED_ROWS = 8
"""Of them in full precision on a CPU: grpo.update.head.CACHED_ROWS."""
PLAIN_ATTENTION_SCORES = 32 * MIB
"""Below so many, a CPU's attention holds its scores: grpo.update.shared_prefix.PLAIN_ATTENTION_SCORES."""

PROMPT_TILE = 160
"""Of a prompt's tokens, in a tile of attention: grpo.update.tiled_attention.PROMPT_TILE."""


@dataclass(frozen=True, slots=True)
class UpdateTerms:
    """The passes over the largest micro-batch, in bytes."""

    terms: Terms

    @property
    def tokens(self) -> int:
        """That go through the blocks: prompts once and completions but for their last token, which predicts nothing; or
        whole rows."""
        rows = self.terms.rows
        if not self.terms.shape.shares_prompts:
            return rows.rows * (rows.prompt_tokens + rows.completion_tokens)
        tokens = rows.prompts * rows.prompt_tokens + self.own_tokens
        return tokens + (filler(tokens) if self.terms.is_cpu else 0)

    @property
    def own_tokens(self) -> int:
        """Of the completions, in a row of shared prompts."""
        return self.terms.rows.rows * (self.terms.rows.completion_tokens - 1)

    def is_plain_attention(self) -> bool:
        """Scores are held: short rows on a CPU, or asked for where whole rows go through the model's own attention."""
        terms, rows = self.terms, self.terms.rows
        whole = rows.prompt_tokens + rows.completion_tokens
        if not terms.shape.shares_prompts:
            pairs = rows.rows * whole**2
            return terms.config.attention == "eager" or (
                terms.is_cpu and terms.shape.heads * pairs <= PLAIN_ATTENTION_SCORES
            )
        pairs = rows.prompts * rows.prompt_tokens**2 + rows.rows * rows.completion_tokens * whole
        return terms.is_cpu and terms.shape.heads * pairs <= PLAIN_ATTENTION_SCORES

    def saved_per_token(self) -> int:
        """What a block keeps of a token for its gradients, but for attention."""
        shape, width = self.terms.shape, self.terms.width
        trainable = self.terms.config.trainable
        parts = self.terms.learning_parts
        adapted = self._adapted
        norms_learn = parts.has_norms if parts else self.terms.is_full
        sizes = {linear.reads: linear.inputs for linear in adapted}
        inputs = sum(sizes.values()) * width
        if self.terms.is_full and width < FULL:  # what a norm in float32 gives, each layer rounds for itself
            again = sum(linear.inputs for linear in adapted if linear.reads in ("attention", "feed"))
            inputs += (again - sizes["attention"] - sizes["feed"]) * width
        if shape.has_layer_norm:
            norms = shape.norms * shape.hidden * (FULL if norms_learn else width)
        else:  # in float32: the input and, where the scale learns, the normed value
            norms = shape.norms * shape.hidden * FULL * (2 if norms_learn else 1)
        if shape.has_qk_norm:
            norms += (shape.query_size + shape.kv_size) * (FULL + (width if norms_learn else 0))
        if shape.is_gated:
            inner = 3 * shape.intermediate  # the gate, its activation, the other half
            inner += 0 if shape.activation in ("silu", "gelu_pytorch_tanh", "gelu", "relu") else 3 * shape.intermediate
        else:  # gelu_new is a chain of operators
            inner = (4 if shape.activation == "gelu_new" else 1) * shape.intermediate
        ranks = sum(trainable.rank for _ in adapted) * width if isinstance(trainable, LoraTrainable) else 0
        ranks += parts.rank * width if parts else 0
        return inputs + norms + inner * width + ranks

    @property
    def _adapted(self) -> tuple[Linear, ...]:
        """Linear layers of a block whose input is kept."""
        if parts := self.terms.learning_parts:
            return parts.linears
        trainable, shape = self.terms.config.trainable, self.terms.shape
        return shape.adapted(trainable) if isinstance(trainable, LoraTrainable) else shape.linears

    def scores(self) -> int:
        """Pairs of a query and a key whose scores exist at once, of completions' queries; all heads."""
        rows, heads = self.terms.rows, self.terms.shape.heads
        if not self.terms.shape.shares_prompts:
            return heads * rows.rows * (rows.prompt_tokens + rows.completion_tokens) ** 2
        return heads * self.own_tokens * (rows.prompt_tokens + rows.completion_tokens - 1)

    def saved_attention(self) -> int:
        """What a block keeps of its attention."""
        if not self.terms.shape.shares_prompts:
            return self._saved_attention_of_whole_rows()
        rows, shape, width = self.terms.rows, self.terms.shape, self.terms.width
        if self.is_plain_attention():
            states = self.tokens * (shape.query_size + 2 * shape.kv_size)
            return (self.scores() + self._prompt_scores() + states) * width
        states = 2 * self.tokens * shape.query_size  # queries, and what the kernel gives
        # a card's kernels that take a mask want a key for every query's head
        written_out = shape.kv_size if self.terms.is_cpu else shape.query_size
        states += 2 * self.tokens * shape.kv_size
        states += 2 * (rows.rows * rows.prompt_tokens + self.own_tokens) * written_out
        mask = self.scores() // shape.heads  # as numbers
        return (states + mask) * width + self.tokens * shape.heads * FULL  # the sum of each query's exponentials

    def _prompt_scores(self) -> int:
        """Pairs of a prompt's query and a key whose scores are made: a tile's queries see those up to its last."""
        rows = self.terms.rows
        starts = range(0, rows.prompt_tokens, PROMPT_TILE)
        ends = (min(start + PROMPT_TILE, rows.prompt_tokens) for start in starts)
        pairs = sum((end - start) * end for start, end in zip(starts, ends, strict=True))
        return self.terms.shape.heads * rows.prompts * pairs

    @property
    def _share_width(self) -> int:
        """Bytes of a score that is held after its softmax, which is in float32, and rounded."""
        return FULL if self.terms.width == FULL else FULL + self.terms.width

    def _saved_attention_of_whole_rows(self) -> int:
        """The model's own attention."""
        shape, width = self.terms.shape, self.terms.width
        states = self.tokens * shape.query_size + 2 * self.tokens * shape.heads * shape.head_size
        if self.is_plain_attention():
            return self.scores() * self._share_width + states * width
        if all(linear.reads != "mixed" for linear in self._adapted):
            states += self.tokens * shape.query_size  # the fused kernel keeps its own result
        mask = self.scores() // shape.heads  # as numbers
        return (states + mask) * width + self.tokens * shape.heads * FULL  # the sum of each query's exponentials

    def saved_of_blocks(self) -> int:
        """What all blocks keep."""
        parts = self.terms.learning_parts
        block = self.tokens * self.saved_per_token() + self.saved_attention()
        return (parts.layers if parts else self.terms.shape.layers) * block

    @property
    def recomputed_layers(self) -> int:
        """Blocks that keep their input alone: grpo.update.activations.checkpointed_blocks."""
        return {"none": 0, "selective": self.terms.shape.layers // 2, "full": self.terms.shape.layers}[
            self.terms.config.update.checkpointing
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
        whole = self.saved_of_blocks() + self.weight_copies()
        inputs = self.tokens * self.terms.shape.hidden * (FULL if self.terms.is_full else self.terms.width)
        kept = self.terms.shape.layers - self.recomputed_layers
        return whole * kept // self.terms.shape.layers + inputs * self.recomputed_layers + self.last_norm()

    def last_norm(self) -> int:
        """What the norm behind the last block keeps: its input, and the normed values where its scale learns."""
        copies = 2 if self.terms.is_full and not self.terms.shape.has_layer_norm else 1
        return self.tokens * self.terms.shape.hidden * FULL * copies

    def recomputed_block(self) -> int:
        """What one block keeps while its gradient is computed, where that was not kept."""
        if not self.recomputed_layers:
            return 0
        return (self.saved_of_blocks() + self.weight_copies()) // self.terms.shape.layers

    def saved_on_device(self) -> int:
        """Where the rest waits in the host's memory: about two blocks', one on its way and one in use. Not measured."""
        if self.terms.config.update.offload == "none":
            return self.saved()
        return min(self.saved(), 2 * self.saved() // self.terms.shape.layers)

    def _written_out(self) -> int:
        """The largest packed weight, for its product."""
        return self.terms.width * self.terms.largest_linear() if self.terms.packed else 0

    def states(self) -> int:
        """The last hidden states that predict, gathered for the head."""
        return 2 * self.terms.rows.loss_tokens * self.terms.shape.hidden * FULL

    def logits(self, *, replays: bool) -> int:
        """A chunk of them as they come and, in full precision, raw and normalised; a filter sorts them and keeps sums
        and places. On a CPU what follows the product goes a few rows at a time, unless the law has processors or
        filters. Args: replays: the sampling law, not logits / temperature alone."""
        terms, vocabulary = self.terms, self.terms.shape.vocabulary
        rows = min(CHUNK_TOKENS, terms.rows.loss_tokens)
        changes = replays and (terms.has_filters or terms.has_processors)
        in_full = 2 * FULL
        if (
            replays and terms.has_filters
        ):  # beside the plain law's derivative; in full precision, raw ones are the product
            in_full = 28 + FULL + (FULL if terms.width < FULL else 0)
        if replays and terms.trains_head:  # its gradient's turn: the whole chunk again, in full precision as it comes
            return vocabulary * rows * in_full
        at_once = rows if changes or not terms.is_cpu else min(rows, CACHED_ROWS)
        slopes = 2 if changes else 1  # by the law, and by the one without processors, in the places of products
        return vocabulary * (rows * slopes * terms.width + at_once * in_full)

    def reference_pass(self) -> int:
        """One micro-batch through the reference: one block at a time, then the head."""
        shape, width = self.terms.shape, self.terms.width
        # queries before and after they are turned, keys and values, the residual and what is normed
        attention = self.tokens * 2 * (shape.query_size + shape.kv_size + shape.hidden) * width
        attention += self.attending()
        return max(self.terms.block_forward(self.tokens), attention, self.states() + self.logits(replays=False))

    def attending(self) -> int:
        """What attention makes on its way and does not keep."""
        width, rows = self.terms.width, self.terms.rows
        if self.is_plain_attention() and not self.terms.shape.shares_prompts:  # scores, and what the softmax makes
            return self.scores() * (width + self._share_width)
        if self.is_plain_attention():  # the same, rounded at once, and each completion's keys behind its prompt's
            keys = 2 * rows.rows * (rows.prompt_tokens + rows.completion_tokens) * self.terms.shape.kv_size
            return (2 * self.scores() + keys) * width
        return 2 * rows.rows * (rows.prompt_tokens + rows.completion_tokens) * self.terms.shape.kv_size * width

    def update_pass(self) -> dict[str, int]:
        """One micro-batch from its forward pass to its gradient, at the largest of the moments that can be the peak; by
        what it is taken up with."""
        moments = self.moments()
        moment = max(moments, key=lambda name: moments[name])
        kept = min(self.saved_on_device(), moments[moment])
        found = {"kept for the gradient": kept, moment: moments[moment] - kept}
        if self.terms.config.update.gradients.method != "sum" or self.terms.config.update.gradients.cosine_every:
            found["a gradient for each objective"] = len(self.terms.config.objectives) * FULL * self.terms.learning
        return found

    def moments(self) -> dict[str, int]:
        """What is there beyond what stays, at each moment that can be the peak."""
        shape, width = self.terms.shape, self.terms.width
        saved, states = self.saved_on_device(), self.states()
        head_gradient = FULL * shape.head_parameters if self.terms.trains_head else 0
        # a frozen head's slopes; of one that learns, its input, the gradient by it, and that by the states
        head_slopes = self.terms.rows.loss_tokens * shape.hidden * FULL * (3 if self.terms.trains_head else 1)
        # of the feed-forward part's two halves, and of the residual
        backward = self.tokens * (2 * shape.intermediate * width + shape.hidden * FULL)
        backward += self.recomputed_block() + self._written_out()
        freed = self.last_norm() if self.recomputed_layers else 0  # before the last block is computed again
        own_gradient = FULL * self.terms.learning
        of_forward = self.weight_copies() * self.recomputed_layers // shape.layers
        found = {
            "the forward pass's end": saved + of_forward + states // 2,
            "the head and its logits": saved + states + head_slopes + head_gradient + self.logits(replays=True),
            "the backward pass": saved + head_gradient + backward - freed,
            "the gradients": own_gradient + 3 * head_gradient,
        }
        if self.recomputed_layers == shape.layers:  # inputs are gone, gradients have come
            gone = self.tokens * shape.hidden * (FULL if self.terms.is_full else width) * (shape.layers - 1)
            come = max(own_gradient - (FULL * shape.head_parameters if self.terms.trains_head else 0), 0)
            found["the first block's turn"] = saved + head_gradient + backward - freed - gone + come
        return found
